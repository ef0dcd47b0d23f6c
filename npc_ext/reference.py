"""The equations of neuron-level plasticity control in plain PyTorch: the specification of every kernel.

One function per equation of Paik, Oh, Kwak and Kim, "Overcoming Catastrophic Forgetting by Neuron-Level Plasticity
Control" (AAAI 2020, arXiv 1907.13322), then the operations composed from them. `npc_ext.ops` has the same operations
with the same signatures. The classes in `npc_ext.columns` define their arguments. Everything runs on any device.
float64 tensors are computed in float64, half precision in float32. The code is written to be read, not to be fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .columns import (
    LAYER_STEP,
    NO_SCALER,
    NO_STEPS,
    Activations,
    AdamNetwork,
    AdamOptions,
    AnchorOptions,
    Anchors,
    Connections,
    Layer,
    Layers,
    LayerStepOptions,
    MaybeTensors,
    Network,
    Placement,
    PlasticityOptions,
    Scaler,
    SGDOptions,
    Steps,
    columns_of,
)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and steps over tensors of `dtype` are computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def importance(activation: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0) -> Tensor:
    """Eq. 2 without its two means: a_i = sum over b of |sum over p of n_bip * dL/dn_bip|, shape (N,).

    All dimensions of `activation` except `batch_dim` and `channel_dim` are positions p. The means over b and p are
    positive factors of the whole layer, and eq. 3 cancels them.

    A neuron that received no gradient (dL/dn is 0 everywhere) gets -0.0, the identity of addition. So a sum of
    importance over micro-batches or processes is -0.0 only if all of its terms are.
    """
    dtype = compute_dtype(activation.dtype)
    product = activation.to(dtype) * gradient.to(dtype)
    product = product.movedim((batch_dim % product.ndim, channel_dim % product.ndim), (0, 1))
    sums = product.flatten(2).sum(2).abs().sum(0) if product.ndim > 2 else product.abs().sum(0)
    received = (gradient != 0).movedim(channel_dim, 0).flatten(1).any(1)
    return torch.where(received | (sums != 0), sums, -0.0)


def received_no_gradient(measured: Tensor) -> Tensor:
    """Whether importance is -0.0, the mark of `importance` and `connection_importance` for "no gradient"."""
    return (measured == 0) & measured.signbit()


def relu_backward_importance(
    output: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0
) -> tuple[Tensor, Tensor]:
    """The derivative of ReLU, from its output y and dL/dy, and eq. 2 at y: (dL/dx, `importance` of y).

    dL/dx is dL/dy where y > 0 or y is NaN, as in torch, and 0 elsewhere.
    """
    return gradient.masked_fill(output <= 0, 0), importance(output, gradient, channel_dim, batch_dim)


def connection_importance(parameter: Tensor, gradient: Tensor) -> Tensor:
    """CPC's form of eq. 2: |w dL/dw| for each connection, in the shape of the parameter.

    It is -0.0 where dL/dw is 0.
    """
    dtype = compute_dtype(parameter.dtype)
    product = (parameter.to(dtype) * gradient.to(dtype)).abs().to(torch.float32)
    return torch.where((gradient != 0) | (product != 0), product, -0.0)


def normalize(measured: Tensor, active_only: bool = False) -> Tensor:
    """Eq. 3: importance divided by its mean over the layer, or over what received a gradient (`active_only`)."""
    total = measured.sum()
    neurons = (~received_no_gradient(measured)).sum() if active_only else measured.numel()
    return measured / total * neurons


def moving_average(importance: Tensor, normalized: Tensor, delta: float) -> Tensor:
    """Eq. 4: C_i <- delta C_i + (1 - delta) c_i."""
    return delta * importance + (1 - delta) * normalized


def plasticity(importance: Tensor, alpha: float, beta: float, sigma: str = "sigmoid") -> Tensor:
    """Eq. 7 as a share of the learning rate: s_i = min(1, alpha sqrt(max(beta / C_i - 1, 0))), and 1 where C_i = 0.

    `alpha` is in units of the learning rate: 0.5 corresponds to the paper's 0.05 at its largest learning rate of 0.1.
    `sigma` is the function in eq. 5 that relates the change of a weight to the loss. "sigmoid" and "tanh" give
    alpha sqrt(beta / C - 1), with different alpha; "erf" gives alpha sqrt(ln(beta / C)).
    """
    ratio = importance.new_full((), beta) / importance  # a plain number would be multiplied by a rounded 1 / C
    surplus = ratio.log() if sigma == "erf" else ratio - 1
    return (alpha * surplus.clamp(min=0).sqrt()).clamp(max=1)


def learning_rate(importance: Tensor, lr: float, alpha: float, beta: float, sigma: str = "sigmoid") -> Tensor:
    """Eq. 7: eta_i = lr * s_i, with the share s_i of `plasticity`."""
    return lr * plasticity(importance, alpha, beta, sigma)


def descend_(
    parameter: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor | None,
    rate: Tensor | float,
    frozen: Tensor | bool = False,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    rounding_key: int | None = None,
    cleared: Tensor | bool = False,
) -> None:
    """The weight update of Algorithm 1 with the options of `torch.optim.SGD`. Frozen elements do not change.

    `rate`, `frozen` and `cleared` broadcast against `parameter`. The momentum of a frozen element does not change
    either, except that it becomes 0 where `cleared` is true. With a `rounding_key` the result is rounded
    stochastically.
    """
    dtype = compute_dtype(parameter.dtype)
    value = parameter.to(dtype)
    step = -gradient.to(dtype) if maximize else gradient.to(dtype)
    step = step + weight_decay * value
    frozen = torch.as_tensor(frozen, dtype=torch.bool, device=parameter.device)
    if momentum_buffer is not None:
        velocity = momentum * momentum_buffer.to(dtype) + step
        momentum_buffer.copy_(torch.where(frozen, momentum_buffer, velocity.to(parameter.dtype)))
        _clear_(momentum_buffer, cleared)
        step = step + momentum * velocity if nesterov else velocity
    parameter.copy_(torch.where(frozen, parameter, rounded(value - rate * step, parameter, rounding_key)))


def _clear_(first_moment: Tensor, cleared: Tensor | bool) -> None:
    cleared = torch.as_tensor(cleared, dtype=torch.bool, device=first_moment.device)
    first_moment.copy_(torch.where(cleared, 0, first_moment))


def bias_correction(decay: float, steps: int) -> float:
    """1 - decay^steps, the factor by which a moving average that began at 0 is too small, without cancellation."""
    return -math.expm1(steps * math.log(decay)) if decay > 0 else 1.0


def adam_(
    parameter: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    steps: int,
    rate: Tensor | float,
    frozen: Tensor | bool,
    first_decay: float,
    second_decay: float,
    epsilon: float,
    weight_decay: float,
    maximize: bool,
    rounding_key: int | None = None,
    cleared: Tensor | bool = False,
) -> None:
    """The step of `torch.optim.AdamW` with a learning rate for each element. Frozen elements do not change.

    Sources: Kingma and Ba, "Adam", arXiv 1412.6980; Loshchilov and Hutter, "Decoupled Weight Decay Regularization",
    arXiv 1711.05101. `steps` includes this step. `rate`, `frozen` and `cleared` broadcast against `parameter`. The
    moments of a frozen element do not change either, except that the first becomes 0 where `cleared` is true.
    """
    dtype = compute_dtype(parameter.dtype)
    value, d = parameter.to(dtype), (-gradient if maximize else gradient).to(dtype)
    frozen = torch.as_tensor(frozen, dtype=torch.bool, device=parameter.device)
    first = torch.lerp(first_moment, d, 1 - first_decay)
    second = second_decay * second_moment + (1 - second_decay) * d * d
    first_bias, second_bias = bias_correction(first_decay, steps), bias_correction(second_decay, steps)
    direction = first / first_bias / (second.sqrt() / math.sqrt(second_bias) + epsilon)
    result = value - rate * (direction + weight_decay * value)
    first_moment.copy_(torch.where(frozen, first_moment, first))
    _clear_(first_moment, cleared)
    second_moment.copy_(torch.where(frozen, second_moment, second))
    parameter.copy_(torch.where(frozen, parameter, rounded(result, parameter, rounding_key)))


_BITS = 0xFFFFFFFF  # 32 of them


def random_bits(key: int, index: Tensor) -> Tensor:
    """32 pseudo-random bits for each index (int64, below 2^32), by C. Wellons' lowbias32."""
    x = index ^ key
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _BITS
    return x ^ (x >> 16)


def rounding_key(seed: int, steps: int) -> int:
    """The key of a parameter's random bits in a step, after `steps` earlier steps."""

    def bits(key: int, index: int) -> int:
        return int(random_bits(key, torch.tensor(index, dtype=torch.int64, device="cpu")))

    return bits(bits(0x9E3779B9, steps), bits(0x85EBCA6B, seed))


def rounded(value: Tensor, parameter: Tensor, key: int | None = None) -> Tensor:
    """Rounds a value to the dtype of its parameter: to nearest, or with a key, for bfloat16, stochastically.

    The expected value of stochastic rounding is the value itself. The random bits depend only on the key and on the
    place of the element in memory.
    """
    if key is None:
        return value.to(parameter.dtype)
    bits = value.contiguous().view(torch.int32).to(torch.int64) & _BITS
    places = torch.arange(parameter.numel(), dtype=torch.int64, device=parameter.device)
    places = places.as_strided(parameter.shape, parameter.stride())
    up = (bits + (random_bits(key, places) & 0xFFFF)) >> 16
    special = (bits & 0x7F800000) == 0x7F800000  # infinities and NaN
    up = torch.where(up >= 0x8000, up - 0x10000, up).to(torch.int16).view(torch.bfloat16)
    return torch.where(special, value.to(torch.bfloat16), up)


def anchor_penalty(value: Tensor, anchor: Tensor, stiffness: Tensor, strength: float) -> Tensor:
    """The penalty of EWC, MAS, SI and SSL for one parameter: strength * sum of stiffness * (value - anchor)^2."""
    return strength * (stiffness * (value - anchor) ** 2).sum()


def anchor_gradient(value: Tensor, anchor: Tensor, stiffness: Tensor, strength: float) -> Tensor:
    """The gradient of `anchor_penalty` with respect to the value."""
    return 2 * strength * stiffness * (value - anchor)


def towards_anchor(
    value: Tensor, anchor: Tensor, stiffness: Tensor, strength: float, lr: float, momentum: float = 0.0
) -> Tensor:
    """The proximal step of `anchor_penalty`: (value + c * anchor) / (1 + c), for implicit anchors.

    c = 2 * lr / (1 - momentum) * strength * stiffness, see `npc_ext.baselines.anchored.Anchored`. It may be
    infinite. Elements whose stiffness is not above 0 have no anchor.
    """
    pull = 2 * lr * strength / (1 - momentum)
    compliance = 1 / pull if pull > 0 else math.inf
    moved = value + stiffness / (stiffness + compliance) * (anchor - value)
    return torch.where(stiffness <= 0, value, moved)


def merged_anchors(
    stiffness: Tensor, anchor: Tensor, new_stiffness: Tensor, new_anchor: Tensor
) -> tuple[Tensor, Tensor]:
    """Merges two anchors into one with the sum of their penalties, up to a constant: (stiffness, anchor).

    W_1 (x - a_1)^2 + W_2 (x - a_2)^2 = (W_1 + W_2) (x - a)^2 + constant, with a the mean of a_1 and a_2 weighted by
    W_1 and W_2. So the anchors of any number of tasks need two tensors, exactly. Where both W are zero, a is a_2.
    """
    total = stiffness + new_stiffness
    share = torch.where(total > 0, new_stiffness / total, 1.0)
    return total, torch.lerp(anchor, new_anchor, share)


def path_stiffness(path: Tensor, movement: Tensor, damping: float) -> Tensor:
    """SI's importance of a task that has ended: max(omega, 0) / (movement^2 + damping)."""
    return path.clamp(min=0) / (movement**2 + damping)


def per_element(per_neuron: Tensor, parameter: Tensor, neuron_dim: int, groups: int) -> Tensor:
    """Views one value per neuron (N,) so that it broadcasts against a parameter with neurons in `neuron_dim`.

    With `groups` > 1 (grouped transposed convolutions), dimension 0 of the parameter runs over groups x inputs, and
    neuron i is in group i // (N / groups), at index i % (N / groups) of `neuron_dim`. The result then has the shape of
    the first `neuron_dim` + 1 dimensions of the parameter, followed by ones.
    """
    shape = [1] * parameter.ndim
    if groups == 1:
        shape[neuron_dim] = per_neuron.numel()
        return per_neuron.view(shape)
    shape[0], shape[neuron_dim] = parameter.shape[0], parameter.shape[neuron_dim]
    rows = per_neuron.view(groups, -1).repeat_interleave(parameter.shape[0] // groups, dim=0)
    return rows.view(shape)


def update_(
    network: Network,
    layers: Layers,
    measured: MaybeTensors,
    placement: Placement,
    options: SGDOptions,
    constants: PlasticityOptions,
    steps: Steps = NO_STEPS,
    scaler: Scaler = NO_SCALER,
) -> None:
    """Eqs. 3, 4 and 7 and Algorithm 1 for all layers of a network in one call, in place.

    w <- w - lr s_i (dw + weight_decay w), with eq. 7's share s_i = min(1, alpha sqrt(max(beta / C_i - 1, 0))) of the
    neuron, and with momentum as in `torch.optim.SGD`. Rows of frozen neurons (C_i >= beta) stay bit-identical. The
    compiled kernels neither read nor write them or their momentum if they are long. If a neuron freezes in this call
    (C_i >= beta after the call, but not before), the momentum of its rows is set to 0.

    Args:
        network: the parameters (P of them) and their tensors.
        layers: the layers (L of them) and their importance.
        measured: L float32 tensors (N,), sums from `importance`. A layer keeps its C if this is None, if the sums are
            zero, or if they are not finite, which is counted in `nonfinite_steps`. To clear sums, fill them with -0.0.
        placement, options: of each parameter.
        constants: of each layer.
        steps: the number of steps that each parameter has taken, and the seeds of stochastic rounding.
        scaler: the scale of the gradients, and whether they overflowed.
    """
    if _overflowed(scaler):
        return
    neurons = _move_layers(layers, measured, constants)
    for index, parameter in enumerate(network.parameters):
        rate = _rate_of(parameter, neurons, placement, index, options.lr[index])
        _descend_(network, options, index, rate, scaler, _rounding_key(index, steps))
    _count(steps)


class _Neurons(NamedTuple):
    """What a step does with the neurons, or connections, of a layer.

    Attributes:
        plasticity: the share of the learning rate (eq. 7) for each; 0 where weights and moments do not change.
        cleared: of those, the ones whose first moment becomes 0: they were not frozen before this step, and are now.
    """

    plasticity: Tensor
    cleared: Tensor


class _Rate(NamedTuple):
    """The learning rates of a parameter's elements, which are frozen, and which of them lose their first moment."""

    rate: Tensor | float
    frozen: Tensor | bool = False
    cleared: Tensor | bool = False


def _move_layer(
    average: Tensor, measured: Tensor | None, normalized: Tensor | None, constants: PlasticityOptions, layer: int
) -> _Neurons:
    """Eqs. 4 and 7 of a layer. Its normalized importance enters C; None leaves C as it is.

    With `active_only` neurons without a gradient take no part: C, weights and moments stay as they are. `measured` is
    None where nothing was measured.
    """
    of_eq_7 = constants.alpha[layer], constants.beta[layer], constants.sigma[layer]
    was_free = plasticity(average, *of_eq_7) != 0
    active = torch.ones_like(average, dtype=torch.bool)
    if measured is not None and constants.active_only[layer]:
        active = ~received_no_gradient(measured)
    if normalized is not None:
        moved = moving_average(average, normalized, constants.delta[layer])
        average.copy_(torch.where(active, moved, average))
    share = plasticity(average, *of_eq_7)
    return _Neurons(torch.where(active, share, 0), active & was_free & (share == 0))


def _normalized(sums: Tensor, nonfinite_steps: Tensor, constants: PlasticityOptions, layer: int) -> Tensor | None:
    """Eq. 3 of a layer. None if its sums are zero, or not finite, which is counted."""
    total = float(sums.sum())
    if not math.isfinite(total):
        nonfinite_steps[layer] += 1
        return None
    return normalize(sums, constants.active_only[layer]) if total > 0 else None


def _move_layers(layers: Layers, measured: MaybeTensors, constants: PlasticityOptions) -> list[_Neurons]:
    """Eqs. 3, 4 and 7 of all layers."""
    result = []
    for index, (average, sums) in enumerate(zip(layers.importances, measured, strict=True)):
        normalized = None
        if sums is not None:
            normalized = _normalized(sums.to(average.dtype), layers.nonfinite_steps, constants, index)
        result.append(_move_layer(average, sums, normalized, constants, index))
    return result


def _rate_of(parameter: Tensor, neurons: Sequence[_Neurons], placement: Placement, index: int, lr: Any) -> _Rate:
    """Eq. 7 for the elements of a parameter. Of a shard, rows begin with the neuron `first_neuron`."""
    if placement.layer[index] < 0:
        return _Rate(lr)
    share, cleared = neurons[placement.layer[index]]
    dim, groups = placement.neuron_dim[index], placement.groups[index]
    if placement.first_neuron is not None:
        rows = parameter.shape[dim] * groups
        first = placement.first_neuron[index]
        share, cleared = share.narrow(0, first, rows), cleared.narrow(0, first, rows)
    share = per_element(share.to(compute_dtype(parameter.dtype)), parameter, dim, groups)
    return _Rate(lr * share, share == 0, per_element(cleared, parameter, dim, groups))


def _descend_(
    network: Network, options: SGDOptions, index: int, rate: _Rate, scaler: Scaler, rounding_key: int | None = None
) -> None:
    """`descend_` for a parameter of a network."""
    momentum = options.momentum[index]
    descend_(
        network.parameters[index],
        _unscaled(network.gradients[index], scaler),
        network.momentum_buffers[index] if momentum != 0 else None,
        rate.rate,
        rate.frozen,
        momentum,
        options.nesterov[index],
        options.weight_decay[index],
        options.maximize[index],
        rounding_key,
        rate.cleared,
    )


def _overflowed(scaler: Scaler) -> bool:
    return scaler.found_inf is not None and bool(scaler.found_inf)


def _unscaled(gradient: Tensor, scaler: Scaler) -> Tensor:
    return gradient if scaler.grad_scale is None else gradient.to(compute_dtype(gradient.dtype)) / scaler.grad_scale


def _rounding_key(index: int, steps: Steps) -> int | None:
    count = steps.steps[index] if steps.seeds and steps.seeds[index] >= 0 else None
    return None if count is None else rounding_key(steps.seeds[index], int(count))


def _count(steps: Steps) -> None:
    for count in steps.steps:
        if count is not None:
            count += 1


def adam_update_(
    network: AdamNetwork,
    layers: Layers,
    measured: MaybeTensors,
    placement: Placement,
    options: AdamOptions,
    constants: PlasticityOptions,
    steps: Steps,
    scaler: Scaler = NO_SCALER,
) -> None:
    """`update_` with the step of `torch.optim.AdamW`, scaled for each neuron, in one call, in place.

        w <- w - s_i lr (m' / (sqrt(v') + epsilon) + weight_decay w)

    with the share s_i as in `update_`, and the bias-corrected moving averages m' of the gradient and v' of its square.
    Rows of frozen neurons (C_i >= beta) and their moments stay bit-identical. If a neuron freezes in this call, the
    first moment of its rows is set to 0.

    Args:
        network: the parameters, and m and v as their moments.
        layers, measured, placement, constants: as in `update_`.
        options: of each parameter, as in `torch.optim.AdamW`.
        steps: as in `update_`, with a count for every parameter.
        scaler: as in `update_`.
    """
    if _overflowed(scaler):
        return
    neurons = _move_layers(layers, measured, constants)
    for index, (parameter, count) in enumerate(zip(network.parameters, steps.steps, strict=True)):
        assert count is not None
        rate = _rate_of(parameter, neurons, placement, index, options.lr[index])
        adam_(
            parameter,
            _unscaled(network.gradients[index], scaler),
            network.first_moments[index],
            network.second_moments[index],
            int(count) + 1,
            rate.rate,
            rate.frozen,
            options.first_decay[index],
            options.second_decay[index],
            options.epsilon[index],
            options.weight_decay[index],
            options.maximize[index],
            _rounding_key(index, steps),
            rate.cleared,
        )
    _count(steps)


def anchored_update_(
    network: Network, anchors: Anchors, options: SGDOptions, pull: AnchorOptions, scaler: Scaler = NO_SCALER
) -> None:
    """The weight update of EWC, MAS, SI and SSL for a whole network in one call, in place: SGD with anchors.

    Adds the penalty strength * stiffness * (w - anchor)^2 of every weight w to the loss. If the pull is implicit, a
    proximal step of the penalty follows the step of `torch.optim.SGD` along dL/dw (see
    `npc_ext.baselines.anchored.Anchored`). If it is explicit, the penalty's gradient is added to dL/dw.

    Args:
        network: the parameters, and dL/dw without the penalty's gradient.
        anchors: the stiffness and the anchor of each parameter, and its path integral.
        options: of each parameter.
        pull: the strength of the pull to each anchor, and whether it is implicit.
        scaler: as in `update_`.
    """
    if _overflowed(scaler):
        return
    for index, (parameter, gradient) in enumerate(zip(network.parameters, network.gradients, strict=True)):
        before = parameter.to(compute_dtype(parameter.dtype), copy=True)
        loss_gradient = _unscaled(gradient.to(before.dtype) * (-1 if options.maximize[index] else 1), scaler)
        stiffness, anchor, path = anchors.stiffness[index], anchors.anchors[index], anchors.paths[index]
        lr, momentum, strength = options.lr[index], options.momentum[index], pull.strength[index]
        whole, moved = loss_gradient, before.clone()
        if stiffness is not None and anchor is not None and not pull.implicit[index]:
            whole = whole + anchor_gradient(before, anchor, stiffness, strength)
        buffer = network.momentum_buffers[index] if momentum != 0 else None
        descend_(moved, whole, buffer, lr, False, momentum, options.nesterov[index], options.weight_decay[index])
        if stiffness is not None and anchor is not None and pull.implicit[index]:
            moved = towards_anchor(moved, anchor, stiffness, strength, lr, momentum)
        parameter.copy_(moved)
        if path is not None:
            path.sub_(loss_gradient * (parameter.to(before.dtype) - before))


def connection_update_(
    network: Network,
    connections: Connections,
    options: SGDOptions,
    constants: PlasticityOptions,
    scaler: Scaler = NO_SCALER,
) -> None:
    """CPC for a whole network in one call, in place: `update_` with an importance and a rate for every connection.

    The importance of a connection is |w dL/dw|, and the mean of eq. 3 is over all connections of the layer. Frozen
    connections (C >= beta) stay bit-identical. With `active_only`, connections with a gradient of 0 take no part.

    Args:
        network: as in `update_`.
        connections: the importance of each parameter's connections, and its layer.
        options, constants, scaler: as in `update_`.
    """
    if _overflowed(scaler):
        return
    moved: dict[int, _Neurons] = {}  # by parameter
    for layer in range(len(constants.alpha)):
        averages = {
            index: average
            for index, (average, of) in enumerate(zip(connections.importances, connections.layer, strict=True))
            if of == layer and average is not None
        }
        if not averages:
            continue
        measured = [connection_importance(network.parameters[index], network.gradients[index]) for index in averages]
        everything = torch.cat([sums.flatten() for sums in measured])
        normalized = _normalized(everything, connections.nonfinite_steps, constants, layer)
        parts = [None] * len(measured) if normalized is None else normalized.split([sums.numel() for sums in measured])
        for (index, average), sums, part in zip(averages.items(), measured, parts, strict=True):
            new = None if part is None else part.view_as(sums)
            moved[index] = _move_layer(average, sums, new, constants, layer)
    for index, parameter in enumerate(network.parameters):
        rate = _Rate(options.lr[index])
        if index in moved:
            share, cleared = moved[index]
            rate = _Rate(options.lr[index] * share.to(compute_dtype(parameter.dtype)), share == 0, cleared)
        _descend_(network, options, index, rate, scaler)


def network_step_(
    activations: Activations,
    network: Network,
    layers: Layers,
    placement: Placement,
    options: SGDOptions,
    constants: PlasticityOptions,
    scaler: Scaler = NO_SCALER,
) -> None:
    """A whole NPC step in one call: `importance` of every layer from its activation, then `update_`, in place.

    On CUDA it is a single cooperative launch. This saves launches, which dominate the time of small networks. For
    large networks, `importance` for each layer and then `update_` should be faster: this kernel is compiled for every
    layout and dtype at once, so fewer of its blocks fit on a multiprocessor (docs/development/machine-code.md). We
    have not measured at which size.

    Args:
        activations: for each layer the arguments of `importance`.
        network, layers, placement, options, constants, scaler: as in `update_`.
    """
    measured = [importance(*arguments) for arguments in zip(*activations, strict=True)]
    update_(network, layers, measured, placement, options, constants, scaler=scaler)


def layer_step_(
    layer: Layer, network: Network, options: LayerStepOptions = LAYER_STEP, scaler: Scaler = NO_SCALER
) -> None:
    """`network_step_` for one layer, with the same options for all of its parameters.

    Args:
        layer: the layer, its activation and the gradient of the activation.
        network: its parameters and their tensors.
        options: the options of the layer and of all of its parameters.
        scaler: as in `update_`.
    """
    network_step_(**as_network_step(layer, network, options, scaler))


def as_network_step(layer: Layer, network: Network, options: LayerStepOptions, scaler: Scaler) -> dict[str, Any]:
    """The arguments of `network_step_`, by name, from those of `layer_step_`."""
    values, count = options._asdict(), len(network.parameters)
    return {
        "activations": Activations(
            [layer.activation], [layer.activation_gradient], [options.channel_dim], [options.batch_dim]
        ),
        "network": network,
        "layers": Layers([layer.importance], layer.nonfinite_steps),
        "placement": Placement([0] * count, layer.neuron_dim, layer.groups),
        "options": columns_of(SGDOptions, [values] * count),
        "constants": columns_of(PlasticityOptions, [values]),
        "scaler": scaler,
    }
