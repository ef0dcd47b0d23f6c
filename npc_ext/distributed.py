"""Importance that several processes measure together, on torch.distributed.

In data-parallel training (`DistributedDataParallel`, `fully_shard`) each process sees its own part of a batch. The
importance a_i (eq. 2) of the whole batch is the sum of what the processes measured, so the sinks of all layers are
added up over the processes once a step, before eq. 3, in one flat all-reduce. All of them get the same bits from it, so
they go on alike, also where each holds a shard of the weights only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from ._torch import compiled_from
from .shards import is_sharded

if TYPE_CHECKING:
    from .neurons import NeuronLayer

AUTO = "auto"


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model inside of what torch.compile and DistributedDataParallel return.

    Raises:
        TypeError: it is in an `nn.DataParallel`, whose copies cannot be measured, or a part of it is in a
            `FullyShardedDataParallel`, whose parameters are not whole rows.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise TypeError(
                "the model is in nn.DataParallel, which runs copies of it that cannot be measured; use "
                "torch.nn.parallel.DistributedDataParallel with one process for each GPU"
            )
        inner = compiled_from(model)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise TypeError(
            "the model is in FullyShardedDataParallel (FSDP1), which cuts parameters anywhere, not between neurons; "
            "use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    return model


def _group_of(model: nn.Module) -> Any:
    """The process group of the DistributedDataParallel around a model, or of `fully_shard`'s mesh, or None."""
    while isinstance(inner := compiled_from(model), nn.Module):
        model = inner
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.process_group
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    sharded: Any = next(filter(is_sharded, parameters), None)
    return None if sharded is None else _group_of_mesh(sharded.device_mesh)


def _group_of_mesh(mesh: Any) -> Any:
    """One group of all processes of a mesh: all its dimensions take part of a batch."""
    if mesh.ndim == 1:
        return mesh.get_group()
    ranks = sorted(mesh.mesh.flatten().tolist())
    if len(ranks) == distributed.get_world_size():
        return distributed.group.WORLD
    return distributed.new_group(ranks, use_local_synchronization=True)


class SharedSinks:
    """Adds up the sinks of a model's layers over the processes of a group.

    Args:
        model: as the user has it, so that its DistributedDataParallel or its sharded parameters tell the group.
        group: a process group, None (each process for itself) or "auto" (the model's).
    """

    def __init__(self, model: nn.Module, group: Any) -> None:
        self._auto = isinstance(group, str) and group == AUTO
        if not self._auto and group is not None and not isinstance(group, distributed.ProcessGroup):
            raise TypeError(
                f"process_group is {group!r}; expected a torch.distributed process group, None (each process for "
                "itself) or 'auto' (that of the model's DistributedDataParallel or fully_shard)"
            )
        self._group = _group_of(model) if self._auto else group
        self._buffers: dict[tuple[torch.device, tuple[int, ...]], tuple[Tensor, list[Tensor]]] = {}
        self._works: list[Any] = []

    @property
    def shared(self) -> bool:
        """Whether several processes measure together.

        Raises:
            RuntimeError: there are several processes, but nobody said whether they do.
        """
        if self._group is not None:
            return distributed.get_world_size(self._group) > 1
        if not (self._auto and distributed.is_available() and distributed.is_initialized()):
            return False
        processes = distributed.get_world_size()
        if processes == 1:
            return False
        raise RuntimeError(
            f"torch.distributed runs with {processes} processes, but the optimizer was not told whether they train one "
            "model together, whose importance is then measured together: build it on the wrapped model "
            "(DistributedDataParallel or fully_shard first), or pass process_group=torch.distributed.group.WORLD, or "
            "process_group=None if each process trains a model of its own"
        )

    def check_covers(self, processes: Sequence[int], name: str) -> None:
        """Raises ValueError unless all processes over which a parameter is sharded measure together."""
        own = [] if self._group is None else distributed.get_process_group_ranks(self._group)
        if not set(processes) <= set(own) and len(processes) > 1:
            raise ValueError(
                f"{name} is sharded over processes {_short(processes)}, but importance is added up over {_short(own)} "
                "(process_group); it has to be over all that hold a part: shard all parameters over the same "
                "processes, and leave process_group at 'auto'"
            )

    def start(self, layers: Sequence[NeuronLayer]) -> None:
        """Begins to add up, without waiting; from now on the sinks hold the sums, which come with `finish`.

        A layer that was not measured here counts as zeros, which change nothing if it was measured nowhere.
        """
        by_device: dict[torch.device, list[NeuronLayer]] = {}
        for layer in layers:
            by_device.setdefault(layer.sink.device, []).append(layer)
        for device, members in by_device.items():
            key = device, tuple(layer.neurons for layer in members)
            if key not in self._buffers:
                flat = torch.empty(sum(key[1]), device=device)
                self._buffers[key] = flat, list(flat.split(key[1]))
            flat, parts = self._buffers[key]
            for layer, part in zip(members, parts, strict=True):
                if layer.sink.grad is None:
                    part.zero_()
                else:
                    part.copy_(layer.sink.grad)
                layer.sink.grad = part
            self._works.append(distributed.all_reduce(flat, group=self._group, async_op=True))

    def finish(self) -> None:
        """Waits for the sums: on a GPU its stream does, not the CPU."""
        works, self._works = self._works, []
        for work in works:
            work.wait()

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedSinks:
        copy = type(self).__new__(type(self))
        copy.__dict__.update(_auto=self._auto, _group=self._group, _buffers={}, _works=[])
        return copy

    def __getstate__(self) -> dict[str, Any]:  # a group belongs to its process
        return {"_auto": self._auto or self._group is not None, "_group": None, "_buffers": {}, "_works": []}


def _short(ranks: Sequence[int]) -> str:
    return f"{', '.join(map(str, ranks[:8])) or 'none'}{', ...' if len(ranks) > 8 else ''}"
