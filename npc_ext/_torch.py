"""All private names of PyTorch that this package uses, with fallbacks for versions that lack them.

A name that begins with an underscore may change with any release of torch. So no other module uses one
(a test checks this), and support for a new torch is added here. Names without a fallback exist in every
torch from the oldest that pyproject.toml allows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad as _forward_ad
from torch.nn.modules import module as _module
from torch.utils import _pytree

__all__ = [
    "INPUT_PROJECTIONS",
    "TRACES_BOUND_FORWARDS",
    "after_backward",
    "as_written",
    "backward_passes",
    "class_index_before_fully_shard",
    "compiled_from",
    "current_backward_pass",
    "current_raw_stream",
    "direct_buffers",
    "direct_children",
    "direct_hooks",
    "direct_parameters",
    "direct_step_hooks",
    "guard_hooks",
    "in_backward",
    "is_batched",
    "is_compiled_in_transform",
    "is_looked_into",
    "is_recorded",
    "is_transformed",
    "listening_modes",
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


# The names of the functions that project the inputs of attention, for packed and for separate weights,
# in torch.nn.functional.multi_head_attention_forward.
INPUT_PROJECTIONS = ("_in_projection_packed", "_in_projection")
# For nested tuples, lists and dictionaries.
tree_map_only: Callable[..., Any] = _pytree.tree_map_only
tree_flatten: Callable[[Any], tuple[list[Any], Any]] = _pytree.tree_flatten
tree_unflatten: Callable[[list[Any], Any], Any] = _pytree.tree_unflatten


def _raw_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _always_listening() -> int:
    return 1


# The address of a GPU's current stream. A torch without CUDA lacks it; the public function takes microseconds.
current_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _raw_stream)
# The number of active dispatch modes. If it is unknown, operations go through the dispatcher.
listening_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", _always_listening)


# The number of the backward pass that runs in this thread, different for each pass; -1 without one.
current_backward_pass: Callable[[], int] = torch._C._current_graph_task_id


def in_backward() -> bool:
    """Whether autograd is running in this thread. A forward pass then belongs to a checkpoint."""
    return current_backward_pass() != -1


def backward_passes() -> int:
    """The number of a backward pass that starts now, as `current_backward_pass` counts. Runs one to find out."""
    numbers: list[int] = []
    with torch.enable_grad():
        probe = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
        probe.register_hook(lambda _: numbers.append(current_backward_pass()))
        probe.backward()
    return numbers[0]


def after_backward(callback: Callable[[], None]) -> None:
    """Calls `callback` at the end of the current backward pass."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


_is_tracing: Callable[[], bool] = torch._C._is_tracing
_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp, ...) or forward-mode differentiation transforms what runs in this thread.

    Do not call it in compiled code: Dynamo would put the call into the graph.
    """
    return _transforms_active() or _forward_ad._current_level >= 0


def is_recorded() -> bool:
    """Whether torch.jit.trace records operations, or `is_transformed()`. Not for compiled code either."""
    return _is_tracing() or _transforms_active() or _forward_ad._current_level >= 0


def is_compiled_in_transform() -> bool:
    """Whether torch.func transforms what Dynamo traces now. Only for compiled code, which has the result as a constant.

    Dynamo enters the transforms that it traces, and guards those that it is called in. It does not guard the levels of
    forward-mode differentiation, so they must not count here.
    """
    return _transforms_active()


# torch.compiler.assume_constant_result does no more than this, but imports Dynamo.
is_compiled_in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_batched(gradient: Tensor) -> bool:
    """Whether it stands for several gradients at once (`is_grads_batched`, `vectorize`), or `is_transformed()`."""
    return is_transformed() or torch._C._functorch.is_legacy_batchedtensor(gradient)


# The number of in-place changes of a tensor. Every step reads it, and attrgetter is faster than a function.
version_of: Callable[[Tensor], int] = attrgetter("_version")


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """The versions of several tensors, in one call."""
    return list(map(version_of, tensors))


# Whether Dynamo traces a module if its forward is a bound method. Dynamo guards a bound method by its
# code. Torch 2.6 cannot trace it. Callable objects work everywhere, but are guarded by their identity, so
# equal blocks do not share a graph.
TRACES_BOUND_FORWARDS = version_tuple(torch.__version__) >= (2, 13)


def direct_parameters(module: nn.Module) -> dict[str, Any]:
    """A module's parameters without those of its children, by name. A registered name without a parameter has None."""
    return module._parameters


def direct_children(module: nn.Module) -> dict[str, Any]:
    """A module's children by name. A registered name without a module has None."""
    return module._modules


def direct_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's buffers without those of its children, by name. The caller may change the dictionary."""
    return module._buffers


def direct_hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """A module's forward hooks and forward pre-hooks. The caller may change the dictionaries."""
    return module._forward_hooks, module._forward_pre_hooks


def direct_step_hooks(optimizer: torch.optim.Optimizer) -> dict[int, Any] | None:
    """An optimizer's hooks before steps; None if it does not call the constructor of `torch.optim.Optimizer`."""
    return getattr(optimizer, "_optimizer_step_pre_hooks", None)


def is_looked_into(model: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether a module of the model is compiled or has hooks other than forward hooks of these types."""
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
        attributes = module.__dict__
        if attributes["_backward_hooks"] or attributes["_backward_pre_hooks"] or _is_compiled(attributes):
            return True
        for hooks in (attributes["_forward_hooks"], attributes["_forward_pre_hooks"]):
            if hooks and not all(isinstance(hook, kinds) for hook in hooks.values()):
                return True
        if attributes["_modules"]:
            modules.extend(attributes["_modules"].values())
    return False


def _is_compiled(attributes: dict[str, Any]) -> bool:
    """Whether a module with these attributes is compiled: in place, as a result of torch.compile, or by its forward."""
    if attributes.get("_compiled_call_impl") is not None or "_orig_mod" in attributes["_modules"]:
        return True
    return hasattr(attributes.get("forward"), "_torchdynamo_orig_callable")


def compiled_from(model: Any) -> Any:
    """The model from which `torch.compile` made this one; None if it did not."""
    return getattr(model, "_orig_mod", None)


def class_index_before_fully_shard(module: nn.Module) -> int:
    """The index in the `__mro__` of a module's class of the class that it had before `fully_shard`."""
    return getattr(module, "_orig_cls_mro_index", 2)  # torch 2.6 lacks the attribute


def reversed_padding(convolution: Any) -> list[int]:
    """A convolution's padding in the format of `torch.nn.functional.pad`."""
    return convolution._reversed_padding_repeated_twice


def guard_hooks() -> None:
    """Makes torch.compile check the hooks of modules before it reuses a graph.

    Equal blocks share graphs, but their taps are not always in the same places: the last block may be measured behind
    it. By default, Dynamo does not check whether hooks were added to modules after they were compiled without.
    """
    dynamo = sys.modules.get("torch._dynamo")  # the first optimizer of torch imports it
    if dynamo is not None and hasattr(dynamo.config, "skip_nnmodule_hook_guards"):
        dynamo.config.skip_nnmodule_hook_guards = False


@contextmanager
def as_written() -> Iterator[None]:
    """Runs compiled modules uncompiled, because compiled ones refuse the proxies of torch.fx."""
    dynamo = sys.modules.get("torch._dynamo")  # if it was never imported, nothing is compiled
    if dynamo is None or not hasattr(dynamo.config, "error_on_nested_fx_trace"):
        yield
        return
    with dynamo.config.patch(error_on_nested_fx_trace=False):
        yield
