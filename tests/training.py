"""Batches, steps, and comparisons of weights, importance and state, for all tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .tolerances import TRAJECTORY


def images(seed: int, classes: int = 3, size: int = 8) -> tuple[Tensor, Tensor]:
    """Random 8x8 images of one channel, and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.randint(classes, (size,), generator=generator)


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of eight such images, with labels of ten classes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator))
        for _ in range(count)
    ]


def sequences(count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of six sequences of eight tokens with eight features, and labels of three classes."""
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randn(6, 8, 8, generator=generator) for _ in range(count))
    return [(x, (x[:, 4, 0] > 0).long() + (x[:, 5, 1] > 0).long()) for x in draws]


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


def importances(optimizer: Any) -> list[Tensor]:
    """The importance of each layer's neurons."""
    return [layer.importance for layer in optimizer.plasticity().values()]


def everything(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """A copy of the weights, and of every tensor and counter that the optimizer keeps."""
    kept = {}
    for name, parameter in model.named_parameters():
        tensors = {"": parameter, **optimizer.state.get(parameter, {})}
        kept |= {f"{name} {key}": value.detach().clone() for key, value in tensors.items() if torch.is_tensor(value)}
    for name, layer in getattr(optimizer, "plasticity", dict)().items():
        if torch.is_tensor(layer.importance):  # CPC has one for each tensor, and keeps it in its state
            kept[f"{name} importance"] = layer.importance
        kept[f"{name} nonfinite_steps"] = torch.tensor(layer.nonfinite_steps)
    return kept


def unchanged(before: dict[str, Tensor], model: nn.Module, optimizer: Any) -> bool:
    """Whether all that `everything` returned before is still the same. State may have been added."""
    after = everything(model, optimizer)
    return same(before, {name: after[name] for name in before})


@contextmanager
def refused(model: nn.Module, optimizer: Any, error: type[Exception], match: str) -> Iterator[Any]:
    """Expects an error that leaves weights and state as they were."""
    before = everything(model, optimizer)
    with pytest.raises(error, match=match) as caught:
        yield caught
    assert unchanged(before, model, optimizer)


def same(a: Any, b: Any) -> bool:
    """Whether two models, or two sequences or dictionaries of tensors, are equal to the last bit."""
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and same(a.values(), [b[name] for name in a])
    tensors = (each.parameters() if isinstance(each, nn.Module) else each for each in (a, b))
    return all(torch.equal(tensor, other) for tensor, other in zip(*tensors, strict=True))


def close(got: nn.Module, want: nn.Module) -> bool:
    """Whether the parameters of two models are equal except for the rounding of a few hundred steps."""
    pairs = zip(got.parameters(), want.parameters(), strict=True)
    return all((p - q).norm() <= TRAJECTORY * q.norm() for p, q in pairs)


def set_importance(optimizer: Any, layer: str, values: Tensor | float, *, neurons: slice = slice(None)) -> None:
    """Sets the importance of a layer's neurons."""
    weight = optimizer.neurons[layer].parameters[0].parameter
    importance = getattr(optimizer, "_tracker", optimizer).state[weight]["importance"]
    importance[neurons] = torch.as_tensor(values, dtype=torch.float32)
