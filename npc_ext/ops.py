"""The operations with checked arguments, for eager code, loops without autograd, and `torch.compile`.

Each operation is registered as `torch.ops.npc_ext.<name>` with a schema, a kernel and a fake kernel. The compiled
kernels run on CPU and CUDA. Plain PyTorch (`npc_ext.reference`, with the same functions and signatures) runs on other
devices, for float64 on CUDA, and if the compiled kernels are missing; then a warning says so once.

Operations that work in place are registered from the functions in `npc_ext.reference`, which document them. Their
arguments are in groups (`npc_ext.columns`), with an entry for each parameter or each layer. They raise ValueError if
lengths, shapes, dtypes, devices or layouts do not fit, and change nothing then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, ParamSpec

import torch
from torch import Tensor

from . import reference
from ._torch import listening_modes
from ._warn import warn
from .columns import Placement
from .kernels import launch, native
from .kernels.checks import check_arguments, check_pair
from .kernels.register import Operation, in_place

P = ParamSpec("P")


def importance(activation: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0) -> Tensor:
    """How much each neuron of a layer matters to the loss: a_i = sum over b of |sum over p of n_bip * dL/dn_bip|.

    That is eq. 2 of the NPC paper without its two means, which eq. 3 cancels. One pass over the two tensors, in any
    memory layout, without copies; the same input gives the same bits for a given number of threads.

    Args:
        activation: n, at least two-dimensional: samples, neurons and any number of positions. float32, float16,
            bfloat16 or float64, any strides.
        gradient: dL/dn, of the same shape and dtype, on the same device.
        channel_dim: the dimension that counts neurons: 1 after convolutions, -1 after linear layers.
        batch_dim: the dimension that counts samples; all others are positions.

    Returns:
        (N,), summed and returned in float32, or in float64 for float64 input. A neuron that received no gradient
        (dL/dn is 0 everywhere) has -0.0. A sum over micro-batches is -0.0 only if all of its terms are.

    Raises:
        ValueError: shapes, dtypes, devices or dimensions do not fit.
    """
    check_pair("activation", activation, gradient, channel_dim, batch_dim)
    return importance_of_checked(activation, gradient, channel_dim, batch_dim)


def importance_of_checked(activation: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0) -> Tensor:
    """`importance` without checks, for arguments that are known to fit, such as a tensor and its gradient."""
    if _is_plain_call(activation, gradient) and native_takes((activation,)):
        return launch.importance(activation, gradient, channel_dim, batch_dim)
    return torch.ops.npc_ext.importance.default(activation, gradient, channel_dim, batch_dim)


@torch.no_grad()
def relu_backward_importance(
    output: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0
) -> tuple[Tensor, Tensor]:
    """The backward pass of ReLU and the `importance` at its output, in one pass over the output and its gradient.

    Args:
        output: y = max(x, 0), at least two-dimensional, as `activation` in `importance`.
        gradient: dL/dy, of the same shape and dtype, on the same device.
        channel_dim, batch_dim: as in `importance`.

    Returns:
        dL/dx, like `output`: `gradient` where y > 0 (or NaN, as in torch), else 0; and `importance(output, gradient)`.

    Raises:
        ValueError: shapes, dtypes, devices or dimensions do not fit.
    """
    check_pair("output", output, gradient, channel_dim, batch_dim)
    return relu_backward_importance_of_checked(output, gradient, channel_dim, batch_dim)


def relu_backward_importance_of_checked(
    output: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0
) -> tuple[Tensor, Tensor]:
    """`relu_backward_importance` without checks, for arguments that are known to fit, outside of autograd."""
    if _is_plain_call(output, gradient) and native_takes((output,)):
        return _relu_backward_importance(output, gradient, channel_dim, batch_dim)
    return torch.ops.npc_ext.relu_backward_importance.default(output, gradient, channel_dim, batch_dim)


# ----------------------------------------------------------------------------------------------------------- kernels


@cache
def _warn_without_native(kernels: str, reason: str) -> None:
    warn(
        f"npc_ext's {kernels} kernels are not available, plain PyTorch is used instead, which is slower: {reason} "
        "('python -m npc_ext' says how to fix it)",
        RuntimeWarning,
    )


def _is_plain_call(*tensors: Tensor) -> bool:
    """Whether a call can bypass the dispatcher: no compiler, no dispatch mode, no tensor subclass.

    PyTorch's dispatcher takes 5 microseconds to call Python again, as long as a small layer's kernel runs.
    """
    if torch.compiler.is_compiling() or listening_modes() > 0:
        return False
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return False
    return True


def native_takes(tensors: Iterable[Tensor]) -> bool:
    """Whether the compiled kernels take these tensors; warns once if they would, but are missing."""
    gpu = None
    for tensor in tensors:
        if not launch.supports(tensor):
            return False
        if tensor.is_cuda:
            gpu = tensor.device.index
    reason = native.status().reason if gpu is None else native.why_not_on(gpu)
    if reason:
        _warn_without_native("compiled" if gpu is None else "CUDA", reason)
    return not reason


def _importance(activation: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0) -> Tensor:
    kernel = launch.importance if native_takes((activation, gradient)) else reference.importance
    return kernel(activation, gradient, channel_dim, batch_dim)


def _relu_backward_importance(
    output: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0
) -> tuple[Tensor, Tensor]:
    if launch.has_relu_backward(output) and native_takes((output, gradient)):
        return launch.relu_backward_importance(output, gradient, channel_dim, batch_dim)
    grad_input = torch.empty_like(output)
    torch.ops.aten.threshold_backward.grad_input(gradient, output, 0, grad_input=grad_input)
    return grad_input, _importance(output, gradient, channel_dim, batch_dim)


def _fake_importance(activation: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0) -> Tensor:
    dtype = reference.compute_dtype(activation.dtype)
    return activation.new_empty(activation.shape[channel_dim], dtype=dtype)


def _fake_relu_backward_importance(
    output: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(output), _fake_importance(output, gradient, channel_dim, batch_dim)


Operation(importance, _importance, _fake_importance)
Operation(relu_backward_importance, _relu_backward_importance, _fake_relu_backward_importance)


def _kernel(operation: Callable[..., None]) -> Callable[..., None]:
    """The compiled kernel of an operation, or the function in `npc_ext.reference` where there is none."""
    fused = getattr(launch, operation.__name__)

    def kernel(**given: Any) -> None:
        network, layers, activations = given["network"], given.get("layers"), given.get("activations")
        importances = layers.importances if layers else ()
        tensors = [*network.parameters, *importances, *(activations.activations if activations else ())]
        if not native_takes(tensors):
            operation(**given)
            return
        gradients = list(map(launch.in_memory_order_of, network.parameters, network.gradients))
        columns = [given.pop(name) for name in ("placement", "options", "constants", "pull") if name in given]
        if "connections" in given:
            columns.append(Placement.of_layers(given["connections"].layer))
        device = tensors[0].device if tensors else torch.device("cpu")
        prepared = launch.Prepared(device, network.parameters, [average.numel() for average in importances], *columns)
        fused(prepared, **{**given, "network": network._replace(gradients=gradients)})

    return kernel


def _in_place(operation: Callable[P, None]) -> Callable[P, None]:
    return in_place(operation, check_arguments, _kernel(operation))


_network_step = _kernel(reference.network_step_)


def _layer_step(**given: Any) -> None:
    _network_step(**reference.as_network_step(**given))


def _check_layer_step(given: dict[str, Any]) -> None:
    check_arguments(reference.as_network_step(**given))


update_ = _in_place(reference.update_)
adam_update_ = _in_place(reference.adam_update_)
anchored_update_ = _in_place(reference.anchored_update_)
connection_update_ = _in_place(reference.connection_update_)
network_step_ = _in_place(reference.network_step_)
layer_step_ = in_place(reference.layer_step_, _check_layer_step, _layer_step)
