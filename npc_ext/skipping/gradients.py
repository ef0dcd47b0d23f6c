"""A backward pass that computes the weight gradients of some rows only, and a rule for when this is faster."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._torch import is_batched
from ..neurons.kinds import CONVOLUTIONS, TRANSPOSED
from ..neurons.tap import skipped_like
from .rows import Rows

# Linear and Convolution have the same methods: what a module computes, and the two halves of its backward pass.


class Linear:
    """What `nn.Linear` computes.

    Attributes:
        neuron_dim: the dimension of the weight that counts neurons.
    """

    neuron_dim = 0

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
        return gradient.reshape(-1, weight.shape[0]).mm(weight).view(shape)

    def weight_gradient(
        self, gradient: Tensor, x: Tensor, weight: Tensor, rows: Tensor, biased: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of some rows of weight and bias; None for the bias if it is not `biased`."""
        gradient = gradient.reshape(-1, weight.shape[0]).index_select(1, rows)
        return gradient.t().mm(x.reshape(-1, weight.shape[1])), gradient.sum(0) if biased else None

    def positions(self, x: Tensor) -> int:
        """How often each weight is multiplied with an element of the input."""
        return x.numel() // max(x.shape[-1], 1)


class Convolution(NamedTuple):
    """What the convolutions of torch.nn compute: the last arguments of `torch.convolution`, in its order.

    The input is padded beforehand if the padding is not of zeros.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def neuron_dim(self) -> int:
        return 1 if self.transposed else 0

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *self)

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
        # The values of the input do not matter to its gradient, but its memory format decides which kernel runs.
        if channels_last:
            memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            stand_in = torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=memory_format)
        elif gradient.is_cpu:  # oneDNN would make a contiguous copy of an expanded tensor
            stand_in = gradient.new_empty(shape)
        else:
            stand_in = gradient.new_empty(1).expand(shape)
        backward = torch.ops.aten.convolution_backward
        return backward(gradient, stand_in, weight, None, *self, (True, False, False))[0]

    def weight_gradient(
        self, gradient: Tensor, x: Tensor, weight: Tensor, rows: Tensor, biased: bool
    ) -> tuple[Tensor, Tensor | None]:
        gradient = gradient.index_select(1, rows)
        weight = weight.narrow(self.neuron_dim, 0, len(rows))  # only its shape matters
        backward = torch.ops.aten.convolution_backward
        sizes = [gradient.shape[1]] if biased else None
        _, of_weight, of_bias = backward(gradient, x, weight, sizes, *self, (False, True, biased))
        return of_weight, of_bias

    def positions(self, x: Tensor) -> int:
        return x.numel() // max(x.shape[1], 1) // (1 if self.transposed else math.prod(self.stride))


Operation = Linear | Convolution


def operation_of(module: Any) -> Operation | str:
    """What a module computes, or the reason why its weight gradients cannot be skipped."""
    if type(module) is nn.Linear:
        return Linear()
    if type(module) not in (*CONVOLUTIONS, *TRANSPOSED):
        return f"it is of type {type(module).__name__}, not a plain Linear or convolution"
    padding = module.padding
    if module.padding_mode != "zeros" or padding == "valid":
        padding = (0,) * len(module.kernel_size)
    elif padding == "same":
        both_sides = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(size % 2 for size in both_sides):
            return "its padding is uneven (padding='same' with an even kernel)"
        padding = tuple(size // 2 for size in both_sides)
    transposed = type(module) in TRANSPOSED
    return Convolution(module.stride, padding, module.dilation, transposed, module.output_padding, module.groups)


class PartialGradient(torch.autograd.Function):
    """What a module computes, with a backward pass that computes the weight gradients of some rows only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operation: Operation,
        rows: Rows,
        note_use: Callable[[], None],
    ) -> Tensor:
        ctx.save_for_backward(x if len(rows) else None, weight if ctx.needs_input_grad[0] else None)
        ctx.operation, ctx.rows, ctx.note_use = operation, rows, note_use
        ctx.weight, ctx.bias = weight.detach(), None if bias is None else bias.detach()
        ctx.shape, ctx.channels_last = x.shape, _is_channels_last(x)
        return operation.forward(x, weight, bias)

    # Not once_differentiable: these are operations of torch, which records them with create_graph=True. The gradients
    # that were skipped are then constants.
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        operation, rows = ctx.operation, ctx.rows
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = operation.input_gradient(gradient, weight, ctx.shape, ctx.channels_last)
        of_weight = skipped_like(ctx.weight)
        biased = ctx.needs_input_grad[2]
        of_bias = skipped_like(ctx.bias) if biased else None
        if len(rows):
            part, bias_part = operation.weight_gradient(gradient, x, ctx.weight, rows.on_device, biased)
            copy = Tensor.index_copy if is_batched(gradient) else Tensor.index_copy_
            of_weight = copy(of_weight, operation.neuron_dim, rows.on_device, part)
            if of_bias is not None:
                of_bias = copy(of_bias, 0, rows.on_device, bias_part)
        ctx.note_use()
        return of_input, of_weight, of_bias, None, None, None


def _is_channels_last(x: Tensor) -> bool:
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
    return x.is_contiguous(memory_format=memory_format) and not x.is_contiguous()


# See skipping_pays. The number for GPUs is a conservative guess; it was not measured.
_LEAST_WORK = {"cpu": 24e6, "cuda": 2.0**34}


def skipping_pays(operation: Operation, x: Tensor, weight: Tensor, rows: Rows) -> bool:
    """Whether to compute the weight gradients of `rows` only. The rule is fixed, so that runs are reproducible.

    Skipping a whole layer is always faster. Computing some of the rows has a cost: dL/dy is gathered, and the result is
    scattered into a gradient of zeros, in Python. If s is the share of the rows that are skipped, it is faster if

        s^2 * (multiply-adds of the whole weight gradient) > 24e6   and   s * positions >= 128 (160 for Linear),

    as measured on a CPU (bench/results/skipping-rule). On a GPU, where it was not measured, the first bound is 2 ** 34.
    Positions are how often each weight is multiplied: there must be enough of them for each element of the gradient.

    Under `torch.use_deterministic_algorithms(True)`, only whole layers are skipped: other shapes may sum in a different
    order, and which rows are certain depends on the step from which a run was resumed.

    Args:
        operation: what the module computes.
        x: its input, with a dimension of samples.
        weight: its weight.
        rows: those that may move.
    """
    if x.device.type not in _LEAST_WORK:
        return False
    if len(rows) == 0:
        return True
    if torch.are_deterministic_algorithms_enabled():
        return False
    share, positions = rows.share_skipped(), operation.positions(x)
    least_positions = 160 if isinstance(operation, Linear) else 128
    work = weight.numel() * positions
    return share**2 * work > _LEAST_WORK[x.device.type] and share * positions >= least_positions
