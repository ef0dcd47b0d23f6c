"""Parameters that are sharded over processes by FSDP2 (`torch.distributed.fsdp.fully_shard`).

Such a parameter is a DTensor: each process of a device mesh holds a block of its rows. The last processes may have
fewer rows, or none. Rows are neurons, and every process has the importance of all neurons (one float each). So each
process updates its rows as a single process would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..kernels.launch import in_memory_order_of


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor. Does not import torch.distributed.tensor."""
    return hasattr(tensor, "placements")


def has_no_memory(tensor: Any) -> bool:
    """Whether a tensor's class stores its elements in other tensors, as quantized weights may."""
    return hasattr(tensor, "__tensor_flatten__")


def local(tensor: Any) -> Any:
    """The part of a tensor in this process: a DTensor's shard, or the tensor itself. Not copied, without a graph."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def first_row(parameter: Any) -> int:
    """The index of the first row of this process's shard."""
    return _rows(parameter)[0]


def processes_of(parameter: Any) -> list[int]:
    """The ranks of all processes over which a parameter is sharded."""
    return sorted(parameter.device_mesh.mesh.flatten().tolist())


def why_not(parameter: Any, model: nn.Module) -> str:
    """The reason why a DTensor was not made by `fully_shard` with whole rows; empty if it was."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Replicate, Shard

    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return (
            f"its placements are {parameter.placements}, but no part of the model went through fully_shard, so this is "
            "tensor parallelism"
        )
    sharded = [placement for placement in parameter.placements if type(placement) is not Replicate]
    if len(sharded) > 1 or any(type(placement) is not Shard or placement.dim != 0 for placement in sharded):
        return (
            f"its placements are {parameter.placements}; expected Shard(dim=0) in one dimension of the mesh and "
            "Replicate() in others, as fully_shard makes them without tensor parallelism and shard_placement_fn"
        )
    begin, end = _rows(parameter)
    if local(parameter).shape[0] != end - begin:
        return f"its shard has {local(parameter).shape[0]} rows; expected {end - begin}, as torch.chunk divides them"
    return ""


def like(parameter: Any, tensor: Any, dtype: torch.dtype) -> Any:
    """Converts a tensor of a parameter's shape to a dtype and to the parameter's device, layout and shards.

    Returns the tensor itself if nothing changes.

    Raises:
        ValueError: the tensor is sharded differently.
    """
    if not is_sharded(parameter):
        return in_memory_order_of(parameter, tensor.to(parameter.device, dtype))
    from torch.distributed.tensor import DTensor

    shard, part = local(parameter), local(tensor)
    if not is_sharded(tensor):
        begin, end = _rows(parameter)
        part = tensor[begin:end]
    elif part.shape != shard.shape:
        raise ValueError(
            f"a tensor with placements {tensor.placements} belongs to a parameter with {parameter.placements}; "
            "they must be sharded alike: load checkpoints through torch.distributed.checkpoint"
        )
    elif part.stride() == shard.stride() and part.dtype == dtype and part.device == shard.device:
        return tensor
    return DTensor.from_local(
        in_memory_order_of(shard, part.to(shard.device, dtype)),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _rows(parameter: Any) -> tuple[int, int]:
    """The rows [begin, end) of this process's shard."""
    rows = parameter.shape[0]
    for dim, placement in enumerate(parameter.placements):
        if placement.is_shard():
            mesh = parameter.device_mesh
            most = -(-rows // mesh.size(dim))
            begin = min(rows, mesh.get_local_rank(dim) * most)
            return begin, min(rows, begin + most)
    return 0, rows
