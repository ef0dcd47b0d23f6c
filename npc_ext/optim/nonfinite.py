"""Counts the steps in which a layer's importance was not finite and was left out of its average.

The kernels raise the counters in device memory. Reading them in every step would make the CPU wait for the GPU, so they
are copied in the background from time to time, and read when the copy is complete.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_STEPS_BETWEEN_COPIES = 100


class NonfiniteSteps:
    """One counter for each layer, on every device that has layers."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._counters: dict[torch.device, Tensor] = {}
        self._copies: dict[torch.device, tuple[Tensor, torch.cuda.Event]] = {}  # in progress
        self._steps = 0

    def on(self, device: torch.device) -> Tensor:
        """The counters of a device, (layers,) int64, which its steps increment."""
        if device not in self._counters:
            self._counters[device] = torch.zeros(self._layers, dtype=torch.int64, device=device)
        return self._counters[device]

    def now(self) -> list[int]:
        """The count of each layer. Waits for the devices."""
        counts = [0] * self._layers
        for counters in self._counters.values():
            counts = [count + more for count, more in zip(counts, counters.tolist(), strict=True)]
        return counts

    def news(self) -> list[int] | None:
        """Call this once a step. Returns counts that are available without waiting, or None if all are zero."""
        self._steps += 1
        for device, counters in self._counters.items():
            known = counters if device.type == "cpu" else self._copied(device, counters)
            if known is not None and any(counts := known.tolist()):
                return counts
        return None

    def _copied(self, device: torch.device, counters: Tensor) -> Tensor | None:
        if device.type != "cuda":
            return counters if self._steps % _STEPS_BETWEEN_COPIES == 0 else None
        if torch.cuda.is_current_stream_capturing():
            return None
        if device in self._copies:
            copy, done = self._copies[device]
            return self._copies.pop(device)[0] if done.query() else None
        if self._steps % _STEPS_BETWEEN_COPIES == 0:
            with torch.cuda.device(device):
                copy = torch.empty(self._layers, dtype=torch.int64, device="cpu", pin_memory=True)
                done = torch.cuda.Event()
                copy.copy_(counters, non_blocking=True)
                done.record()
            self._copies[device] = (copy, done)
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}  # an event belongs to its process
