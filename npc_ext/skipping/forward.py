"""Replaces the forward pass of a module to skip some weight gradients in its backward pass.

A neuron's incoming weights are a row of its layer's weight (a column, for transposed convolutions). An optimizer can be
certain that some rows do not move in the next step (certificate.py). `PartialForward` replaces a module's `forward`. In
each call, it asks which weight gradients the next step needs, and computes only those:

    dL/dW[rows] = weight gradient of (x, dL/dy[:, rows]),   dL/dW elsewhere 0.

dL/dx is computed as usual, so everything upstream, including importance, stays the same. If no row can move, the module
computes no weight gradient and does not keep x for it. If x requires no gradient either, back-propagation can end at
the point where the layer is measured (constants.py).

If only some rows can move, `skipping_pays` (gradients.py) decides whether to compute those rows separately.
Everything is computed as usual in eval mode, without gradients, under torch.compile, while a CUDA graph is captured,
under torch.func, and for sparse or nested input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from .._torch import is_transformed, reversed_padding
from ..neurons.stand_in import StandIn
from .gradients import Convolution, PartialGradient, operation_of, skipping_pays
from .rows import Rows


@dataclass(frozen=True)
class Decision:
    """Which weight gradients of one call are skipped.

    Attributes:
        rows: the rows whose gradients are needed; all others may be skipped.
        constants: whether the module's parameters are constants in this call (constants.py).
        note_use: called by the backward pass if it skips gradients.
    """

    rows: Rows
    constants: bool
    note_use: Callable[[], None]


class Decider(Protocol):
    """Knows which rows of a module's weight can move in the next step."""

    def decide(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Decision | None:
        """Decides for a call with this input and these parameters; None if every gradient may be needed."""


class PartialForward(StandIn):
    """Replaces a module's `forward` by its `__call__`, for all optimizers of the model. Can be pickled with the module.

    If there are several optimizers, it asks the one that issued a certificate last.

    Args:
        module: a Linear or convolution.

    Attributes:
        whole_only: whether gradients can only be skipped for all neurons or none.
        decider: the user that is asked; None if every gradient is computed.

    Raises:
        ValueError: the module is of another kind.
    """

    def __init__(self, module: nn.Module) -> None:
        operation = operation_of(module)
        if isinstance(operation, str):
            raise ValueError(f"the weight gradients of {module} cannot be skipped: {operation}")
        super().__init__(module)
        self.whole_only = isinstance(operation, Convolution) and operation.groups > 1
        self.decider: Decider | None = None

    @classmethod
    def of_module(cls, module: nn.Module) -> PartialForward:
        """The one that replaces a module's forward, or a new one, which `join` places there."""
        forward = StandIn.of(module)
        return forward if isinstance(forward, cls) else cls(module)

    def rejoin(self, decider: Decider) -> None:
        """Adds a user that a copy of the module has lost."""
        if decider not in self._users:
            self._users.append(decider)

    def leave(self, user: Decider) -> None:
        """Removes a user. With the last one, removes the stand-in from the module, if it is still there."""
        self.release(user)
        super().leave(user)

    def is_shared(self) -> bool:
        """Whether several optimizers use it. Another one may measure what requires a gradient."""
        return len(self._users) > 1

    def release(self, decider: Decider) -> None:
        """Stops asking `decider`."""
        if self.decider is decider:
            self.decider = None

    def __call__(self, input: Tensor, *arguments: Any, **options: Any) -> Tensor:
        # is_compiling() comes first: compiled code must not depend on what changes from step to step.
        if torch.compiler.is_compiling() or self.decider is None or arguments or options:
            return self._usual(self._module, input, *arguments, **options)
        return self._decided(input, self.decider)

    def _decided(self, x: Tensor, decider: Decider) -> Tensor:
        module = self._module
        weight, bias = module.weight, module.bias
        operation = operation_of(module)  # strides and paddings may have changed
        if (
            isinstance(operation, str)
            or not (module.training and torch.is_grad_enabled() and weight.requires_grad)
            or x.layout is not torch.strided
            or x.is_nested
            or is_transformed()
            or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            return self._usual(module, x)
        if isinstance(operation, Convolution) and x.ndim == weight.ndim - 1:  # a single sample
            return self._decided(x.unsqueeze(0), decider).squeeze(0)
        decision = decider.decide(x, weight, bias)
        if decision is None or not (decision.constants or skipping_pays(operation, x, weight, decision.rows)):
            return self._usual(module, x)
        if torch.is_autocast_enabled(x.device.type):
            x, weight, bias = _as_autocast_would(x, weight, bias)
        if isinstance(operation, Convolution) and module.padding_mode != "zeros":
            x = F.pad(x, reversed_padding(module), mode=module.padding_mode)
        if decision.constants:
            return operation.forward(x, weight.detach(), None if bias is None else bias.detach())
        return PartialGradient.apply(x, weight, bias, operation, decision.rows, decision.note_use)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "decider": None, "_users": []}  # a copy's optimizer joins again


def _as_autocast_would(*tensors: Tensor | None) -> list[Any]:
    """Casts floating-point tensors to autocast's dtype, apart from float64."""
    return [
        tensor
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64
        else tensor.to(torch.get_autocast_dtype(tensor.device.type))
        for tensor in tensors
    ]


def why_not(module: nn.Module, trained: Collection[int]) -> str:
    """The reason why a module's weight gradients are always computed in full; empty if they need not be.

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
        return "its forward has been replaced by other code"
    if any(id(p) not in trained for p in module.parameters(recurse=False)):
        return "some of its parameters are not trained by this optimizer"
    return ""
