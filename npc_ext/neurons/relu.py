"""A ReLU that measures importance in its backward pass.

ReLU's backward pass reads its output y and the gradient dL/dy. The importance at its output is computed from the same
two tensors, a_i = sum over b of |sum over p of y_bip * dL/dy_bip| (eq. 2). So measuring there reads nothing twice, and
uses no memory, because y is kept for ReLU's backward pass anyway.

>>> model = nn.Sequential(nn.Linear(784, 100), npc_ext.nn.ReLU(), nn.Linear(100, 10))
>>> optimizer = NPC(model)  # measures layer "0" in module "1", without a tap
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layer import NeuronLayer, TapPoint
from .stand_in import Handle
from .tap import TapHook, can_measure, checked_dims, for_sink, like, tap


class ReLU(nn.ReLU):
    """`torch.nn.ReLU`, never in place, that can measure the importance of the layer before it.

    Optimizers use it if it follows one layer only and no operation works in place on its output
    (`print(optimizer.neurons)` then says "in its backward pass"). Otherwise, and without an optimizer, it is the same
    as `torch.nn.ReLU`.

    Input and output have any shape, (*).

    Example:
        >>> model = nn.Sequential(nn.Linear(784, 100), npc_ext.nn.ReLU(), nn.Linear(100, 10))
        >>> optimizer = NPC(model)  # measures layer "0" in module "1", without a tap
    """

    def __init__(self) -> None:
        super().__init__()
        self._taps: OrderedDict[int, TapHook] = OrderedDict()

    def attach(self, hook: TapHook) -> Handle:
        """Measures the hook's layer here until the returned handle is removed."""
        key = next(reversed(self._taps), 0) + 1
        self._taps[key] = hook
        return Handle(partial(self._detach, key, hook))

    def taps(self) -> list[TapHook]:
        """The taps of layers that are measured here."""
        return list(self._taps.values())

    def _detach(self, key: int, hook: TapHook) -> None:
        if self._taps.get(key) is hook:  # other code may have removed it, and another one may have taken its key
            del self._taps[key]  # of the current dictionary: torch.export may have replaced it by an equal one

    def forward(self, input: Tensor) -> Tensor:
        """max(input, 0)."""
        if torch.jit.is_scripting():  # it does not support taps
            return F.relu(input)
        else:
            return self._measured(input)

    def _measured(self, input: Tensor) -> Tensor:
        hooks = [hook for hook in self._taps.values() if hook.measures(input)]
        if not hooks:
            return F.relu(input)
        if hooks[0].layer.resting:  # there may be no gradients before this point
            output = F.relu(input)
        else:
            output = _relu(input, hooks[0].layer, hooks[0].point)
            hooks = hooks[1:]  # those of other optimizers
        for hook in hooks:
            output = tap(output, hook.layer, hook.point)
        return output


def _relu(input: Tensor, layer: NeuronLayer, point: TapPoint) -> Tensor:
    """max(input, 0) that measures `layer` in its backward pass. Raises the same errors as `tap`."""
    if input.ndim == point.unbatched_ndim:  # a batch of one
        return _relu(input.unsqueeze(point.missing_dim), layer, point).squeeze(point.missing_dim)
    return _MeasuredReLU.apply(input, layer.sink, layer, *checked_dims(input, layer, point))


class _MeasuredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, sink: Tensor, layer: NeuronLayer, channel_dim: int, batch_dim: int) -> Tensor:
        output = torch.relu(input)
        ctx.save_for_backward(output)
        ctx.layer, ctx.dims = layer, (channel_dim, batch_dim)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layer, output = ctx.layer, like(gradient, *ctx.saved_tensors)
        if not can_measure(gradient):
            return torch.ops.aten.threshold_backward(gradient, output, 0), None, None, None, None
        if torch.is_grad_enabled():  # create_graph=True: the gradient will be differentiated again
            output = output.detach()
            grad_input = torch.ops.aten.threshold_backward(gradient, output, 0)
            importance = layer.measure(output, gradient.detach(), *ctx.dims)
        else:
            grad_input, importance = layer.relu_backward(output, gradient, *ctx.dims)
        return grad_input, for_sink(importance, layer, output, gradient, *ctx.dims), None, None, None
