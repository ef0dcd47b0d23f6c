"""What the setups of pages are made of: data, loops, models."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Writer:
    """Takes what a SummaryWriter takes."""

    def add_scalar(self, name: str, value: float, step: int) -> None: ...

    def add_histogram(self, name: str, values: torch.Tensor, step: int) -> None: ...


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def network() -> nn.Sequential:
    """An untrained model like that of the README."""
    hidden = [module for _ in range(2) for module in (nn.Linear(100, 100), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), *hidden, nn.Linear(100, 10))


def batches(outputs: int) -> Batches:
    return [(torch.randn(8, 64), torch.randint(outputs, (8,))) for _ in range(4)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Iterable[Any]) -> None:
    for images, labels in loader:
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
