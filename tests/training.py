"""Batches, steps, and comparisons of weights and importance, for all tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def images(seed: int, classes: int = 3, size: int = 8) -> tuple[Tensor, Tensor]:
    """Random 8x8 images of one channel, and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.randint(classes, (size,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]) -> nn.Module:
    """Takes one step for each batch, and returns the model."""
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def weights(model: nn.Module) -> list[Tensor]:
    """A copy of all parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(a: nn.Module | Iterable[Tensor], b: nn.Module | Iterable[Tensor]) -> bool:
    """Whether two models, or two sequences of tensors, are equal to the last bit."""
    tensors = (each.parameters() if isinstance(each, nn.Module) else each for each in (a, b))
    return all(torch.equal(one, other) for one, other in zip(*tensors, strict=True))


def importances(optimizer: Any) -> list[Tensor]:
    """The importance of each layer's neurons."""
    return [layer.importance for layer in optimizer.plasticity().values()]


def set_importance(optimizer: Any, layer: str, values: Tensor | float, *, neurons: slice = slice(None)) -> None:
    """Sets the importance of a layer's neurons."""
    weight = optimizer.neurons[layer].parameters[0].parameter
    importance = getattr(optimizer, "_tracker", optimizer).state[weight]["importance"]
    importance[neurons] = torch.as_tensor(values, dtype=torch.float32)
