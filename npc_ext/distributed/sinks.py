"""Importance that several processes measure together with torch.distributed.

In data-parallel training (`DistributedDataParallel`, `fully_shard`), each process sees a part of the batch. The
importance a_i (eq. 2) of the whole batch is the sum over processes. So the sinks of all layers (small leaf tensors
whose gradients are the importance) are summed over processes once per step, before eq. 3, in one flat all-reduce. All
processes get the same bits, so their optimizers stay equal, even if each process holds only a shard of the weights.

If some processes have fewer batches, train within `torch.distributed.algorithms.Join([model, optimizer])`. Processes
without batches add zeros while the others train. At the end, they take over the state of the others.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.join import Join, JoinHook

from .._torch import compiled_from, tree_map_only
from .shards import is_sharded

AUTO = "auto"


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model without the wrappers of torch.compile and DistributedDataParallel.

    Raises:
        TypeError: the model is in `nn.DataParallel`, whose copies cannot be measured, or a part of it is in
            `FullyShardedDataParallel`, whose parameters are not whole rows.
    """
    *wrappers, model = _from_outside_in(model)
    if any(isinstance(module, nn.DataParallel) for module in (*wrappers, model)):
        raise TypeError(
            "the model is in nn.DataParallel, which runs copies of it that cannot be measured; use "
            "torch.nn.parallel.DistributedDataParallel with one process for each GPU"
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise TypeError(
            "the model is in FullyShardedDataParallel (FSDP1), which cuts parameters anywhere, not between neurons; "
            "use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    return model


def _from_outside_in(model: Any) -> Iterator[nn.Module]:
    """A model and what it wraps, ending with the user's model."""
    while isinstance(model, nn.Module):
        yield model
        is_data_parallel = isinstance(model, nn.parallel.DistributedDataParallel)
        model = model.module if is_data_parallel else compiled_from(model)


def _data_parallel(model: Any) -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel around a model, if there is one."""
    wrappers = _from_outside_in(model)
    return next((each for each in wrappers if isinstance(each, nn.parallel.DistributedDataParallel)), None)


def _group_of(model: nn.Module) -> Any:
    """The process group of the DistributedDataParallel around a model, or of `fully_shard`'s mesh, or None."""
    if data_parallel := _data_parallel(model):
        return data_parallel.process_group
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    sharded: Any = next(filter(is_sharded, parameters), None)
    return None if sharded is None else _group_of_mesh(sharded.device_mesh)


def _group_of_mesh(mesh: Any) -> Any:
    """One group of all processes of a mesh: each of its dimensions divides the batch."""
    if mesh.ndim == 1:
        return mesh.get_group()
    ranks = sorted(mesh.mesh.flatten().tolist())
    if len(ranks) == distributed.get_world_size():
        return distributed.group.WORLD
    return distributed.new_group(ranks, use_local_synchronization=True)


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _check_alone(data_parallel: nn.parallel.DistributedDataParallel) -> None:
    """Raises ValueError if several processes train a model together."""
    processes = distributed.get_world_size(data_parallel.process_group)
    if processes > 1:
        raise ValueError(
            f"process_group is None (each process for itself), but {processes} processes train the model together with "
            "DistributedDataParallel, so their weights would differ; leave process_group at 'auto'"
        )


class SharedSinks:
    """Adds up the sinks of a model's layers over the processes of a group.

    Args:
        model: the user's model. Its DistributedDataParallel or its sharded parameters define the group.
        group: a process group, None (each process for itself) or "auto" (the model's). Before `init_process_group`,
            None is the same as "auto", because `torch.distributed.group.WORLD` is None then.

    Attributes:
        group: the processes that measure together; None if each measures for itself.
    """

    def __init__(self, model: nn.Module, group: Any) -> None:
        self._auto = (isinstance(group, str) and group == AUTO) or (group is None and not _is_initialized())
        if not self._auto and group is not None and not isinstance(group, distributed.ProcessGroup):
            raise TypeError(
                f"process_group is {group!r}; expected a torch.distributed process group, None (each process for "
                "itself) or 'auto' (that of the model's DistributedDataParallel or fully_shard)"
            )
        self.group = _group_of(model) if self._auto else group
        data_parallel = _data_parallel(model)
        if group is None and data_parallel is not None:
            _check_alone(data_parallel)
        self._data_parallel = None if data_parallel is None else weakref.ref(data_parallel)
        self._buffers: dict[tuple[torch.device, tuple[int, ...]], tuple[Tensor, list[Tensor]]] = {}
        self._works: list[Any] = []

    def look_for_group(self, model: nn.Module) -> None:
        """Takes the group of a model that was sharded later, if the user gave no group."""
        if self._auto and self.group is None:
            self.group = _group_of(model)

    @property
    def shared(self) -> bool:
        """Whether several processes measure together.

        Raises:
            RuntimeError: there are several processes, and it is unknown whether they do.
        """
        if self.group is not None:
            return distributed.get_world_size(self.group) > 1
        if not (self._auto and _is_initialized()):
            return False
        processes = distributed.get_world_size()
        if processes == 1:
            return False
        raise RuntimeError(
            f"torch.distributed runs with {processes} processes, but the optimizer was not told whether they train one "
            "model together, whose importance is then measured together: build it on the wrapped model "
            "(DistributedDataParallel or fully_shard first), or pass process_group=torch.distributed.group.WORLD, or "
            "process_group=None if each process trains a model of its own. Do this after init_process_group: before "
            "it, WORLD is None, which means 'auto'"
        )

    def check_covers(self, processes: Sequence[int], name: str) -> None:
        """Raises ValueError unless all processes over which a parameter is sharded measure together."""
        group = [] if self.group is None else distributed.get_process_group_ranks(self.group)
        if not set(processes) <= set(group) and len(processes) > 1:
            raise ValueError(
                f"{name} is sharded over processes {_short(processes)}, but importance is added up over "
                f"{_short(group)} (process_group); it must be added up over all processes that hold a part: shard all "
                "parameters over the same processes, and leave process_group at 'auto'"
            )

    def notify_join(self, optimizer: Any) -> None:
        """Tells processes without batches to take part in a step. Call it in each step before `start`.

        Raises:
            RuntimeError: they would not take part, because the optimizer is not in their join context, or is the first
                in it.
        """
        data_parallel = None if self._data_parallel is None else self._data_parallel()
        comes_second = optimizer._join_config.enable and not optimizer._join_config.is_first_joinable
        if data_parallel is not None and data_parallel._join_config.enable and not comes_second:
            raise RuntimeError(
                "the model is in join(), for processes with different numbers of batches, but the optimizer is not, or "
                "comes first; it adds up importance over processes, so write `with Join([model, optimizer]):` (from "
                "torch.distributed.algorithms import Join) in place of `with model.join():`"
            )
        Join.notify_join_context(optimizer)

    def start(self, sinks: Iterable[Tensor]) -> None:
        """Starts the sums without waiting. The sinks then refer to the sums, which are complete after `finish`.

        The sink of a layer that was not measured here has no gradient. It counts as -0.0, as for neurons that received
        no gradient, which changes nothing.
        """
        by_device: dict[torch.device, list[Tensor]] = {}
        for sink in sinks:
            by_device.setdefault(sink.device, []).append(sink)
        for device, members in by_device.items():
            key = device, tuple(map(Tensor.numel, members))
            if key not in self._buffers:
                flat = torch.empty(sum(key[1]), dtype=torch.float32, device=device)
                self._buffers[key] = flat, list(flat.split(key[1]))
            flat, parts = self._buffers[key]
            for sink, part in zip(members, parts, strict=True):
                if sink.grad is None:
                    part.fill_(-0.0)
                else:
                    part.copy_(sink.grad)
                sink.grad = part
            self._works.append(distributed.all_reduce(flat, group=self.group, async_op=True))

    def finish(self) -> None:
        """Waits for the sums. On a GPU, the stream waits and the CPU does not."""
        works, self._works = self._works, []
        for work in works:
            work.wait()

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedSinks:
        copy = type(self).__new__(type(self))
        copy.__dict__.update(_auto=self._auto, group=self.group, _data_parallel=None, _buffers={}, _works=[])
        return copy

    def __getstate__(self) -> dict[str, Any]:  # a group belongs to its process
        auto = self._auto or self.group is not None
        return {"_auto": auto, "group": None, "_data_parallel": None, "_buffers": {}, "_works": []}


class SinksJoinHook(JoinHook):
    """The work of a process without batches while others train.

    Args:
        optimizer: takes over the state of the process that trained longest.
        group: the processes.
        add_nothing: takes part in the sums of a step with zeros.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, group: Any, add_nothing: Callable[[], None]) -> None:
        self._optimizer, self._group, self._add_nothing = optimizer, group, add_nothing

    def main_hook(self) -> None:
        """Called for each step of the others."""
        self._add_nothing()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Called when all processes are done. DistributedDataParallel takes over the weights."""
        rank = distributed.get_rank(self._group)
        device = self._optimizer.param_groups[0]["params"][0].device
        last = torch.tensor(rank if is_last_joiner else -1, dtype=torch.int64, device=device)
        distributed.all_reduce(last, op=distributed.ReduceOp.MAX, group=self._group)
        source, states = int(last), list[Any]([None])
        if rank == source:
            states = [tree_map_only(Tensor, Tensor.cpu, self._optimizer.state_dict())]
        distributed.broadcast_object_list(states, distributed.get_global_rank(self._group, source), self._group)
        if rank != source:
            self._optimizer.load_state_dict(states[0])


def _short(ranks: Sequence[int]) -> str:
    return f"{', '.join(map(str, ranks[:8])) or 'none'}{', ...' if len(ranks) > 8 else ''}"
