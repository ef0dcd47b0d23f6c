"""Lazy measuring: layers that are certified wholly sleep, and are measured now and then. An approximation.

A layer whose neurons are all certain not to move (certificate.py) needs its importance only to know when that will
change. So it is measured in every k-th step only, with eq. 4 taken k steps at once,

    C <- delta ** k * C + (1 - delta ** k) c,

as if the k - 1 measurements in between had given the same. In between it is asleep while the model is called
(calls.py): its weights count as constants (resting.py), its taps are off, and so back-propagation ends at the first
layer that can still move. What lies before costs its forward pass alone and keeps no activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._torch import tree_leaves, tree_map_only
from .neurons import NeuronLayer
from .tap import Unscriptable


class Anchor(Unscriptable):
    """Forward hook of the whole model: if all that ran is asleep, what it returns still requires a gradient.

    So loss.backward() works, and one parameter receives a gradient (of zeros), as GradScaler wants.
    """

    def __init__(self, layers: Sequence[NeuronLayer]) -> None:
        self._layers = layers

    def __call__(self, model: nn.Module, inputs: Any, output: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        asleep = [layer for layer in self._layers if layer.asleep]
        tensors = [one for one in tree_leaves(output) if isinstance(one, Tensor)]
        if not asleep or any(one.requires_grad for one in tensors):
            return None
        parameter = min((layer.parameters[0].parameter for layer in asleep), key=Tensor.numel)
        return tree_map_only(Tensor, lambda one: _anchored(one, parameter), output)


def _anchored(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    return _Anchored.apply(tensor, parameter) if tensor.is_floating_point() else tensor


class _Anchored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter.detach()
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, torch.zeros_like(ctx.parameter)


def let_sleep(model: nn.Module, layers: Sequence[NeuronLayer]) -> Any:
    """Prepares a model for layers that are asleep at times; returns a handle that undoes it by `remove()`."""
    return model.register_forward_hook(Anchor(layers))
