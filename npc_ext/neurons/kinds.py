"""Kinds of modules: those that have neurons, and those that normalize."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._torch import class_index_before_fully_shard, direct_parameters

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHTED = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)

NORMALIZATION = {
    *(f"{kind}Norm{d}d" for kind in ("Batch", "Instance") for d in (1, 2, 3)),
    *("SyncBatchNorm", "GroupNorm", "LayerNorm", "RMSNorm"),
    *("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"),
}


def is_transposed_linear(module: Any) -> bool:
    """Whether a module computes x @ weight + bias with a weight (in, out), as the Conv1D of GPT-2 does."""
    weight = direct_parameters(module).get("weight")
    is_conv1d = any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
    return is_conv1d and weight is not None and weight.ndim == 2 and getattr(module, "nf", None) == weight.shape[1]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is fully connected: its neurons are the last dimension of its output."""
    return isinstance(module, nn.Linear) or is_transposed_linear(module)


def is_weighted(module: nn.Module) -> bool:
    """Whether a module is of a kind that has neurons."""
    return isinstance(module, _WEIGHTED) or is_transposed_linear(module)


def torch_class(module: nn.Module) -> str:
    """The name of a module's class in torch.nn, or of the torch.nn class from which it is derived."""
    return next(c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.nn"))


def is_managed(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the module itself, which derives a new class from the module's class."""
    return hasattr(module, "unshard") and hasattr(module, "set_requires_gradient_sync")


def class_before_fully_shard(module: nn.Module) -> type:
    """The class of a module as the user created it."""
    kinds = type(module).__mro__
    return kinds[class_index_before_fully_shard(module)] if is_managed(module) else kinds[0]
