"""Backward passes that leave out the weight gradients of neurons which are certain not to move.

A neuron's incoming weights are a row of its layer's weight (of a transposed convolution, a column). Where a certificate
(certificate.py) says that some rows cannot change in the coming step, the others' part of dL/dy is gathered, their
weight gradient is computed from it, and put into a gradient of zeros:

    dL/dW[rows] = weight gradient of (x, dL/dy[:, rows]),   dL/dW elsewhere 0.

dL/dx is computed as ever, so everything upstream, importance included, sees no difference. Where no row can change,
nothing is computed, and x is not kept for it (the tap of the layer before may keep it); if x requires no gradient,
back-propagation even ends at the layer's tap (constants.py). Whether that is faster than
computing everything (gathering takes time, and so does Python) is measured once for each kind of layer and input. On a
GPU the CPU waits for that: 12 forward and backward passes of the layer, in the first step that would leave rows out.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from .._torch import reversed_padding
from ..neurons.tap import StandIn
from .gradients import Convolution, PartialGradient, kind_of, operation_of, pays

if TYPE_CHECKING:
    from .certificate import Watch


# -------------------------------------------------------------------------------------------------------- the forward


class PartialForward(StandIn):
    """Its `__call__` stands in for `module.forward`, as the module's attribute of that name; picklable with the model.

    It calls the class's own `forward` unless a certificate is in force for the coming step, and gradients are to flow.
    """

    def __init__(self, module: nn.Module) -> None:
        operation = operation_of(module)
        if isinstance(operation, str):
            raise ValueError(f"the weight gradients of {module} cannot be left out: {operation}")
        super().__init__(module)
        self.all_or_nothing = isinstance(operation, Convolution) and operation.groups > 1
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
        operation, original = operation_of(module), x  # strides and paddings may have changed
        if isinstance(operation, str):
            return self._usual(module, x)
        if torch.is_autocast_enabled(x.device.type):
            x, weight, bias = _as_autocast_would(x, weight, bias)
        if isinstance(operation, Convolution):
            if x.ndim == weight.ndim - 1:  # a single sample
                return self._partial(original.unsqueeze(0), watch).squeeze(0)
            if module.padding_mode != "zeros":
                x = F.pad(x, reversed_padding(module), mode=module.padding_mode)
        if watch.is_constant(certificate, x):
            return operation.forward(x, weight.detach(), None if bias is None else bias.detach())
        rows, kind = certificate.rows, kind_of(x)
        decided = rows.pays.get(kind)
        if decided is None:
            decided = pays(operation, x, weight, bias, rows)
            if decided is not None:
                rows.pays[kind] = decided
        if not decided:
            return self._usual(module, original)
        return PartialGradient.apply(x, weight, bias, operation, rows, watch.note_use_of(certificate))

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
    operation = operation_of(module)
    if isinstance(operation, str):
        return operation
    if is_parametrized(module):
        return "its weight is computed from other parameters (a parametrization)"
    if "forward" in module.__dict__ and type(StandIn.of(module)) is not PartialForward:
        return "its forward has been replaced by somebody else"
    if any(id(p) not in trained for p in module.parameters(recurse=False)):
        return "a part of its parameters is not trained by this optimizer"
    return ""
