"""Which rows of a weight need a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

_FEWEST_ROWS = 16
_BUCKETS = 8


class Rows:
    """The rows of a layer's weight whose gradients are computed.

    Attributes:
        on_cpu: (r,) int64, ascending.
        on_device: the same on the layer's device.
        neurons: N, the number of the layer's neurons.
    """

    def __init__(self, on_cpu: Tensor, neurons: int, device: torch.device) -> None:
        self.on_cpu, self.neurons = on_cpu, neurons
        pinned = device.type == "cuda" and len(on_cpu) > 0  # so that the CPU does not wait
        self.on_device = on_cpu.pin_memory().to(device, non_blocking=True) if pinned else on_cpu.to(device)

    def __len__(self) -> int:
        return len(self.on_cpu)

    def skipped(self) -> Tensor:
        """(N,) bool on the CPU: the rows whose gradients are not computed."""
        return torch.ones(self.neurons, dtype=torch.bool, device="cpu").index_fill_(0, self.on_cpu, False)

    def share_skipped(self) -> float:
        """The share of rows whose gradients are not computed."""
        return 1 - len(self) / self.neurons


def rows_to_compute(certain: Tensor, whole_only: bool) -> Tensor | None:
    """The rows whose gradients to compute if those of `certain` are not needed; None for all rows.

    Their number is rounded up to a multiple of an eighth of the layer, or of 16 if that is more, by adding certain
    rows. This gives few different shapes, for which the libraries are fast.

    Args:
        certain: (N,) bool, on the CPU.
        whole_only: whether to compute all rows or none.
    """
    moving = certain.logical_not().nonzero().flatten()
    if len(moving) == 0:
        return moving
    neurons = len(certain)
    step = max(_FEWEST_ROWS, -(-neurons // _BUCKETS))
    count = -(-len(moving) // step) * step
    if whole_only or count >= neurons:
        return None
    filling = certain.nonzero().flatten()[: count - len(moving)]
    return torch.cat([moving, filling]).sort().values
