"""Helpers of the tests of skipping: networks with frozen layers, and twins of them whose gradients are all computed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import npc_ext
from npc_ext import NPC
from npc_ext.skipping.certificate import Certificates

from ..tolerances import TRAJECTORY
from ..training import images, importances, same, set_importance, train, weights


def mlp(first: int = 32, second: int = 16) -> nn.Sequential:
    """Three linear layers for images of 8 x 8 pixels. The first one is measured in its ReLU."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            first=nn.Linear(64, first),
            relu=npc_ext.nn.ReLU(),
            second=nn.Linear(first, second),
            relu2=nn.ReLU(),
            output=nn.Linear(second, 10),
        )
    )


def batch(seed: int = 50) -> tuple[Tensor, Tensor]:
    """Images and their labels."""
    return images(seed, classes=10)


def loss_of(model: Callable[[Tensor], Tensor], seed: int = 50) -> Tensor:
    """The loss of a model for a batch of images."""
    x, y = batch(seed)
    return F.cross_entropy(model(x), y)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: Iterable[int]) -> None:
    """Takes one step for the batch of each seed."""
    train(model, optimizer, map(batch, seeds))


def set_importances(optimizer: NPC, importance: Mapping[str, float | Tensor]) -> None:
    """Sets the importance of the named layers' neurons. 3.0 freezes them."""
    for layer, values in importance.items():
        set_importance(optimizer, layer, values)


def certificates(optimizer: NPC) -> Certificates:
    """The certificates of an optimizer's layers."""
    return optimizer._certificates


def skipped(optimizer: NPC) -> dict[str, float]:
    """The share of each layer's weight gradients that is skipped at the moment."""
    return {name: layer.gradients_skipped for name, layer in optimizer.plasticity().items()}


def frozen(model: nn.Module, *layers: str, count: int = 6) -> tuple[Any, NPC]:
    """A model and its optimizer, after steps with these layers certified wholly. Needs `often`."""
    optimizer = NPC(model, lr=0.05, delta=0.9999, skip_gradients="rows")
    set_importances(optimizer, dict.fromkeys(layers, 3.0))
    steps(model, optimizer, range(count))
    assert all(skipped(optimizer)[layer] == 1.0 for layer in layers)
    return model, optimizer


class Pair:
    """A model whose optimizer skips gradients, and its twin, whose optimizer computes all of them."""

    def __init__(
        self, model: nn.Module, importance: Mapping[str, float | Tensor] | None = None, **options: Any
    ) -> None:
        self.model: Any = model
        self.twin: Any = copy.deepcopy(model)
        options = {"skip_gradients": "rows", **options}
        self.optimizer = NPC(model, **options)
        self.plain = NPC(self.twin, **{**options, "skip_gradients": "none"})
        for _, optimizer in self:
            set_importances(optimizer, importance or {})
        self.start = weights(model)

    def __iter__(self) -> Iterator[tuple[Any, NPC]]:
        """Both models, each with its optimizer."""
        return iter([(self.model, self.optimizer), (self.twin, self.plain)])

    def steps(self, seeds: Iterable[int]) -> None:
        """Takes the same steps with both models."""
        for seed in seeds:
            for model, optimizer in self:
                steps(model, optimizer, [seed])

    def skipped(self) -> dict[str, float]:
        """The share of each layer's weight gradients that the first model skips."""
        return skipped(self.optimizer)

    def gradients(self, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of a layer's weight in each model, after a backward pass."""
        got, want = (model.get_submodule(layer).weight for model, _ in self)
        for model, _ in self:
            model(x).sum().backward()
        return got.grad, want.grad

    def same(self) -> bool:
        """Whether parameters, buffers and importance of both models are equal to the last bit."""
        return (
            same(self.model, self.twin)
            and same(self.model.buffers(), self.twin.buffers())
            and same(importances(self.optimizer), importances(self.plain))
        )

    def assert_near(self) -> None:
        """Asserts that the models agree up to rounding, and to the last bit where the twin has not moved.

        Other shapes take other orders of summation: the same bound as for any other order over 100 steps.
        """
        for got, want, start in zip(self.model.parameters(), self.twin.parameters(), self.start, strict=True):
            assert (got - want).norm() <= TRAJECTORY * want.norm()
            untouched = (want == start).flatten(1).all(1) if want.ndim > 1 else want == start
            assert torch.equal(got[untouched], start[untouched])
