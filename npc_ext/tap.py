"""The tap: an identity in the forward pass whose backward pass measures importance.

A hook puts it behind a layer's measuring point. Its backward hands the gradient on unchanged and gives the importance
a_i = sum over b of |sum over p of n_bip * dL/dn_bip| (eq. 2) to the layer's sink, a small leaf tensor, as the sink's
gradient. So importance behaves like any gradient: autograd adds it up over micro-batches and over the calls of a
module, checkpointing and torch.compile follow it, and clearing it is clearing a gradient.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .neurons import NeuronLayer, TapPoint

# A signed sum that is smaller than this share of the sum of absolute values is rounding, not importance: float32
# products of random sign leave about 1e-7 * sqrt(count) of it, real importance leaves 1e-2 and more.
_NUMERICALLY_ZERO = 1e-4


class ImportanceWarning(UserWarning):
    """Something about the importance of a layer is not as it should be; the message names the layer."""


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, activation: Tensor, sink: Tensor, layer: NeuronLayer, channel_dim: int, batch_dim: int, copy: bool
    ) -> Tensor:
        ctx.save_for_backward(activation)
        ctx.layer, ctx.dims = layer, (channel_dim, batch_dim)
        return activation.clone() if copy else activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (activation,) = ctx.saved_tensors
        layer = ctx.layer
        if gradient.dtype != activation.dtype:
            activation = activation.to(gradient.dtype)
        importance = layer.measure(activation, gradient, *ctx.dims)
        if not torch.compiler.is_compiling() and not layer.checked:
            layer.checked = True
            _check_not_before_normalization(layer, activation, gradient, *ctx.dims)
        return gradient, importance.to(torch.float32), None, None, None, None


def tap(activation: Tensor, layer: NeuronLayer, point: TapPoint) -> Tensor:
    """Returns `activation`, or a copy of it where `point.copy`, with the measuring of `layer` in its backward pass.

    Raises:
        ValueError: the tensor does not hold the layer's neurons where the point says.
        RuntimeError: it is on another device than the layer's importance.
    """
    # Inputs without a batch dimension count as a batch of one.
    unbatched = activation.ndim == point.unbatched_ndim
    if unbatched:
        return tap(activation.unsqueeze(0), layer, point).squeeze(0)
    channel_dim = point.channel_dim % activation.ndim
    # (B, N) has no positions, whichever dimension counts samples in longer shapes.
    batch_dim = 0 if activation.ndim == 2 else point.batch_dim
    if activation.ndim < 2 or activation.shape[channel_dim] != layer.neurons:
        raise ValueError(
            f"the {point} gave a tensor of shape {tuple(activation.shape)}, but layer {layer.name!r} has "
            f"{layer.neurons} neurons, expected in dimension {point.channel_dim}; name another place with "
            f"layers={{{layer.name!r}: {{'measure_at': ...}}}}"
        )
    if activation.device != layer.sink.device:
        raise RuntimeError(
            f"layer {layer.name!r} runs on {activation.device}, but its importance is on {layer.sink.device}; "
            "build the optimizer after moving the model"
        )
    return _Tap.apply(activation, layer.sink, layer, channel_dim, batch_dim, point.copy)


class TapHook:
    """Forward hook, or forward pre-hook, that taps what a module returns or takes; picklable with the model.

    It measures only where gradients flow and the layer is training, so evaluation costs nothing.
    """

    def __init__(self, layer: NeuronLayer, point: TapPoint, weighted: nn.Module) -> None:
        self.layer, self.point, self.weighted = layer, point, weighted

    def _tapped(self, value: Any) -> Any:
        """The tapped tensor, or None to leave `value` as it is."""
        if not isinstance(value, Tensor) or not value.requires_grad or not torch.is_grad_enabled():
            return None
        if not self.weighted.training or not any(p.parameter.requires_grad for p in self.layer.parameters):
            return None
        return tap(value, self.layer, self.point)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], *output: Any) -> Any:
        """As a forward hook it is called with the output, as a forward pre-hook without."""
        values = output[0] if output else inputs
        if not isinstance(values, tuple):
            return self._tapped(values)
        tapped = self._tapped(values[0]) if values else None
        return None if tapped is None else (tapped, *values[1:])


def _check_not_before_normalization(
    layer: NeuronLayer, activation: Tensor, gradient: Tensor, channel_dim: int, batch_dim: int
) -> None:
    """Warns if the importance is zero but for rounding, as it is before a normalization whatever the data.

    Instance norm does not change with the scale of one channel of one sample, so every sum over positions is zero; batch
    norm does not change with the scale of one channel, so a channel's sum over samples and positions is. (Layer and
    group norm do not change with the scale of several channels together, which sums to zero before layers far upstream
    of any normalization too, and so says nothing.)
    """
    if layer.neurons == 1:  # its scale is the sample's scale, see above
        return
    product = activation.detach().double() * gradient.double()
    product = product.movedim((batch_dim, channel_dim), (0, 1)).reshape(product.shape[batch_dim], layer.neurons, -1)
    absolute = product.abs().sum((0, 2))
    for kind, signed in (
        ("an instance normalization", product.sum(2).abs().sum(0)),
        ("a batch normalization", product.sum((0, 2)).abs()),
    ):
        if absolute.sum() > 0 and bool((signed <= _NUMERICALLY_ZERO * absolute).all()):
            warnings.warn(
                f"layer {layer.name!r}: its importance, measured at the {' and the '.join(map(str, layer.points))}, is "
                f"zero but for rounding, as it is before {kind}; measure it behind that: "
                f"layers={{{layer.name!r}: {{'measure_at': '<name of the normalization or activation>'}}}}",
                ImportanceWarning,
                stacklevel=2,
            )
            return
