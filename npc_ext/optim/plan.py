"""What one device's part of a step works on, prepared once for many steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributed.shards import local
from ..kernels import launch

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Plan:
    """What one device's part of a step works on, apart from the values."""

    device: torch.device
    parameters: list[Tensor]  # of sharded ones, this process's shards
    owners: list[Tensor]  # the parameters themselves, which have the gradients
    sharded: bool  # whether any of them is a DTensor
    aligned: bool  # all gradients lie in memory like their parameters
    states: list[dict[str, Any]]  # of the parameters
    checked: dict[str, list[Tensor | None]]  # those tensors of the states that steps read, as they were checked
    has_momentum: list[bool]
    groups: list[dict[str, Any]]  # of each parameter
    rates: list[float | Tensor]  # the learning rate of each parameter, one of the options
    options: tuple[Any, ...]  # of the operation in ops, after its tensors
    tables: launch.Tables | None  # for the compiled kernels; None where plain PyTorch does the work

    def gradients(self) -> list[Any]:
        """The gradients, in memory like their parameters."""
        gradients: list[Any] = [owner.grad for owner in self.owners]
        if self.sharded:
            gradients = list(map(local, gradients))
        return gradients if self.aligned else list(map(launch.in_memory_order_of, self.parameters, gradients))

    def take_rates(self, rates: list[float | Tensor]) -> None:
        """Takes over other learning rates: all that a schedule changes from step to step."""
        self.rates[:] = rates
        if self.tables is not None:
            self.tables.take_rates(rates)

    def is_current(self) -> bool:
        """Whether the states still hold the tensors that were checked when the plan was made."""
        for name, tensors in self.checked.items():
            if not all(map(is_, tensors, [state.get(name) for state in self.states])):
                return False
        return True

    def momentum_buffers(self) -> list[Tensor]:
        """The momentum buffers, and in place of missing ones anything."""
        if "momentum_buffer" not in self.checked:
            return self.parameters
        own = zip(self.parameters, self.beside("momentum_buffer"), strict=True)
        return [parameter if buffer is None else buffer for parameter, buffer in own]

    def beside(self, name: str) -> list[Tensor | None]:
        """One tensor of each parameter's state, or None where it has none of that name."""
        tensors = self.checked.get(name)
        if tensors is None:
            return [None] * len(self.states)
        return list(map(local, tensors)) if self.sharded else tensors


@dataclass(frozen=True)
class PlasticPlan(Plan):
    """What one device's part of a step works on."""

    layers: list[int]  # indices of consolidated layers
    layer_states: list[dict[str, Any]]  # the states that hold their importance
    importances: list[Tensor]  # those, as they were checked
    skipped: Tensor  # counters of all layers, on the device
    first_neuron: list[int] | None  # of each parameter's first row; None where all parameters have all neurons' rows
    seeds: list[int]  # of the parameters' random rounding, or empty

    def is_current(self) -> bool:
        """Whether the states still hold the tensors that were checked when the plan was made."""
        averages = [state.get("importance") for state in self.layer_states]
        return all(map(is_, self.importances, averages)) and super().is_current()

    @contextmanager
    def without_kernels(self, measured: Sequence[Tensor | None]) -> Iterator[tuple[list[Tensor], Tensor]]:
        """What the operations of `npc_ext.ops` take: measured sums, and counters of this plan's layers."""
        nothing, skipped = torch.empty(0, dtype=torch.float32, device=self.device), self.skipped[self.layers]
        sums = [nothing if one is None else one for one in measured]
        with torch.no_grad():
            yield sums, skipped
            self.skipped[self.layers] = skipped
