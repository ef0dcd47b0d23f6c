"""The tap inside `nn.MultiheadAttention`, which measures the neurons of the input projection.

The module projects its inputs to queries, keys and values, n = x W^T + b, in the middle of its forward pass. No module
begins or ends there, so hooks cannot reach them. Therefore, the forward pass is replaced by torch's code with one
change: the functions that compute the projection return tapped tensors. Masks, dropout, attention weights and all other
options work as in torch.

In torch's code, positions come first and samples second, with and without `batch_first`. A single sample is a batch of
one.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._torch import INPUT_PROJECTIONS
from .layer import NeuronLayer
from .stand_in import Handle, StandIn
from .tap import TapHook, can_measure, check_device, drop_cleared_importance, like

_Projected = tuple[Tensor, Tensor, Tensor]


class _Tap(torch.autograd.Function):
    """Returns queries, keys and values. The gradient of the sink is the importance of their neurons, in this order."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sink: Tensor, layer: NeuronLayer, batch_dim: int
    ) -> _Projected:
        ctx.save_for_backward(query, key, value)
        ctx.layer, ctx.batch_dim = layer, batch_dim
        return query.view_as(query), key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if not can_measure(*gradients):
            return *gradients, None, None, None
        if not torch.compiler.is_compiling():
            drop_cleared_importance(ctx.layer)
        pairs = zip(ctx.saved_tensors, gradients, strict=True)
        parts = [ctx.layer.measure(like(gradient, n), gradient, 2, ctx.batch_dim) for n, gradient in pairs]
        return *gradients, torch.cat(parts).to(torch.float32), None, None


class AttentionForward(StandIn):
    """Replaces the `forward` of a MultiheadAttention. Can be pickled with the module.

    It calls the `forward` of the class unless the module is training.
    """

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__(module)
        self._measured = self._tapped_forward()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self._users or not self._module.training or not torch.is_grad_enabled():
            return self._usual(self._module, *arguments, **options)
        return self._measured(self._module, *arguments, **options)

    def _tapped_forward(self) -> Callable[..., Any]:
        projections = {name: self._tapped(getattr(F, name)) for name in INPUT_PROJECTIONS}
        attention = _with_globals(F.multi_head_attention_forward, **projections)
        functional = SimpleNamespace(**{**_used(self._usual, vars(F)), "multi_head_attention_forward": attention})
        return _with_globals(self._usual, F=functional)

    def _tapped(self, project: Callable[..., _Projected]) -> Callable[..., _Projected]:
        def tapped(*arguments: Any) -> _Projected:
            query, key, value = project(*arguments)
            for hook in self._users:  # the taps of each optimizer of the model
                if hook.measures(query) or hook.measures(key) or hook.measures(value):
                    check_device(query, hook.layer)
                    batch_dim = hook.point.batch_dim
                    if self._module.batch_first:  # the module has swapped the first two dimensions
                        batch_dim = 1 - batch_dim
                    query, key, value = _Tap.apply(query, key, value, hook.layer.sink, hook.layer, batch_dim)
            return query, key, value

        return tapped

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_measured"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._measured = self._tapped_forward()


def tap_projection(module: Any, tap: TapHook) -> Handle:
    """Places the tap in a module's input projection. The returned handle's `remove()` removes it.

    Raises:
        ValueError: it cannot be measured; `why_not` returns the reason.
    """
    if reason := why_not(module):
        raise ValueError(f"the input projection of {module} cannot be measured: {reason}")
    forward: AttentionForward = StandIn.of(module) or AttentionForward(module)
    return forward.join(tap)


def why_not(module: nn.MultiheadAttention) -> str:
    """The reason why a module's input projection cannot be measured; empty if it can."""
    if type(module).forward is not nn.MultiheadAttention.forward:
        return "its class has a forward of its own"
    if "forward" in module.__dict__ and not isinstance(StandIn.of(module), AttentionForward):
        return "its forward has been replaced by other code"
    known = set(_names(F.multi_head_attention_forward.__code__))
    if not known.issuperset(INPUT_PROJECTIONS) or "F" not in _names(nn.MultiheadAttention.forward.__code__):
        return f"torch {torch.__version__} computes it in an unknown way"
    return ""


def _with_globals(function: Any, **replaced: Any) -> Any:
    """A copy of a function in which some global names have other values."""
    names = {"__builtins__": vars(builtins), **_used(function, function.__globals__), **replaced}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _used(function: Any, names: dict[str, Any]) -> dict[str, Any]:
    """The names that a function may use."""
    return {name: names[name] for name in _names(function.__code__) if name in names}


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a comprehension's, for example
            yield from _names(constant)
