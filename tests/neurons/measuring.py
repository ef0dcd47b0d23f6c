"""Helpers of the tests of taps: models, and what their sinks hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npc_ext import find_neurons
from npc_ext.neurons.relu import ReLU
from npc_ext.neurons.table import Neurons

from ..models import paper_cnn


def both_points() -> nn.Sequential:
    """The paper's network. "conv1" and "hidden" are measured in their ReLU, "conv2" and "output" by taps."""
    model = paper_cnn()
    model.relu1, model.relu = ReLU(), ReLU()
    return model


def batch(samples: int = 8, channels: int = 1, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Images of 8 x 8 pixels and their labels."""
    return torch.randn(samples, channels, 8, 8), torch.randint(classes, (samples,))


def attached(model: nn.Module, **options: object) -> Neurons:
    """The neurons of a model, with their taps in place."""
    neurons = find_neurons(model, **options)  # type: ignore[arg-type]
    neurons.attach(model)
    return neurons


def take_sinks(neurons: Neurons) -> dict[str, Tensor]:
    """What the sinks hold, by layer; clears them."""
    taken = {layer.name: layer.sink.grad for layer in neurons if layer.sink.grad is not None}
    for layer in neurons:
        layer.sink.grad = None
    return taken


def measured(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Neurons, dict[str, Tensor]]:
    """Places the taps and runs one forward and backward pass; returns the neurons and their importance."""
    neurons = attached(model)
    F.cross_entropy(model(x), y).backward()
    return neurons, take_sinks(neurons)


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Asserts that two results have the same layers and the same bits."""
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def assert_gradients_equal(model: nn.Module, twin: nn.Module) -> None:
    """Asserts that all gradients of two models have the same bits."""
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
