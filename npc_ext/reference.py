"""The equations of neuron-level plasticity control in plain PyTorch: the specification of every kernel.

One function per equation of Paik, Oh, Kwak and Kim, "Overcoming Catastrophic Forgetting by Neuron-Level Plasticity
Control" (AAAI 2020, arXiv 1907.13322), then the operations of `npc_ext.ops` composed from them with the same
signatures. Everything runs on any device; float64 tensors are computed in float64 throughout, half precision in
float32. Written to be read, not to be fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which sums and steps over tensors of `dtype` are taken: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def importance(activation: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0) -> Tensor:
    """Eq. 2 without its two means: a_i = sum over b of |sum over p of n_bip * dL/dn_bip|, shape (N,).

    Every dimension of `activation` but `batch_dim` and `channel_dim` is a position p. The means over b and p are
    positive factors of the whole layer, which eq. 3 cancels.

    A neuron that received no gradient (dL/dn is 0 everywhere) has -0.0. That is the identity of addition: a sum of
    importance over micro-batches or processes is -0.0 only if all of its terms are.
    """
    dtype = compute_dtype(activation.dtype)
    product = activation.to(dtype) * gradient.to(dtype)
    product = product.movedim((batch_dim % product.ndim, channel_dim % product.ndim), (0, 1))
    sums = product.flatten(2).sum(2).abs().sum(0) if product.ndim > 2 else product.abs().sum(0)
    received = (gradient != 0).movedim(channel_dim, 0).flatten(1).any(1)
    return torch.where(received | (sums != 0), sums, -0.0)


def received_no_gradient(measured: Tensor) -> Tensor:
    """Whether importance is -0.0, by which `importance` and `connection_importance` mark what received no gradient."""
    return (measured == 0) & measured.signbit()


def relu_backward_importance(
    output: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0
) -> tuple[Tensor, Tensor]:
    """The derivative of ReLU, from its output y and dL/dy, and eq. 2 at y: (dL/dx, `importance` of y).

    dL/dx is dL/dy where y > 0 and else 0; where y is NaN it is dL/dy, as in torch.
    """
    return gradient.masked_fill(output <= 0, 0), importance(output, gradient, channel_dim, batch_dim)


def connection_importance(parameter: Tensor, gradient: Tensor) -> Tensor:
    """What CPC takes in place of eq. 2: |w dL/dw| for each connection, of the parameter's shape.

    Where dL/dw is 0 it is -0.0.
    """
    dtype = compute_dtype(parameter.dtype)
    product = (parameter.to(dtype) * gradient.to(dtype)).abs().to(torch.float32)
    return torch.where((gradient != 0) | (product != 0), product, -0.0)


def normalize(measured: Tensor, active_only: bool = False) -> Tensor:
    """Eq. 3: importance divided by its mean over the layer, or over those that received a gradient (`active_only`)."""
    total = measured.sum()
    neurons = (~received_no_gradient(measured)).sum() if active_only else measured.numel()
    return measured / total * neurons


def moving_average(importance: Tensor, normalized: Tensor, delta: float) -> Tensor:
    """Eq. 4: C_i <- delta C_i + (1 - delta) c_i."""
    return delta * importance + (1 - delta) * normalized


def plasticity(importance: Tensor, alpha: float, beta: float, sigma: str = "sigmoid") -> Tensor:
    """Eq. 7 as a share of the learning rate: s_i = min(1, alpha sqrt(max(beta / C_i - 1, 0))), and 1 where C_i = 0.

    `alpha` is in units of the learning rate: the paper's 0.05 at its largest rate, 0.1, is 0.5.
    `sigma` is the function that eq. 5 assumes between a weight's change and the loss. Sigmoid and tanh share the form
    alpha sqrt(beta / C - 1) (their alpha differs), the error function gives alpha sqrt(ln(beta / C)).
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
    """Algorithm 1's weight update with the options of `torch.optim.SGD`; frozen elements stay as they are.

    `rate`, `frozen` and `cleared` broadcast against `parameter`. A frozen element's momentum buffer stays as it is,
    too, but becomes 0 where it is `cleared`. With a `rounding_key` the result is rounded at random.
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
    """1 - decay^steps, by which a moving average that began at 0 is too small; written so that nothing cancels."""
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
    """The step of `torch.optim.AdamW`, each element at its rate; frozen elements and moments stay.

    Kingma and Ba, "Adam", arXiv 1412.6980; Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv
    1711.05101. `steps` counts this one. `rate`, `frozen` and `cleared` broadcast against `parameter`. The first moment
    of a frozen element becomes 0 where it is `cleared`.
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


_BITS = 0xFFFFFFFF  # of 32


def random_bits(key: int, index: Tensor) -> Tensor:
    """32 bits that look random for each index (int64, below 2^32): C. Wellons' lowbias32."""
    x = index ^ key
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _BITS
    return x ^ (x >> 16)


def rounding_key(seed: int, steps: int) -> int:
    """The key of a parameter's random bits in the step after `steps` others."""

    def bits(key: int, index: int) -> int:
        return int(random_bits(key, torch.tensor(index, dtype=torch.int64, device="cpu")))

    return bits(bits(0x9E3779B9, steps), bits(0x85EBCA6B, seed))


def rounded(value: Tensor, parameter: Tensor, key: int | None = None) -> Tensor:
    """A value in its parameter's dtype: the nearest one, or with a key, for bfloat16, at random the one above or below.

    The probabilities are such that the mean over many steps is the value itself. The random bits depend on the key and
    the element's place in memory only.
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
    """What EWC, MAS, SI and SSL add to the loss for one parameter: strength * sum of stiffness * (value - anchor)^2."""
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
    """Two anchors in one, whose penalty is the sum of theirs but for a constant: (stiffness, anchor).

    W_1 (x - a_1)^2 + W_2 (x - a_2)^2 = (W_1 + W_2) (x - a)^2 + constant, with a the mean of a_1 and a_2 weighted by
    W_1 and W_2. So the anchors of any number of tasks need two tensors, exactly. Where both W are zero, a is a_2.
    """
    total = stiffness + new_stiffness
    share = torch.where(total > 0, new_stiffness / total, 1.0)
    return total, torch.lerp(anchor, new_anchor, share)


def path_stiffness(path: Tensor, movement: Tensor, damping: float) -> Tensor:
    """SI's importance of a task that is over: max(omega, 0) / (movement^2 + damping)."""
    return path.clamp(min=0) / (movement**2 + damping)


def per_element(per_neuron: Tensor, parameter: Tensor, neuron_dim: int, groups: int) -> Tensor:
    """Views one value per neuron (N,) so that it broadcasts against `parameter`, whose `neuron_dim` indexes neurons.

    With `groups` > 1 (grouped transposed convolutions) dimension 0 of the parameter runs over groups x inputs and
    neuron i sits in group i // (N / groups), row i % (N / groups) of `neuron_dim`; the result then has the shape of
    the parameter's first `neuron_dim` + 1 dimensions, followed by ones.
    """
    shape = [1] * parameter.ndim
    if groups == 1:
        shape[neuron_dim] = per_neuron.numel()
        return per_neuron.view(shape)
    shape[0], shape[neuron_dim] = parameter.shape[0], parameter.shape[neuron_dim]
    rows = per_neuron.view(groups, -1).repeat_interleave(parameter.shape[0] // groups, dim=0)
    return rows.view(shape)


def update_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    importances: Sequence[Tensor],
    measured: Sequence[Tensor],
    skipped: Tensor,
    layer: Sequence[int],
    neuron_dim: Sequence[int],
    groups: Sequence[int],
    lr: Sequence[float],
    momentum: Sequence[float],
    nesterov: Sequence[bool],
    weight_decay: Sequence[float],
    maximize: Sequence[bool],
    alpha: Sequence[float],
    beta: Sequence[float],
    delta: Sequence[float],
    sigma: Sequence[str],
    active_only: Sequence[bool],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    first_neuron: Sequence[int] | None = None,
    steps: Sequence[Tensor] = (),
    seeds: Sequence[int] = (),
) -> None:
    """Eqs. 3, 4, 7 and Algorithm 1 for a whole network, in place; see `npc_ext.ops.update_` for the arguments."""
    if found_inf is not None and bool(found_inf):
        return
    neurons = _move_layers(importances, measured, skipped, alpha, beta, delta, sigma, active_only)
    for index, parameter in enumerate(parameters):
        where = (layer[index], neuron_dim[index], groups[index])
        first = None if first_neuron is None else first_neuron[index]
        rate, frozen, cleared = _rate(parameter, neurons, *where, lr[index], first)
        descend_(
            parameter,
            _unscaled(gradients[index], grad_scale),
            momentum_buffers[index] if momentum[index] != 0 else None,
            rate,
            frozen,
            momentum[index],
            nesterov[index],
            weight_decay[index],
            maximize[index],
            _rounding_key(index, steps, seeds),
            cleared,
        )
    for count in steps:
        count += 1


class _Neurons(NamedTuple):
    """What a step does with the neurons, or connections, of a layer.

    Attributes:
        plasticity: each one's share of the learning rate (eq. 7); 0 where weights and moments stay as they are.
        cleared: of those, the ones whose first moment becomes 0: they were not frozen before this step, and are now.
    """

    plasticity: Tensor
    cleared: Tensor


def _move_layer(
    average: Tensor,
    measured: Tensor,
    counts: bool,
    alpha: float,
    beta: float,
    delta: float,
    sigma: str,
    active_only: bool,
    normalized: Tensor,
) -> _Neurons:
    """Eqs. 4 and 7 of a layer from its normalized importance, which enters C if it `counts`.

    With `active_only` neurons without a gradient take no part: C, weights and moments stay as they are.
    """
    was_free = plasticity(average, alpha, beta, sigma) != 0
    active = ~received_no_gradient(measured) if active_only else torch.ones_like(measured, dtype=torch.bool)
    if counts:
        average.copy_(torch.where(active, moving_average(average, normalized, delta), average))
    share = plasticity(average, alpha, beta, sigma)
    return _Neurons(torch.where(active, share, 0), active & was_free & (share == 0))


def _move_layers(
    importances: Sequence[Tensor],
    measured: Sequence[Tensor],
    skipped: Tensor,
    alpha: Sequence[float],
    beta: Sequence[float],
    delta: Sequence[float],
    sigma: Sequence[str],
    active_only: Sequence[bool],
) -> list[_Neurons]:
    """Eqs. 3, 4 and 7 of all layers. Sums that are not finite are counted and left out."""
    result = []
    for index, (average, sums) in enumerate(zip(importances, measured, strict=True)):
        constants = (alpha[index], beta[index], delta[index], sigma[index])
        if sums.numel() == 0:
            result.append(_move_layer(average, torch.ones_like(average), False, *constants, False, average))
            continue
        total = float(sums.sum())
        if not math.isfinite(total):
            skipped[index] += 1
        normalized = normalize(sums.to(average.dtype), active_only[index])
        counts = math.isfinite(total) and total > 0
        result.append(_move_layer(average, sums, counts, *constants, active_only[index], normalized))
    return result


def _rate(
    parameter: Tensor,
    neurons: Sequence[_Neurons],
    layer: int,
    neuron_dim: int,
    groups: int,
    lr: float,
    first_neuron: int | None,
) -> tuple[Tensor | float, Tensor | bool, Tensor | bool]:
    """Eq. 7 for the elements of a parameter, which are frozen, and which lose their first moment.

    A shard's rows begin with the neuron `first_neuron`; None for whole parameters.
    """
    if layer < 0:
        return lr, False, False
    share, cleared = neurons[layer]
    if first_neuron is not None:
        rows = parameter.shape[neuron_dim] * groups
        share, cleared = share.narrow(0, first_neuron, rows), cleared.narrow(0, first_neuron, rows)
    share = per_element(share.to(compute_dtype(parameter.dtype)), parameter, neuron_dim, groups)
    return lr * share, share == 0, per_element(cleared, parameter, neuron_dim, groups)


def _unscaled(gradient: Tensor, grad_scale: Tensor | None) -> Tensor:
    return gradient if grad_scale is None else gradient.to(compute_dtype(gradient.dtype)) / grad_scale


def _rounding_key(index: int, steps: Sequence[Tensor], seeds: Sequence[int]) -> int | None:
    return rounding_key(seeds[index], int(steps[index])) if seeds and seeds[index] >= 0 else None


def adam_update_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    steps: Sequence[Tensor],
    importances: Sequence[Tensor],
    measured: Sequence[Tensor],
    skipped: Tensor,
    layer: Sequence[int],
    neuron_dim: Sequence[int],
    groups: Sequence[int],
    lr: Sequence[float],
    first_decay: Sequence[float],
    second_decay: Sequence[float],
    epsilon: Sequence[float],
    weight_decay: Sequence[float],
    maximize: Sequence[bool],
    alpha: Sequence[float],
    beta: Sequence[float],
    delta: Sequence[float],
    sigma: Sequence[str],
    active_only: Sequence[bool],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    first_neuron: Sequence[int] | None = None,
    seeds: Sequence[int] = (),
) -> None:
    """Eqs. 3, 4, 7 and Adam's step for a whole network, in place; see `npc_ext.ops.adam_update_` for the arguments."""
    if found_inf is not None and bool(found_inf):
        return
    neurons = _move_layers(importances, measured, skipped, alpha, beta, delta, sigma, active_only)
    for index, parameter in enumerate(parameters):
        where = (layer[index], neuron_dim[index], groups[index])
        first = None if first_neuron is None else first_neuron[index]
        rate, frozen, cleared = _rate(parameter, neurons, *where, lr[index], first)
        adam_(
            parameter,
            _unscaled(gradients[index], grad_scale),
            first_moments[index],
            second_moments[index],
            int(steps[index]) + 1,
            rate,
            frozen,
            first_decay[index],
            second_decay[index],
            epsilon[index],
            weight_decay[index],
            maximize[index],
            _rounding_key(index, steps, seeds),
            cleared,
        )
    for count in steps:
        count += 1


def anchored_update_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    stiffness: Sequence[Tensor],
    anchors: Sequence[Tensor],
    paths: Sequence[Tensor],
    strength: Sequence[float],
    implicit: Sequence[bool],
    lr: Sequence[float],
    momentum: Sequence[float],
    nesterov: Sequence[bool],
    weight_decay: Sequence[float],
    maximize: Sequence[bool],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """SGD with anchors and path integrals, in place; see `npc_ext.ops.anchored_update_` for the arguments."""
    if found_inf is not None and bool(found_inf):
        return
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        before = parameter.to(compute_dtype(parameter.dtype), copy=True)
        loss_gradient = gradient.to(before.dtype) * (-1 if maximize[index] else 1)
        if grad_scale is not None:
            loss_gradient = loss_gradient / grad_scale
        has_anchor, whole, moved = stiffness[index].numel() > 0, loss_gradient, before.clone()
        if has_anchor and not implicit[index]:
            whole = whole + anchor_gradient(before, anchors[index], stiffness[index], strength[index])
        buffer = momentum_buffers[index] if momentum[index] != 0 else None
        options = (momentum[index], nesterov[index], weight_decay[index])
        descend_(moved, whole, buffer, lr[index], False, *options)
        if has_anchor and implicit[index]:
            scales = (strength[index], lr[index], momentum[index])
            moved = towards_anchor(moved, anchors[index], stiffness[index], *scales)
        parameter.copy_(moved)
        if paths[index].numel():
            paths[index].sub_(loss_gradient * (parameter.to(before.dtype) - before))


def connection_update_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    importances: Sequence[Tensor],
    skipped: Tensor,
    layer: Sequence[int],
    lr: Sequence[float],
    momentum: Sequence[float],
    nesterov: Sequence[bool],
    weight_decay: Sequence[float],
    maximize: Sequence[bool],
    alpha: Sequence[float],
    beta: Sequence[float],
    delta: Sequence[float],
    sigma: Sequence[str],
    active_only: Sequence[bool],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """CPC: eqs. 3, 4, 7 and Algorithm 1 for each connection; see `npc_ext.ops.connection_update_`."""
    if found_inf is not None and bool(found_inf):
        return
    connections: dict[int, _Neurons] = {}  # by parameter
    for at in range(len(alpha)):
        own = [index for index, of in enumerate(layer) if of == at]
        if not own:
            continue
        measured = [connection_importance(parameters[index], gradients[index]) for index in own]
        everything = torch.cat([sums.flatten() for sums in measured])
        total = float(everything.sum())
        if not math.isfinite(total):
            skipped[at] += 1
        counts = math.isfinite(total) and total > 0
        normalized = normalize(everything, active_only[at]).split([sums.numel() for sums in measured])
        constants = (alpha[at], beta[at], delta[at], sigma[at], active_only[at])
        for index, sums, new in zip(own, measured, normalized, strict=True):
            connections[index] = _move_layer(importances[index], sums, counts, *constants, new.view_as(sums))
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        rate: Tensor | float = lr[index]
        frozen: Tensor | bool = False
        cleared: Tensor | bool = False
        if index in connections:
            share, cleared = connections[index]
            rate, frozen = lr[index] * share.to(compute_dtype(parameter.dtype)), share == 0
        buffer = momentum_buffers[index] if momentum[index] != 0 else None
        options = (momentum[index], nesterov[index], weight_decay[index], maximize[index])
        descend_(parameter, _unscaled(gradient, grad_scale), buffer, rate, frozen, *options, cleared=cleared)


def network_step_(
    activations: Sequence[Tensor],
    activation_gradients: Sequence[Tensor],
    channel_dim: Sequence[int],
    batch_dim: Sequence[int],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    importances: Sequence[Tensor],
    skipped: Tensor,
    layer: Sequence[int],
    neuron_dim: Sequence[int],
    groups: Sequence[int],
    lr: Sequence[float],
    momentum: Sequence[float],
    nesterov: Sequence[bool],
    weight_decay: Sequence[float],
    maximize: Sequence[bool],
    alpha: Sequence[float],
    beta: Sequence[float],
    delta: Sequence[float],
    sigma: Sequence[str],
    active_only: Sequence[bool],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """A whole NPC step from every layer's activation and its gradient: `importance`, then `update_`."""
    measured = [
        importance(*arguments)
        for arguments in zip(activations, activation_gradients, channel_dim, batch_dim, strict=True)
    ]
    update_(
        parameters,
        gradients,
        momentum_buffers,
        importances,
        measured,
        skipped,
        layer,
        neuron_dim,
        groups,
        lr,
        momentum,
        nesterov,
        weight_decay,
        maximize,
        alpha,
        beta,
        delta,
        sigma,
        active_only,
        grad_scale,
        found_inf,
    )


def layer_step_(
    activation: Tensor,
    activation_gradient: Tensor,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    importance: Tensor,
    skipped: Tensor,
    neuron_dim: Sequence[int],
    groups: Sequence[int],
    channel_dim: int = 1,
    batch_dim: int = 0,
    lr: float = 0.1,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    alpha: float = 0.5,
    beta: float = 0.5,
    delta: float = 1 - 2e-4,
    sigma: str = "sigmoid",
    active_only: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """`network_step_` for one layer whose parameters share their options."""
    count = len(parameters)
    network_step_(
        [activation],
        [activation_gradient],
        [channel_dim],
        [batch_dim],
        parameters,
        gradients,
        momentum_buffers,
        [importance],
        skipped,
        [0] * count,
        neuron_dim,
        groups,
        [lr] * count,
        [momentum] * count,
        [nesterov] * count,
        [weight_decay] * count,
        [maximize] * count,
        [alpha],
        [beta],
        [delta],
        [sigma],
        [active_only],
        grad_scale,
        found_inf,
    )
