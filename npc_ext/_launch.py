"""Where tensors become addresses: the only module that knows both torch and the compiled kernels.

Every tensor is held by its caller until the launch has returned, and every tensor that a launch writes gets its
version counter raised, so that autograd notices. Callers (npc_ext.ops) have checked shapes; what is checked here is
what the kernels themselves assume: device, dtype and memory layout.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import _native
from .reference import compute_dtype

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def supports(tensor: Tensor) -> bool:
    """Whether the compiled kernels take this tensor: on the CPU, in one of four dtypes, dense."""
    return tensor.is_cpu and tensor.dtype in DTYPES and not tensor.is_sparse


def importance(activation: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0) -> Tensor:
    """Launches eq. 2; see `npc_ext.ops.importance`."""
    shape = activation.shape
    out = torch.empty(shape[channel_dim], dtype=compute_dtype(activation.dtype))
    if activation.numel() == 0:
        return out.zero_()
    _native.module().importance(
        activation.data_ptr(),
        gradient.data_ptr(),
        out.data_ptr(),
        DTYPES[activation.dtype],
        shape,
        activation.stride(),
        gradient.stride(),
        channel_dim % len(shape),
        batch_dim % len(shape),
        torch.get_num_threads(),
    )
    return out


@lru_cache(maxsize=4096)
def geometry(
    shape: tuple[int, ...], stride: tuple[int, ...], neuron_dim: int, groups: int
) -> tuple[int, int, int]:
    """How a parameter's memory falls into runs of one neuron each: (outer, middle, run), as csrc/api.h defines them.

    Raises ValueError for memory with gaps or overlaps, and for groups that are not outermost in memory.
    """
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
    return torch.empty_like(parameter, requires_grad=False).copy_(tensor)


class Network:
    """The tables and addresses of one `update_` call; building it checks everything, launching it changes things."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        momentum_buffers: Sequence[Tensor],
        importances: Sequence[Tensor],
        skipped: Tensor,
        layer: Sequence[int],
        neuron_dim: Sequence[int],
        groups: Sequence[int],
        lr: Sequence[float],
        momentum: Sequence[float],
        nesterov: Sequence[bool],
        weight_decay: Sequence[float],
        maximize: Sequence[bool],
        alpha: Sequence[float],
        beta: Sequence[float],
        delta: Sequence[float],
        sigma: Sequence[str],
        active_only: Sequence[bool],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        numbers, options = array("q"), array("d")
        self.written = [*parameters, *importances, skipped]
        # A gradient in another memory order is copied; the copies live as long as this object.
        self.gradients = [in_memory_order_of(p, g) for p, g in zip(parameters, gradients, strict=True)]
        momentum_addresses = []
        for index, parameter in enumerate(parameters):
            size = parameter.numel()
            place = (1, 1, size)
            if layer[index] >= 0:
                place = geometry(parameter.shape, parameter.stride(), neuron_dim[index], groups[index])
            elif not parameter.is_contiguous():
                geometry(parameter.shape, parameter.stride(), 0, 1)
            numbers.extend(
                (DTYPES[parameter.dtype], size, *place, layer[index], nesterov[index], maximize[index])
            )
            options.extend((lr[index], momentum[index], weight_decay[index]))
            if momentum[index] == 0:
                momentum_addresses.append(0)
                continue
            buffer = momentum_buffers[index]
            if buffer.stride() != parameter.stride():
                raise ValueError(
                    f"momentum buffer {index} has strides {buffer.stride()}, but its parameter has "
                    f"{parameter.stride()}; they must lie in memory alike"
                )
            momentum_addresses.append(buffer.data_ptr())
            self.written.append(buffer)
        layer_numbers, layer_options = array("q"), array("d")
        for index, average in enumerate(importances):
            layer_numbers.extend((average.numel(), sigma[index] == "erf", active_only[index]))
            layer_options.extend((alpha[index], beta[index], delta[index]))
        # The scale and the flag may come in any dtype; the kernels read float32.
        self.flags = [None if flag is None else flag.to(torch.float32) for flag in (grad_scale, found_inf)]
        self.addresses = (
            [parameter.data_ptr() for parameter in parameters],
            [gradient.data_ptr() for gradient in self.gradients],
            momentum_addresses,
            numbers,
            options,
            [average.data_ptr() for average in importances],
        )
        self.constants = (
            skipped.data_ptr(),
            layer_numbers,
            layer_options,
            *(0 if flag is None else flag.data_ptr() for flag in self.flags),
        )

    def update(self, measured: Sequence[Tensor]) -> None:
        """Eqs. 3, 4, 7 and the weight update in one launch."""
        sums = [tensor.data_ptr() if tensor.numel() else 0 for tensor in measured]
        _native.module().update(*self.addresses, sums, *self.constants, torch.get_num_threads())
        torch.autograd.graph.increment_version(self.written)

    def step(
        self,
        activations: Sequence[Tensor],
        activation_gradients: Sequence[Tensor],
        channel_dim: Sequence[int],
        batch_dim: Sequence[int],
    ) -> None:
        """The same with eq. 2 before it, still in one launch."""
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
            for n, g, channel, batch in zip(
                activations, activation_gradients, channel_dim, batch_dim, strict=True
            )
        ]
        _native.module().network_step(inputs, *self.addresses, *self.constants, torch.get_num_threads())
        torch.autograd.graph.increment_version(self.written)
