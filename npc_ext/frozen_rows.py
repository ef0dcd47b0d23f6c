"""Backward passes that leave out the weight gradients of neurons which are certain not to move.

A neuron's incoming weights are a row of its layer's weight (of a transposed convolution, a column). Where a certificate
(certificate.py) says that some rows cannot change in the coming step, the others' part of dL/dy is gathered, their
weight gradient is computed from it, and put into a gradient of zeros:

    dL/dW[rows] = weight gradient of (x, dL/dy[:, rows]),   dL/dW elsewhere 0.

dL/dx is computed as ever, so everything upstream, importance included, sees no difference. Where no row can change,
nothing is computed, and x is not kept for it (the tap of the layer before may keep it); if x requires no gradient,
back-propagation even ends at the layer's tap (resting.py). Whether that is faster than
computing everything (gathering takes time, and so does Python) is measured once for each kind of layer and input. On a
GPU the CPU waits for that: 12 forward and backward passes of the layer, in the first step that would leave rows out.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from ._torch import reversed_padding
from .tap import StandIn, left_out_like

if TYPE_CHECKING:
    from .certificate import Watch

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FEWEST_ROWS = 16
_BUCKETS = 8
_TIMINGS = 5


class Rows:
    """The rows of a layer's weight whose gradients are computed.

    Attributes:
        on_cpu: (r,) int64, ascending.
        on_device: the same, where the layer is.
        pays: whether computing these rows only is faster than computing all, by the kind of input.
    """

    def __init__(self, on_cpu: Tensor, neurons: int, device: torch.device) -> None:
        self.on_cpu, self.neurons = on_cpu, neurons
        pinned = device.type == "cuda" and len(on_cpu) > 0  # so that the CPU does not wait
        self.on_device = on_cpu.pin_memory().to(device, non_blocking=True) if pinned else on_cpu.to(device)
        self.pays: dict[Any, bool] = {}

    def __len__(self) -> int:
        return len(self.on_cpu)

    def left_out(self) -> Tensor:
        """(N,) bool on the CPU: the rows whose gradients are not computed."""
        return torch.ones(self.neurons, dtype=torch.bool, device="cpu").index_fill_(0, self.on_cpu, False)

    def share_left_out(self) -> float:
        """The share of rows whose gradients are not computed."""
        return 1 - len(self) / self.neurons


def rows_to_compute(certain: Tensor, all_or_nothing: bool) -> Tensor | None:
    """Which rows' gradients to compute when those of `certain` need not be; None for all.

    Their number is rounded up to a multiple of an eighth of the layer, and of 16 at least: so there are few shapes, and
    such as the libraries are fast for. Some certain rows fill it up.

    Args:
        certain: (N,) bool, on the CPU.
        all_or_nothing: whether a part of the rows cannot be computed alone.
    """
    moving = certain.logical_not().nonzero().flatten()
    if len(moving) == 0:
        return moving
    neurons = len(certain)
    step = max(_FEWEST_ROWS, -(-neurons // _BUCKETS))
    count = -(-len(moving) // step) * step
    if all_or_nothing or count >= neurons:
        return None
    filling = certain.nonzero().flatten()[: count - len(moving)]
    return torch.cat([moving, filling]).sort().values


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
class _Convolution:
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


def _operation_of(module: Any) -> _Operation | str:
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
    return _Convolution(module.stride, padding, module.dilation, transposed, module.output_padding, module.groups)


class _PartialGradient(torch.autograd.Function):
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
    key = (*layer, *_kind_of(x), x.device, threads)
    if key not in _measured:
        with ExitStack() as stack:
            try:  # a checkpoint's hooks must not see this
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_itself, _itself))
            except RuntimeError:  # somebody has disabled such hooks
                return None
            _measured[key] = _is_faster(operation, x, weight, bias, rows)
    return _measured[key]


def _kind_of(x: Tensor) -> tuple[Any, ...]:
    """What a verdict depends on. Sizes count up to a factor of 2, so that inputs of many lengths are not all timed."""
    return x.numel().bit_length(), x.is_contiguous(), x.dtype, x.requires_grad


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _is_faster(operation: _Operation, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows) -> bool:
    """Times forward and backward passes, whose gradients go nowhere; waits for the GPU after each."""
    inputs = [None if one is None else one.detach().requires_grad_(one.requires_grad) for one in (x, weight, bias)]
    wanted = [one for one in inputs if one is not None and one.requires_grad]

    def in_part() -> Tensor:
        return _PartialGradient.apply(*inputs, operation, rows, lambda: None)

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


# -------------------------------------------------------------------------------------------------------- the forward


class PartialForward(StandIn):
    """Its `__call__` stands in for `module.forward`, as the module's attribute of that name; picklable with the model.

    It calls the class's own `forward` unless a certificate is in force for the coming step, and gradients are to flow.
    """

    def __init__(self, module: nn.Module) -> None:
        operation = _operation_of(module)
        if isinstance(operation, str):
            raise ValueError(f"the weight gradients of {module} cannot be left out: {operation}")
        super().__init__(module)
        self.all_or_nothing = isinstance(operation, _Convolution) and operation.groups > 1
        self._watch: weakref.ReferenceType[Watch] | None = None
        self._users: set[weakref.ReferenceType[Watch]] = set()

    @classmethod
    def placed_in(cls, module: nn.Module) -> PartialForward:
        """The one in a module, put there if it is not yet; it stays until all who `join` it have left.

        Raises:
            ValueError: `why_not` has an objection to the module.
        """
        forward = StandIn.of(module)
        if not isinstance(forward, cls):
            forward = cls(module)
            forward._enter()
        return forward

    @property
    def bias(self) -> nn.Parameter | None:
        """The module's bias at this moment."""
        bias: nn.Parameter | None = self._module.bias
        return bias

    def join(self, watch: Watch) -> None:
        """Notes that an optimizer looks at the module; may be called again."""
        self._users.add(weakref.ref(watch))

    def leave(self, watch: Watch) -> None:
        """Takes itself out of the module, if it is still there and no other optimizer looks at that."""
        self.release(watch)
        self._users.discard(weakref.ref(watch))
        if not self._users:
            self._exit()

    def is_shared(self) -> bool:
        """Whether several optimizers look at the module: another one may want to measure what requires a gradient."""
        return len(self._users) > 1

    def follow(self, watch: Watch) -> None:
        """From now on obeys the certificates of `watch`, as long as that is alive: the last optimizer that issued."""
        self._watch = weakref.ref(watch)

    def release(self, watch: Watch) -> None:
        """Obeys nobody's certificates if it was `watch` whose it obeyed."""
        if self.obeys(watch):
            self._watch = None

    def obeys(self, watch: Watch) -> bool:
        """Whether it is `watch` whose certificates count."""
        return self._watch is not None and self._watch() is watch

    def __call__(self, input: Tensor, *arguments: Any, **options: Any) -> Tensor:
        # The first comes first: torch.compile must not depend on what changes from step to step.
        if torch.compiler.is_compiling() or self._watch is None or arguments or options:
            return self._usual(self._module, input, *arguments, **options)
        return self._partial(input, self._watch())

    def _partial(self, x: Tensor, watch: Watch | None) -> Tensor:
        module = self._module
        if watch is None:  # its optimizer is gone
            self._watch = None
            return self._usual(module, x)
        weight, bias = module.weight, module.bias
        if (
            not (module.training and torch.is_grad_enabled() and weight.requires_grad)
            or weight is not watch.weight  # as torch.func.functional_call has it
            or bias is not watch.bias
            or x.layout is not torch.strided
            or x.is_nested
            or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            return self._usual(module, x)
        certificate = watch.in_force()
        if certificate is None:
            return self._usual(module, x)
        operation, original = _operation_of(module), x  # strides and paddings may have changed
        if isinstance(operation, str):
            return self._usual(module, x)
        if torch.is_autocast_enabled(x.device.type):
            x, weight, bias = _as_autocast_would(x, weight, bias)
        if isinstance(operation, _Convolution):
            if x.ndim == weight.ndim - 1:  # a single sample
                return self._partial(original.unsqueeze(0), watch).squeeze(0)
            if module.padding_mode != "zeros":
                x = F.pad(x, reversed_padding(module), mode=module.padding_mode)
        if watch.is_constant(certificate, x):
            return operation.forward(x, weight.detach(), None if bias is None else bias.detach())
        rows, kind = certificate.rows, _kind_of(x)
        decided = rows.pays.get(kind)
        if decided is None:
            decided = pays(operation, x, weight, bias, rows)
            if decided is not None:
                rows.pays[kind] = decided
        if not decided:
            return self._usual(module, original)
        return _PartialGradient.apply(x, weight, bias, operation, rows, watch.note_use_of(certificate))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watch": None, "_users": set()}  # a copy's optimizer joins again


def _as_autocast_would(*tensors: Tensor | None) -> list[Any]:
    """Casts floating-point tensors to autocast's dtype, apart from float64."""
    return [
        tensor
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64
        else tensor.to(torch.get_autocast_dtype(tensor.device.type))
        for tensor in tensors
    ]


def why_not(module: nn.Module, trained: set[int]) -> str:
    """Why a module's weight gradients are always computed in full; empty if they need not be.

    Args:
        module: a weighted module.
        trained: the ids of the parameters that the optimizer trains.
    """
    operation = _operation_of(module)
    if isinstance(operation, str):
        return operation
    if is_parametrized(module):
        return "its weight is computed from other parameters (a parametrization)"
    if "forward" in module.__dict__ and type(StandIn.of(module)) is not PartialForward:
        return "its forward has been replaced by somebody else"
    if any(id(p) not in trained for p in module.parameters(recurse=False)):
        return "a part of its parameters is not trained by this optimizer"
    return ""
