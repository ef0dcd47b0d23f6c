"""The tap: an identity in the forward pass whose backward pass measures importance.

A hook places it at a layer's measuring point. Its backward pass returns the gradient unchanged, and the importance
a_i = sum over b of |sum over p of n_bip * dL/dn_bip| (eq. 2) as the gradient of the layer's sink, a small leaf tensor.
So importance behaves like any gradient. Autograd sums it over micro-batches and over the calls of a module.
Checkpointing and torch.compile support it, and it is cleared like a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import (
    after_backward,
    current_backward_pass,
    is_batched,
    is_compiled_in_transform,
    is_recorded,
    version_of,
)
from .._warn import warn
from .layer import NeuronLayer, TapPoint
from .stand_in import Unscriptable

# Before a normalization, the gradient sums to zero except for rounding, which is at most this share of the absolute sum
# in float32.
_ZERO_GRADIENT = 1e-5
# The probability that a layer is mistaken for one before a normalization if its activations and gradients are
# independent random numbers.
_FALSE_ALARMS = 1e-6
# In half precision, the gradients of a few channels may all sum to zero by chance.
_FEWEST_NEURONS_IN_HALVES = 5
# Before each of them, activation times gradient sums to zero over these dimensions of (B, N, P), with this effect.
_NORMALIZATIONS = (
    ("an instance normalization", (2,), "importance is zero except for rounding"),
    (
        "a batch normalization",
        (0, 2),
        "activation times gradient adds up to zero over samples, so importance does not show how much a neuron matters",
    ),
)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by size in bytes


class ImportanceWarning(UserWarning):
    """There is a problem with the importance of a layer; the message names the layer."""


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: Tensor,
        sink: Tensor,
        layer: NeuronLayer,
        channel_dim: int,
        batch_dim: int,
        copy: bool,
        note_rest: Callable[[], None] | None,
        *constants: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(activation)
        ctx.layer, ctx.dims, ctx.note_rest, ctx.constants = layer, (channel_dim, batch_dim), note_rest, constants
        return activation.clone() if copy else activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_sink = None
        if can_measure(gradient):
            activation = like(gradient, *ctx.saved_tensors)
            importance = ctx.layer.measure(activation, gradient, *ctx.dims)
            of_sink = for_sink(importance, ctx.layer, activation, gradient, *ctx.dims)
        if ctx.note_rest is not None:
            ctx.note_rest()
        return gradient, of_sink, None, None, None, None, None, *map(skipped_like, ctx.constants)


def can_measure(*gradients: Tensor) -> bool:
    """Whether gradients have values in a backward pass. torch.func and `is_grads_batched` transform them."""
    return torch.compiler.is_dynamo_compiling() or not any(map(is_batched, gradients))


def like(gradient: Tensor, activation: Tensor) -> Tensor:
    """The activation in its gradient's dtype."""
    return activation if activation.dtype == gradient.dtype else activation.to(gradient.dtype)


def for_sink(
    importance: Tensor, layer: NeuronLayer, activation: Tensor, gradient: Tensor, channel_dim: int, batch_dim: int
) -> Tensor:
    """The importance as the gradient of the layer's sink. The first call warns if the importance cannot be right."""
    if not torch.compiler.is_compiling():
        drop_cleared_importance(layer)
        if not layer.checked and not _is_captured(gradient):
            layer.checked = True
            _check_not_before_normalization(layer, activation, gradient, channel_dim, batch_dim)
    return importance if importance.dtype == torch.float32 else importance.to(torch.float32)


def skipped_like(parameter: Tensor) -> Tensor:
    """A gradient that was not computed: negative zeros, because zeros mean a gradient that was cleared in place."""
    return torch.full_like(parameter, -0.0)


def drop_cleared_importance(layer: NeuronLayer) -> None:
    """Drops the importance of earlier backward passes if their gradients have been cleared since.

    Call it in a backward pass before the layer's sink and parameters receive their gradients. A backward pass
    increments the version of the weight's gradient. Any other version means that the gradient was written to: it was
    set to zero, clipped or unscaled. In this case, the gradient's values decide. They are compared on the device, so
    nothing waits for a GPU.
    """
    backward_pass = current_backward_pass()
    if layer.last_backward_pass == backward_pass:  # the pass uses the layer several times
        return
    layer.last_backward_pass = backward_pass
    gradient = layer.parameters[0].parameter.grad
    expected = gradient is not None and version_of(gradient) == layer.expected_version
    if not expected and layer.sink.grad is not None:
        gradients = [parameter.grad for parameter in layer.trained() if parameter.grad is not None]
        if not gradients:
            if layer.has_gradients:
                layer.sink.grad = None
                layer.forget_skipped()
        elif not layer.sharded:
            with torch.no_grad():
                kept = [grad.view(_BITS[grad.element_size()]).any().to(layer.sink.device) for grad in gradients]
                layer.sink.grad.masked_fill_(torch.stack(kept).any().logical_not(), -0.0)
    layer.expected_version = 0 if gradient is None else version_of(gradient) + 1
    if layer.sharded:
        layer.has_gradients = False
        after_backward(layer.note_gradients)


def _is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which no value can be read."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def tap(activation: Tensor, layer: NeuronLayer, point: TapPoint) -> Tensor:
    """Returns `activation`, or a copy of it if `point.copy`, and measures `layer` in the backward pass.

    If the layer rests, its parameters get gradients of zeros here (skipping/constants.py).

    Raises:
        ValueError: the tensor does not hold the layer's neurons in the dimension of the point.
        RuntimeError: it is on another device than the layer's importance.
    """
    if activation.ndim == point.unbatched_ndim:  # a batch of one
        return tap(activation.unsqueeze(point.missing_dim), layer, point).squeeze(point.missing_dim)
    dims = checked_dims(activation, layer, point)
    constants = [] if layer.note_rest is None else layer.trained()
    return _Tap.apply(activation, layer.sink, layer, *dims, point.copy, layer.note_rest, *constants)


def checked_dims(activation: Tensor, layer: NeuronLayer, point: TapPoint) -> tuple[int, int]:
    """The dimensions of a batched activation that count neurons and samples. Raises the same errors as `tap`."""
    channel_dim = point.channel_dim % activation.ndim
    # (B, N) has no positions, so its samples are in dimension 0, whatever longer shapes have.
    batch_dim = 0 if activation.ndim == 2 else point.batch_dim
    if activation.ndim < 2 or activation.shape[channel_dim] != layer.neurons:
        neurons = layer.parameters[0].neurons
        if neurons != layer.neurons:
            raise ValueError(
                f"layer {layer.name!r} has {neurons} neurons now, but had {layer.neurons} when the optimizer was "
                "built; build a new one, which takes over the importance of the first neurons of this one (earlier), "
                "as in NPC(model, ...).load_importance(earlier)"
            )
        raise ValueError(
            f"the {point} gave a tensor of shape {tuple(activation.shape)}, but layer {layer.name!r} has "
            f"{layer.neurons} neurons, expected in dimension {point.channel_dim}; name another place with "
            f"layers={{{layer.name!r}: {{'measure_at': ...}}}}"
        )
    check_device(activation, layer)
    return channel_dim, batch_dim


def check_device(activation: Tensor, layer: NeuronLayer) -> None:
    """Raises RuntimeError if a layer's activation is on another device than its importance."""
    if activation.device != layer.sink.device:
        raise RuntimeError(
            f"layer {layer.name!r} runs on {activation.device}, but its importance is on {layer.sink.device}; "
            "build the optimizer after moving the model"
        )


class TapHook(Unscriptable):
    """A forward hook or forward pre-hook that taps the output or the input of a module.

    It only measures if gradients are enabled and the layer is training, so evaluation costs nothing. It can be pickled
    with the model.
    """

    def __init__(self, layer: NeuronLayer, point: TapPoint, weighted: nn.Module) -> None:
        self.layer, self.point, self.weighted = layer, point, weighted

    def measures(self, value: Any) -> bool:
        """Whether to tap `value` at the moment."""
        if not isinstance(value, Tensor) or not torch.is_grad_enabled():
            return False
        if not value.requires_grad and not self.layer.resting:
            return False
        if not self.weighted.training or not self.layer.trains():
            return False
        # Graphs of torch.jit.trace cannot hold importance, and under torch.func there is nothing to measure.
        return not (is_compiled_in_transform() if torch.compiler.is_dynamo_compiling() else is_recorded())

    def _tapped(self, value: Any) -> Tensor | None:
        """The tapped tensor, or None to leave `value` as it is."""
        return tap(value, self.layer, self.point) if self.measures(value) else None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], *output: Any) -> Any:
        """A forward hook is called with the output, a forward pre-hook without."""
        values = output[0] if output else inputs
        if not isinstance(values, tuple):
            return self._tapped(values)
        tapped = self._tapped(values[0]) if values else None
        return None if tapped is None else (tapped, *values[1:])


def _check_not_before_normalization(
    layer: NeuronLayer, activation: Tensor, gradient: Tensor, channel_dim: int, batch_dim: int
) -> None:
    """Warns if activation times gradient adds up to zero for any data, as it does before a normalization.

    The output of instance norm does not depend on the mean and scale of each channel of a sample. So each channel's
    gradient, and its product with the activation, sum to zero over positions: the importance is zero. Before batch
    norm, they sum to zero over samples and positions. The importance is not zero there, because eq. 2 takes the
    absolute value of each sample. Layer and group norm are not checked: their output does not depend on the mean and
    scale of several channels together, but these sums are also zero at layers far upstream of any normalization.
    """
    if layer.neurons == 1:  # its scale is the scale of the sample, see above
        return
    u = torch.finfo(gradient.dtype).eps / 2
    if u > _ZERO_GRADIENT and layer.neurons < _FEWEST_NEURONS_IN_HALVES:
        return
    gradient, activation = (
        t.detach().double().movedim((batch_dim, channel_dim), (0, 1)).reshape(t.shape[batch_dim], layer.neurons, -1)
        for t in (gradient, activation)
    )
    product = activation * gradient
    if not product.any():
        return
    for kind, dims, effect in _NORMALIZATIONS:
        terms = product.numel() / product.sum(dims).numel()
        zero_gradient = max(_ZERO_GRADIENT, 8 * u / terms**0.5)
        # A zero gradient alone proves nothing: a 1x1 convolution before a normalization passes it to its input. But the
        # product sums to zero, too, except for the eps added to the variance. The sum of independent numbers is about
        # 1 / sqrt(terms) of the absolute sum. It is improbable that all channels stay below a fraction of that.
        zero_product = _FALSE_ALARMS ** (1 / layer.neurons) / terms**0.5
        if _cancels(gradient, dims, zero_gradient) and _cancels(product, dims, zero_product):
            warn(
                f"layer {layer.name!r} is measured at the {' and the '.join(map(str, layer.points))}, before {kind}, "
                f"where {effect}; measure it behind that: "
                f"layers={{{layer.name!r}: {{'measure_at': '<name of the normalization or activation>'}}}}",
                ImportanceWarning,
            )
            return


def _cancels(values: Tensor, dims: tuple[int, ...], share: float) -> bool:
    """Whether in each channel of (B, N, P) the sums over `dims` are at most `share` of the sums of absolute values."""
    signed, absolute = values.sum(dims, keepdim=True).abs().sum(0), values.abs().sum((0, 2)).unsqueeze(1)
    return bool((signed <= share * absolute).all())
