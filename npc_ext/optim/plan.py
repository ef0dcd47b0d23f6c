"""What one device's part of a step works on, prepared once for many steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..columns import AdamOptions, Layers, Network, SGDOptions, Steps
from ..distributed.shards import local
from ..kernels import launch


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
    options: SGDOptions | AdamOptions  # of each parameter; one of the columns
    columns: tuple[NamedTuple, ...]  # arguments of the operation that stay the same from step to step
    prepared: launch.Prepared | None  # for the compiled kernels; None where plain PyTorch does the work

    def gradients(self) -> list[Any]:
        """The gradients, in memory like their parameters."""
        gradients: list[Any] = [owner.grad for owner in self.owners]
        if self.sharded:
            gradients = list(map(local, gradients))
        return gradients if self.aligned else list(map(launch.in_memory_order_of, self.parameters, gradients))

    def take_options(self, options: SGDOptions | AdamOptions) -> None:
        """Takes over the numbers that schedules change from step to step."""
        planned: dict[str, Any] = self.options._asdict()
        changed = {name: values for name, values in options._asdict().items() if values != planned[name]}
        for name, values in changed.items():
            planned[name][:] = values
        if self.prepared is not None:
            self.prepared.take_options(changed)

    def is_current(self) -> bool:
        """Whether the states still hold the tensors that were checked when the plan was made."""
        for name, tensors in self.checked.items():
            if not all(map(is_, tensors, [state.get(name) for state in self.states])):
                return False
        return True

    def network(self) -> Network:
        """The tensors that SGD works on."""
        buffers = self.state_tensors("momentum_buffer") if "momentum_buffer" in self.checked else ()
        return Network(self.parameters, self.gradients(), buffers)

    def state_tensors(self, name: str) -> list[Any]:
        """One tensor of each parameter's state, or None where it has none of that name."""
        tensors = self.checked.get(name)
        if tensors is None:
            return [None] * len(self.states)
        return list(map(local, tensors)) if self.sharded else tensors


@dataclass(frozen=True)
class LayersPlan(Plan):
    """A plan of an operation that counts the steps in which a layer's importance is not finite."""

    layers: list[int]  # indices of the layers that take part
    nonfinite_steps: Tensor  # counters of all layers, on the device

    @contextmanager
    def counters(self) -> Iterator[Tensor]:
        """Counters of the layers that take part, as the operations of `npc_ext.ops` take them."""
        counts = self.nonfinite_steps[self.layers]
        with torch.no_grad():
            yield counts
            self.nonfinite_steps[self.layers] = counts


@dataclass(frozen=True)
class PlasticPlan(LayersPlan):
    """A plan of an operation with a learning rate for every neuron."""

    layer_states: list[dict[str, Any]]  # the states that hold the layers' importance
    kept: Layers  # their importance, as it was checked, and `nonfinite_steps`
    steps: Steps  # of the parameters, as far as they are counted

    def is_current(self) -> bool:
        """Whether the states still hold the tensors that were checked when the plan was made."""
        averages = [state.get("importance") for state in self.layer_states]
        return all(map(is_, self.kept.importances, averages)) and super().is_current()

    def launch(
        self,
        kernel: Callable[..., None],
        operations: Callable[[], Any],
        network: NamedTuple,
        measured: Sequence[Tensor | None],
    ) -> None:
        """Takes a step with a kernel in `launch`, or where there is none with the operation of the same name."""
        if self.prepared is not None:
            kernel(self.prepared, network, self.kept, measured, self.steps)
            return
        operation = getattr(operations(), kernel.__name__)
        with self.counters() as counts:
            operation(network, Layers(self.kept.importances, counts), measured, *self.columns, self.steps)
