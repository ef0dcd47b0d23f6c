"""Where tensors become addresses: the only module that knows both torch and the compiled kernels, on CPU and CUDA.

Every tensor is held by its caller until the launch has returned, and every tensor that a launch writes gets its
version counter raised, so that autograd notices. Callers (npc_ext.ops) have checked shapes; what is checked here is
what the kernels themselves assume: device, dtype and memory layout.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .._torch import current_raw_stream
from ..reference import compute_dtype
from . import native

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_CUDA_DTYPES = {torch.float32, torch.float16, torch.bfloat16}


def supports(tensor: Tensor) -> bool:
    """Whether there is a compiled kernel for this tensor: on CPU or CUDA, dense, in a dtype that it takes there."""
    if tensor.is_sparse:
        return False
    return tensor.dtype in DTYPES if tensor.is_cpu else tensor.is_cuda and tensor.dtype in _CUDA_DTYPES


@lru_cache(maxsize=64)
def _threads(count: int) -> Any:
    return native.module().cpu.Threads(count)


@lru_cache(maxsize=1024)
def _on_stream(device: int, stream: int) -> tuple[Any, Any]:
    """The CUDA kernels for a GPU, and one of its streams as they take it."""
    cuda = native.module_on(device).cuda
    return cuda, cuda.OnStream(device, stream)


def _launch(kernel: str, device: torch.device, *arguments: Any) -> None:
    """Calls a kernel of the compiled module where `device` runs it."""
    if device.type == "cpu":
        getattr(native.module().cpu, kernel)(_threads(torch.get_num_threads()), *arguments)
        return
    # The current stream is asked for at every launch and never remembered.
    cuda, target = _on_stream(device.index, current_raw_stream(device.index))
    getattr(cuda, kernel)(target, *arguments)


def importance(activation: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0) -> Tensor:
    """Launches eq. 2; see `npc_ext.ops.importance`."""
    return _importance(activation, gradient, channel_dim, batch_dim, 0)


def has_relu_backward(tensor: Tensor) -> bool:
    """Whether there is a kernel for `relu_backward_importance` where the tensor is."""
    return tensor.is_cuda


def relu_backward_importance(
    output: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0
) -> tuple[Tensor, Tensor]:
    """Launches eq. 2 with the backward pass of ReLU, on CUDA; see `npc_ext.ops.relu_backward_importance`."""
    gradient_in = torch.empty_like(output)
    if gradient_in.stride() != output.stride():  # of a tensor with gaps or overlaps, which has no likeness
        output = output.contiguous()
        gradient_in = torch.empty_like(output)
    return gradient_in, _importance(output, gradient, channel_dim, batch_dim, gradient_in.data_ptr())


def _importance(activation: Tensor, gradient: Tensor, channel_dim: int, batch_dim: int, gradient_in: int) -> Tensor:
    shape, device = activation.shape, activation.device
    out = torch.empty(shape[channel_dim], dtype=compute_dtype(activation.dtype), device=device)
    if activation.numel() == 0:
        return out.fill_(-0.0)
    _launch(
        "importance",
        device,
        activation.data_ptr(),
        gradient.data_ptr(),
        out.data_ptr(),
        gradient_in,
        DTYPES[activation.dtype],
        shape,
        activation.stride(),
        gradient.stride(),
        channel_dim % len(shape),
        batch_dim % len(shape),
    )
    return out


@lru_cache(maxsize=4096)
def geometry(shape: tuple[int, ...], stride: tuple[int, ...], neuron_dim: int, groups: int) -> tuple[int, int, int]:
    """How a parameter's memory falls into runs of one neuron each: (outer, middle, run), as csrc/api.h defines them.

    Raises ValueError for memory with gaps or overlaps, and for groups that are not outermost in memory.
    """
    if 0 in shape or not shape:
        return 1, 1, 1
    order = sorted((dim for dim in range(len(shape)) if shape[dim] != 1), key=lambda dim: -stride[dim])
    expected = 1
    for dim in reversed(order):
        if stride[dim] != expected:
            raise ValueError(
                f"a parameter of shape {tuple(shape)} has strides {tuple(stride)}, which leave gaps or overlap; "
                "it must fill its memory: replace its data by .contiguous()"
            )
        expected *= shape[dim]
    if groups > 1 and shape[0] > 1 and order[0] != 0:
        raise ValueError(
            f"a parameter of shape {tuple(shape)} with {groups} groups has strides {tuple(stride)}; its groups must be "
            "outermost in memory: replace its data by .contiguous()"
        )
    outer = run = 1
    before = True
    for dim in order:
        if dim == neuron_dim:
            before = False
        elif before:
            outer *= shape[dim]
        else:
            run *= shape[dim]
    if shape[neuron_dim] == 1:
        # Left out of the order above, where its place does not matter: one neuron (per group) owns all.
        outer, run = (groups, outer * run // groups) if groups > 1 else (1, outer * run)
    return outer // groups, shape[neuron_dim], run


def in_memory_order_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` itself if its elements lie in memory like the parameter's, else a copy of it that does."""
    if tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


class Tables:
    """What the kernels must know of a network's parameters and layers, apart from where they are; checked once.

    Rows of `parameter_numbers`: dtype, size, outer, middle, run, layer, nesterov, maximize, first neuron; of
    `parameter_options`: lr, momentum, weight decay; of `layer_numbers`: neurons, error function, active only; of
    `layer_options`: alpha, beta, delta. They stay valid while the parameters keep their memory, shape, dtype and order.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        neurons: Sequence[int],
        layer: Sequence[int],
        neuron_dim: Sequence[int],
        groups: Sequence[int],
        lr: Sequence[float | Tensor],
        momentum: Sequence[float],
        nesterov: Sequence[bool],
        weight_decay: Sequence[float],
        maximize: Sequence[bool],
        alpha: Sequence[float] = (),
        beta: Sequence[float] = (),
        delta: Sequence[float] = (),
        sigma: Sequence[str] = (),
        active_only: Sequence[bool] = (),
        *,
        first_neuron: Sequence[int] | None = None,
    ) -> None:
        numbers, options = array("q"), array("d")
        for index, parameter in enumerate(parameters):
            place = geometry(parameter.shape, parameter.stride(), neuron_dim[index], groups[index])
            numbers.extend((DTYPES[parameter.dtype], parameter.numel(), *place, layer[index]))
            numbers.extend((nesterov[index], maximize[index], first_neuron[index] if first_neuron else 0))
            rate = lr[index]
            options.extend((0.0 if isinstance(rate, Tensor) else rate, momentum[index], weight_decay[index]))
        layer_numbers, layer_options = array("q"), array("d")
        for index, count in enumerate(neurons):
            layer_numbers.extend((count, sigma[index] == "erf", active_only[index]))
            layer_options.extend((alpha[index], beta[index], delta[index]))
        self.parameter_numbers, self.parameter_options = numbers, options
        self.layer_numbers, self.layer_options = layer_numbers, layer_options
        self.parameter_addresses = [parameter.data_ptr() for parameter in parameters]
        # A rate in device memory is read there, so that a CUDA graph's replays see it change.
        rates = [rate.data_ptr() if isinstance(rate, Tensor) else 0 for rate in lr]
        self.lr_addresses = rates if any(rates) else []
        self.lr_tensors = [rate for rate in lr if isinstance(rate, Tensor)]  # held while their addresses are
        self.has_momentum = [value != 0 for value in momentum]
        self.any_momentum = any(self.has_momentum)
        self._checked: dict[str, list[int]] = {}  # the addresses of tensors that were checked, by what they are

    def take_rates(self, lr: Sequence[float | Tensor]) -> None:
        """Takes over other learning rates. Those in device memory stay the same tensors."""
        self.parameter_options[::3] = array("d", [0.0 if isinstance(rate, Tensor) else rate for rate in lr])

    def addresses(
        self,
        name: str,
        tensors: Sequence[Tensor | None],
        parameters: Sequence[Tensor],
        dtype_of: Callable[[torch.dtype], torch.dtype],
    ) -> list[int]:
        """The addresses of tensors that lie in memory like their parameters; 0 where there is none.

        They are checked whenever their addresses are others than those that were checked before.
        """
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if addresses != self._checked.get(name):
            for index, tensor in enumerate(tensors):
                if tensor is not None:
                    parameter = parameters[index]
                    _check_tensor(name, index, tensor, parameter, dtype_of(parameter.dtype), parameter.stride())
            self._checked[name] = addresses
        return addresses

    def importance_addresses(self, importances: Sequence[Tensor], device: torch.device) -> list[int]:
        """The addresses of the layers' averages, checked likewise."""
        addresses = [average.data_ptr() for average in importances]
        if addresses != self._checked.get("importances"):
            _check_of_layers("importances", self, importances, device)
            self._checked["importances"] = addresses
        return addresses


class AdamTables(Tables):
    """The same for Adam's step. Rows of `adam_options`: the two betas and eps of a parameter."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        neurons: Sequence[int],
        layer: Sequence[int],
        neuron_dim: Sequence[int],
        groups: Sequence[int],
        lr: Sequence[float | Tensor],
        first_decay: Sequence[float],
        second_decay: Sequence[float],
        epsilon: Sequence[float],
        weight_decay: Sequence[float],
        maximize: Sequence[bool],
        *of_layers: Any,
        first_neuron: Sequence[int] | None = None,
    ) -> None:
        momentum = ([0.0] * len(parameters), [False] * len(parameters))
        places = (layer, neuron_dim, groups)
        options = (lr, *momentum, weight_decay, maximize, *of_layers)
        super().__init__(parameters, neurons, *places, *options, first_neuron=first_neuron)
        self.adam_options = array("d")
        for row in zip(first_decay, second_decay, epsilon, strict=True):
            self.adam_options.extend(row)


class AnchoredTables(Tables):
    """The same for steps with anchors. Rows of `anchor_options`: strength and whether the pull is implicit."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        strength: Sequence[float],
        implicit: Sequence[bool],
        lr: Sequence[float | Tensor],
        momentum: Sequence[float],
        nesterov: Sequence[bool],
        weight_decay: Sequence[float],
        maximize: Sequence[bool],
    ) -> None:
        count = len(parameters)
        outside = ([-1] * count, [0] * count, [1] * count)  # of all layers
        super().__init__(parameters, [], *outside, lr, momentum, nesterov, weight_decay, maximize)
        self.anchor_options = array("d")
        for row in zip(strength, implicit, strict=True):
            self.anchor_options.extend(row)


def _addresses(
    tables: Tables,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
) -> tuple[list[int], list[int], list[int], list[int], array[int], array[float]]:
    """The arguments that all updates begin with."""
    momentum = [0] * len(parameters)
    if tables.any_momentum:
        buffers = [buffer if has else None for buffer, has in zip(momentum_buffers, tables.has_momentum, strict=True)]
        momentum = tables.addresses("momentum_buffers", buffers, parameters, _same)
    return (
        tables.parameter_addresses,
        [gradient.data_ptr() for gradient in gradients],
        momentum,
        tables.lr_addresses,
        tables.parameter_numbers,
        tables.parameter_options,
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _same(dtype: torch.dtype) -> torch.dtype:
    return dtype


def _float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32


def _check_tensor(
    name: str, index: int, tensor: Tensor, like: Tensor, dtype: torch.dtype, stride: tuple[int, ...]
) -> None:
    if (
        tensor.dtype is not dtype
        or tensor.device != like.device
        or tensor.numel() != like.numel()
        or tensor.stride() != stride
    ):
        raise ValueError(
            f"{name}[{index}] is {tensor.dtype} of shape {tuple(tensor.shape)} with strides {tensor.stride()} on "
            f"{tensor.device}; expected {dtype} of shape {tuple(like.shape)} with strides {stride} on {like.device}"
        )


def _check_of_layers(name: str, tables: Tables, tensors: Sequence[Tensor | None], device: torch.device) -> None:
    for tensor, neurons in zip(tensors, tables.layer_numbers[::3], strict=True):
        if tensor is None:
            continue
        fits = tensor.dtype is torch.float32 and tensor.numel() == neurons and tensor.device == device
        if not fits or not tensor.is_contiguous():
            raise ValueError(
                f"one of {name} is {tensor.dtype} of shape {tuple(tensor.shape)} with strides {tensor.stride()} on "
                f"{tensor.device}; expected contiguous float32 of shape ({neurons},) on {device}"
            )


def _counters(skipped: Tensor, at: Sequence[int]) -> list[int]:
    if skipped.dtype is not torch.int64 or not skipped.is_contiguous():
        raise ValueError(f"skipped is {skipped.dtype} with strides {skipped.stride()}; expected contiguous int64")
    start, width = skipped.data_ptr(), skipped.element_size()
    return [start + width * index for index in at]


def _of_layers(
    tables: Tables,
    importances: Sequence[Tensor],
    measured: Sequence[Tensor | None],
    skipped: Tensor,
    skipped_at: Sequence[int] | None,
) -> tuple[list[int], list[int], list[int], array[int], array[float]]:
    """The arguments about layers of updates that have a rate for every neuron."""
    # Autograd accepts gradients of a sink only in its dtype and shape, and on its device.
    if not all(map(Tensor.is_contiguous, [sums for sums in measured if sums is not None])):
        _check_of_layers("measured", tables, measured, skipped.device)
    return (
        tables.importance_addresses(importances, skipped.device),
        [0 if sums is None else sums.data_ptr() for sums in measured],
        _counters(skipped, range(len(importances)) if skipped_at is None else skipped_at),
        tables.layer_numbers,
        tables.layer_options,
    )


def _raise_versions(
    tables: Tables, parameters: Sequence[Tensor], momentum_buffers: Sequence[Tensor], *others: Tensor
) -> None:
    written = [*parameters, *others]
    if tables.any_momentum:
        written += [buffer for buffer, has in zip(momentum_buffers, tables.has_momentum, strict=True) if has]
    torch.autograd.graph.increment_version(written)


def _step_addresses(tables: Tables, steps: Sequence[Tensor | None], device: torch.device) -> list[int]:
    addresses = [0 if count is None else count.data_ptr() for count in steps]
    if addresses != tables._checked.get("steps"):
        for index, count in enumerate(steps):
            if count is not None and (count.dtype is not torch.float32 or count.numel() != 1 or count.device != device):
                raise ValueError(
                    f"steps[{index}] is {count.dtype} of shape {tuple(count.shape)} on {count.device}; expected one "
                    f"float32 on {device}"
                )
        tables._checked["steps"] = addresses
    return addresses


def _flags(device: torch.device, grad_scale: Tensor | None, found_inf: Tensor | None) -> list[Tensor | None]:
    """The scale and the flag may come in any dtype and from another device; the kernels read float32 beside them."""
    if grad_scale is None and found_inf is None:
        return [None, None]
    for flag in (grad_scale, found_inf):
        if flag is not None and flag.numel() != 1:
            raise ValueError(f"grad_scale or found_inf has shape {tuple(flag.shape)}; expected one number")
    return [None if flag is None else flag.to(device, torch.float32) for flag in (grad_scale, found_inf)]


def update_(
    tables: Tables,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    importances: Sequence[Tensor],
    measured: Sequence[Tensor | None],
    skipped: Tensor,
    skipped_at: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    steps: Sequence[Tensor | None] = (),
    seeds: Sequence[int] = (),
) -> None:
    """Launches eqs. 3, 4, 7 and the weight update; see `npc_ext.ops.update_`.

    Gradients lie in memory like their parameters (`in_memory_order_of`). A layer whose `measured` is None keeps its
    average. `skipped_at` says which element of `skipped` counts for which layer; by default they run side by
    side. `steps` may be None where a parameter's are not counted.
    """
    flags = _flags(skipped.device, grad_scale, found_inf)
    _launch(
        "update",
        skipped.device,
        *_addresses(tables, parameters, gradients, momentum_buffers),
        *_of_layers(tables, importances, measured, skipped, skipped_at),
        *map(_address, flags),
        _step_addresses(tables, steps, skipped.device),
        seeds,
    )
    counted = (count for count in steps if count is not None)
    _raise_versions(tables, parameters, momentum_buffers, *importances, skipped, *counted)


def adam_update_(
    tables: AdamTables,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    steps: Sequence[Tensor],
    importances: Sequence[Tensor],
    measured: Sequence[Tensor | None],
    skipped: Tensor,
    skipped_at: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seeds: Sequence[int] = (),
) -> None:
    """Launches eqs. 3, 4, 7 and Adam's step; see `npc_ext.ops.adam_update_`, and `update_` for what is as there.

    Moments lie in memory like their parameters.
    """
    flags = _flags(skipped.device, grad_scale, found_inf)
    _launch(
        "adam_update",
        skipped.device,
        *_addresses(tables, parameters, gradients, ()),
        tables.addresses("first_moments", first_moments, parameters, compute_dtype),
        tables.addresses("second_moments", second_moments, parameters, compute_dtype),
        tables.adam_options,
        *_of_layers(tables, importances, measured, skipped, skipped_at),
        *map(_address, flags),
        _step_addresses(tables, steps, skipped.device),
        seeds,
    )
    _raise_versions(tables, parameters, (), *first_moments, *second_moments, *steps, *importances, skipped)


def anchored_update_(
    tables: AnchoredTables,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    stiffness: Sequence[Tensor | None],
    anchors: Sequence[Tensor | None],
    paths: Sequence[Tensor | None],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Launches the weight update with anchors and path integrals; see `npc_ext.ops.anchored_update_`.

    Gradients, stiffness, anchors and paths lie in memory like their parameters; None where a parameter has none.
    """
    device = parameters[0].device
    flags = _flags(device, grad_scale, found_inf)
    _launch(
        "anchored_update",
        device,
        *_addresses(tables, parameters, gradients, momentum_buffers),
        tables.addresses("stiffness", stiffness, parameters, compute_dtype),
        tables.addresses("anchors", anchors, parameters, compute_dtype),
        tables.addresses("paths", paths, parameters, compute_dtype),
        tables.anchor_options,
        tables.layer_numbers,
        tables.layer_options,
        *map(_address, flags),
    )
    _raise_versions(tables, parameters, momentum_buffers, *(path for path in paths if path is not None))


def connection_update_(
    tables: Tables,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    importances: Sequence[Tensor | None],
    skipped: Tensor,
    skipped_at: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Launches CPC's update, with an importance to every connection; see `npc_ext.ops.connection_update_`.

    Gradients and importances lie in memory like their parameters; parameters outside layers have None.
    """
    flags = _flags(skipped.device, grad_scale, found_inf)
    _launch(
        "connection_update",
        skipped.device,
        *_addresses(tables, parameters, gradients, momentum_buffers),
        tables.addresses("importances", importances, parameters, _float32),
        _counters(skipped, range(skipped.numel()) if skipped_at is None else skipped_at),
        tables.layer_numbers,
        tables.layer_options,
        *map(_address, flags),
    )
    written = [average for average in importances if average is not None]
    _raise_versions(tables, parameters, momentum_buffers, *written, skipped)


def network_step_(
    tables: Tables,
    activations: Sequence[Tensor],
    activation_gradients: Sequence[Tensor],
    channel_dim: Sequence[int],
    batch_dim: Sequence[int],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    importances: Sequence[Tensor],
    skipped: Tensor,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """The same with eq. 2 before it, still in one launch; see `npc_ext.ops.network_step_`."""
    flags = _flags(skipped.device, grad_scale, found_inf)
    inputs = [
        (
            n.data_ptr(),
            g.data_ptr(),
            DTYPES[n.dtype],
            n.shape,
            n.stride(),
            g.stride(),
            channel % n.ndim,
            batch % n.ndim,
        )
        for n, g, channel, batch in zip(activations, activation_gradients, channel_dim, batch_dim, strict=True)
    ]
    _launch(
        "network_step",
        skipped.device,
        inputs,
        *_addresses(tables, parameters, gradients, momentum_buffers),
        tables.importance_addresses(importances, skipped.device),
        _counters(skipped, range(len(importances))),
        tables.layer_numbers,
        tables.layer_options,
        *map(_address, flags),
    )
    _raise_versions(tables, parameters, momentum_buffers, *importances, skipped)
