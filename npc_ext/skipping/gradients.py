"""Backward passes that compute the weight gradients of some rows only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..neurons.tap import left_out_like
from .rows import Rows

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TIMINGS = 5


# --------------------------------------------------------------------------------------------------------- operations


class _Operation(Protocol):
    """What a weighted module computes, and the two halves of its backward pass."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size, channels_last: bool) -> Tensor: ...

    def weight_gradient(
        self, gradient: Tensor, x: Tensor, weight: Tensor, rows: Tensor | None, biased: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of weight and bias, of `rows` only or of all."""
        ...

    @property
    def neuron_dim(self) -> int:
        """The dimension of the weight that counts neurons."""
        ...


@dataclass(frozen=True)
class _Linear:
    neuron_dim = 0

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
        return gradient.reshape(-1, weight.shape[0]).mm(weight).view(shape)

    def weight_gradient(
        self, gradient: Tensor, x: Tensor, weight: Tensor, rows: Tensor | None, biased: bool
    ) -> tuple[Tensor, Tensor | None]:
        gradient = gradient.reshape(-1, weight.shape[0])
        if rows is not None:
            gradient = gradient.index_select(1, rows)
        return gradient.t().mm(x.reshape(-1, weight.shape[1])), gradient.sum(0) if biased else None


@dataclass(frozen=True)
class Convolution:
    """Any convolution of torch.nn, its input padded already where the padding is not of zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def neuron_dim(self) -> int:
        return 1 if self.transposed else 0

    def _geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *self._geometry())

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
        # The input's values do not matter to its gradient, but its memory format does to the choice of a kernel.
        if channels_last:
            memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            stand_in = torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=memory_format)
        elif gradient.is_cpu:  # where oneDNN would make a contiguous copy of what is not
            stand_in = gradient.new_empty(shape)
        else:
            stand_in = gradient.new_empty(1).expand(shape)
        backward = torch.ops.aten.convolution_backward
        return backward(gradient, stand_in, weight, None, *self._geometry(), (True, False, False))[0]

    def weight_gradient(
        self, gradient: Tensor, x: Tensor, weight: Tensor, rows: Tensor | None, biased: bool
    ) -> tuple[Tensor, Tensor | None]:
        if rows is not None:
            gradient = gradient.index_select(1, rows)
            weight = weight.narrow(self.neuron_dim, 0, len(rows))  # its shape counts, not its values
        backward = torch.ops.aten.convolution_backward
        sizes = [gradient.shape[1]] if biased else None
        _, of_weight, of_bias = backward(gradient, x, weight, sizes, *self._geometry(), (False, True, biased))
        return of_weight, of_bias


def operation_of(module: Any) -> _Operation | str:
    """What a module computes, or why its weight gradients cannot be left out."""
    if type(module) is nn.Linear:
        return _Linear()
    if type(module) not in (*_CONVOLUTIONS, *_TRANSPOSED):
        return f"it is a {type(module).__name__}, no plain Linear or convolution"
    padding = module.padding
    if module.padding_mode != "zeros" or padding == "valid":
        padding = (0,) * len(module.kernel_size)
    elif padding == "same":
        whole = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(one % 2 for one in whole):
            return "its padding is uneven (padding='same' with an even kernel)"
        padding = tuple(one // 2 for one in whole)
    transposed = type(module) in _TRANSPOSED
    return Convolution(module.stride, padding, module.dilation, transposed, module.output_padding, module.groups)


class PartialGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operation: _Operation,
        rows: Rows,
        note_use: Callable[[], None],
    ) -> Tensor:
        ctx.save_for_backward(x if len(rows) else None, weight if ctx.needs_input_grad[0] else None)
        ctx.operation, ctx.rows, ctx.note_use = operation, rows, note_use
        ctx.weight, ctx.bias = weight.detach(), None if bias is None else bias.detach()
        ctx.shape, ctx.channels_last = x.shape, _is_channels_last(x)
        return operation.forward(x, weight, bias)

    # Not once_differentiable: these are operations of torch, which records them where create_graph asks for it. What
    # was left out is a constant then.
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        operation, rows = ctx.operation, ctx.rows
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = operation.input_gradient(gradient, weight, ctx.shape, ctx.channels_last)
        of_weight = left_out_like(ctx.weight)
        biased = ctx.needs_input_grad[2]
        of_bias = left_out_like(ctx.bias) if biased else None
        if len(rows):
            part, bias_part = operation.weight_gradient(gradient, x, ctx.weight, rows.on_device, biased)
            of_weight.index_copy_(operation.neuron_dim, rows.on_device, part)
            if of_bias is not None:
                of_bias.index_copy_(0, rows.on_device, bias_part)
        ctx.note_use()
        return of_input, of_weight, of_bias, None, None, None


def _is_channels_last(x: Tensor) -> bool:
    if x.ndim == 4:
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if x.ndim == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return False


# ------------------------------------------------------------------------------------------------------- does it pay?

_measured: dict[Any, bool] = {}


def pays(operation: _Operation, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows) -> bool | None:
    """Whether a layer is faster that computes the gradients of `rows` only, by measuring it once in a process.

    Measuring waits for the GPU.

    None where it cannot be measured at this moment.

    Where the user asked for deterministic algorithms, only whole layers are left out: parts may change the order of
    summation, and so the last bits, by a clock's verdict and by when a run was resumed.
    """
    if len(rows) > 0 and torch.are_deterministic_algorithms_enabled():
        return False
    if x.device.type not in ("cpu", "cuda"):  # a clock that does not wait for the device measures nothing
        return False
    threads = torch.get_num_threads() if x.device.type == "cpu" else 0
    layer = (operation, weight.shape, weight.stride(), bias is None, len(rows))
    key = (*layer, *kind_of(x), x.device, threads)
    if key not in _measured:
        with ExitStack() as stack:
            try:  # a checkpoint's hooks must not see this
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_itself, _itself))
            except RuntimeError:  # somebody has disabled such hooks
                return None
            _measured[key] = _is_faster(operation, x, weight, bias, rows)
    return _measured[key]


def kind_of(x: Tensor) -> tuple[Any, ...]:
    """What a verdict depends on. Sizes count up to a factor of 2, so that inputs of many lengths are not all timed."""
    return x.numel().bit_length(), x.is_contiguous(), x.dtype, x.requires_grad


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _is_faster(operation: _Operation, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows) -> bool:
    """Times forward and backward passes, whose gradients go nowhere; waits for the GPU after each."""
    inputs = [None if one is None else one.detach().requires_grad_(one.requires_grad) for one in (x, weight, bias)]
    wanted = [one for one in inputs if one is not None and one.requires_grad]

    def in_part() -> Tensor:
        return PartialGradient.apply(*inputs, operation, rows, lambda: None)

    def in_full() -> Tensor:
        return operation.forward(*inputs)  # type: ignore[arg-type]

    # The first call warms up; of the others the fastest counts, because disturbances only ever add.
    seconds: dict[Callable[[], Tensor], float] = {in_part: math.inf, in_full: math.inf}
    for turn in range(_TIMINGS + 1):
        for function in seconds:
            started = time.perf_counter()
            output = function()
            # The output has its gradient's shape, and takes nothing from the random generator.
            torch.autograd.grad(output, wanted, output.detach())
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            if turn > 0:
                seconds[function] = min(seconds[function], time.perf_counter() - started)
    return seconds[in_part] < seconds[in_full]
