"""The data of the examples: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    sys.exit(f"{error}; this example needs: pip install scikit-learn")


class Samples(NamedTuple):
    """Images (N, 1, 8, 8) with values from 0 to 1, and the digits (N,) on them."""

    images: Tensor
    labels: Tensor


@functools.cache
def _all() -> Samples:
    data = load_digits()
    return Samples(
        torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16,
        torch.tensor(data.target),
    )


def digits(chosen: Sequence[int]) -> tuple[Samples, Samples]:
    """The training samples and the test samples (every fourth image) of some digits."""
    images, labels = _all()
    is_chosen, is_test = (
        torch.isin(labels, torch.tensor(chosen)),
        torch.arange(len(labels)) % 4 == 0,
    )
    train, test = is_chosen & ~is_test, is_chosen & is_test
    return Samples(images[train], labels[train]), Samples(images[test], labels[test])


def batches(samples: Samples, steps: int, size: int = 32) -> Iterator[Samples]:
    """Random batches, one for each step."""
    for _ in range(steps):
        batch = torch.randint(len(samples.labels), (size,))
        yield Samples(samples.images[batch], samples.labels[batch])


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """The share of samples whose largest output is that of their label."""
    return (outputs.argmax(1) == labels).float().mean().item()
