"""PyTorch's private names: every one that this package uses, and what takes its place where a torch has none.

A name that begins with an underscore may change with any release of torch. So no other module uses one (a test looks
for them), and a new torch is made to work here. All of them are in every torch from the oldest that pyproject.toml
promises, but for those that have a fallback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils import _pytree

__all__ = [
    "INPUT_PROJECTIONS",
    "TRACES_BOUND_FORWARDS",
    "after_backward",
    "as_written",
    "class_index_before_fully_shard",
    "compiled_from",
    "current_backward_pass",
    "current_raw_stream",
    "guard_hooks",
    "in_backward",
    "is_looked_into",
    "listening_modes",
    "own_buffers",
    "own_children",
    "own_hooks",
    "own_parameters",
    "reversed_padding",
    "tree_flatten",
    "tree_map_only",
    "tree_unflatten",
    "version_of",
    "versions_of",
]


def version_tuple(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


# The functions that project the inputs of attention, for weights of one piece and for separate ones, as they are called
# in torch.nn.functional.multi_head_attention_forward.
INPUT_PROJECTIONS = ("_in_projection_packed", "_in_projection")
# Nested tuples, lists and dictionaries: the same nesting with some leaves, or all, replaced.
tree_map_only: Callable[..., Any] = _pytree.tree_map_only
tree_flatten: Callable[[Any], tuple[list[Any], Any]] = _pytree.tree_flatten
tree_unflatten: Callable[[list[Any], Any], Any] = _pytree.tree_unflatten


def _raw_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _always_listening() -> int:
    return 1


# The address of a GPU's current stream. A torch without CUDA has none; torch's public way takes microseconds.
current_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _raw_stream)
# How many dispatch modes see every operation. Where that is not known, operations take the way through the dispatcher.
listening_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", _always_listening)


# The number of the backward pass that runs in this thread, another one for each; -1 if none does.
current_backward_pass: Callable[[], int] = torch._C._current_graph_task_id


def in_backward() -> bool:
    """Whether autograd is running in this thread: a forward pass is then a checkpoint's."""
    return current_backward_pass() != -1


def after_backward(callback: Callable[[], None]) -> None:
    """Within a backward pass: calls `callback` when that is over."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


# How often a tensor has been changed in place. Every step asks for it, and this is quicker than a function of ours.
version_of: Callable[[Tensor], int] = attrgetter("_version")


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """The versions of several tensors, for one call from the step."""
    return list(map(version_of, tensors))


# Whether Dynamo traces a module whose forward is a bound method, which it guards by its code. That of torch 2.6 does
# not. Callable objects work everywhere, but are guarded by their identity, so that equal blocks do not share a graph.
TRACES_BOUND_FORWARDS = version_tuple(torch.__version__) >= (2, 13)


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """A module's parameters without those of its children, by name; None where it was registered without one."""
    return module._parameters


def own_children(module: nn.Module) -> dict[str, Any]:
    """A module's children by name; None where one was registered without a module."""
    return module._modules


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's buffers without those of its children, by name; may be changed."""
    return module._buffers


def own_hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """A module's forward hooks and forward pre-hooks; may be changed."""
    return module._forward_hooks, module._forward_pre_hooks


def is_looked_into(model: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether a module of the model is compiled or has hooks, apart from forward hooks of these types."""
    # torch 2.6 has no _has_any_global_hook.
    if (
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    ):
        return True
    modules: list[Any] = [model]
    for module in modules:  # several times as fast as model.modules()
        if module is None:
            continue
        own = module.__dict__
        if own["_backward_hooks"] or own["_backward_pre_hooks"] or _is_compiled(own):
            return True
        for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"]):
            if hooks and not all(isinstance(hook, kinds) for hook in hooks.values()):
                return True
        if own["_modules"]:
            modules.extend(own["_modules"].values())
    return False


def _is_compiled(own: dict[str, Any]) -> bool:
    """Whether a module with these attributes is compiled: in place, as what torch.compile returned, or its forward."""
    if own.get("_compiled_call_impl") is not None or "_orig_mod" in own["_modules"]:
        return True
    return hasattr(own.get("forward"), "_torchdynamo_orig_callable")


def compiled_from(model: Any) -> Any:
    """The model of which `torch.compile` made this one, or None if it made none of it."""
    return getattr(model, "_orig_mod", None)


def class_index_before_fully_shard(module: nn.Module) -> int:
    """Where in its class's `__mro__` the class is that a module had before `fully_shard`."""
    return getattr(module, "_orig_cls_mro_index", 2)  # torch 2.6 has no such attribute


def reversed_padding(convolution: Any) -> list[int]:
    """A convolution's padding as `torch.nn.functional.pad` takes it."""
    return convolution._reversed_padding_repeated_twice


def guard_hooks() -> None:
    """Has torch.compile run a graph without taps only where there are none, as it should.

    Equal blocks share graphs, but not always the places of their taps: the last block may be measured behind it. By
    default Dynamo does not look whether hooks were added to the modules that it has compiled without.
    """
    dynamo = sys.modules.get("torch._dynamo")  # imported by the first optimizer of torch
    if dynamo is not None and hasattr(dynamo.config, "skip_nnmodule_hook_guards"):
        dynamo.config.skip_nnmodule_hook_guards = False


@contextmanager
def as_written() -> Iterator[None]:
    """Has what `compile()` and `torch.compile` returned run as it was written, where they refuse stand-ins."""
    dynamo = sys.modules.get("torch._dynamo")  # where it was never imported, nothing is compiled
    if dynamo is None or not hasattr(dynamo.config, "error_on_nested_fx_trace"):
        yield
        return
    with dynamo.config.patch(error_on_nested_fx_trace=False):
        yield
