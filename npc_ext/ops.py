"""The operations, with checked arguments, for eager code, autograd-free loops and `torch.compile`.

Each is registered as `torch.ops.npc_ext.<name>` with a schema, a kernel and a fake kernel. On CPU and CUDA the compiled
kernels do the work; on other devices, for float64 on CUDA, and where the compiled kernels are missing (which is said
once), the plain PyTorch of `npc_ext.reference` does, which has the same functions with the same signatures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._torch import listening_modes
from ._warn import warn
from .kernels import launch, native
from .kernels.checks import (
    check_activation,
    check_beside,
    check_layers,
    check_lengths,
    check_network,
    check_pair,
    check_parameters,
    check_rounding,
    check_sigma,
    check_skipped,
)

_library = torch.library.Library("npc_ext", "DEF")

_NETWORK = "Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] momentum_buffers, Tensor(c!)[] importances, "
_OPTIONS = (
    "Tensor(d!) skipped, int[] layer, int[] neuron_dim, int[] groups, float[] lr, float[] momentum, bool[] nesterov, "
    "float[] weight_decay, bool[] maximize, float[] alpha, float[] beta, float[] delta, str[] sigma, "
    "bool[] active_only, Tensor? grad_scale=None, Tensor? found_inf=None"
)
_ROUNDING = "Tensor(e!)[] steps, int[] seeds"
_SCHEMAS = (
    "importance(Tensor activation, Tensor gradient, int channel_dim=1, int batch_dim=0) -> Tensor",
    "relu_backward_importance(Tensor output, Tensor gradient, int channel_dim=1, int batch_dim=0) -> (Tensor, Tensor)",
    f"update_({_NETWORK}Tensor[] measured, {_OPTIONS}, int[]? first_neuron=None, *, {_ROUNDING}) -> ()",
    "adam_update_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first_moments, "
    "Tensor(c!)[] second_moments, Tensor(d!)[] steps, Tensor(e!)[] importances, Tensor[] measured, "
    "Tensor(f!) skipped, int[] layer, int[] neuron_dim, int[] groups, float[] lr, float[] first_decay, "
    "float[] second_decay, float[] epsilon, float[] weight_decay, bool[] maximize, float[] alpha, float[] beta, "
    "float[] delta, str[] sigma, bool[] active_only, Tensor? grad_scale=None, Tensor? found_inf=None, "
    "int[]? first_neuron=None, int[] seeds=[]) -> ()",
    "anchored_update_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] momentum_buffers, Tensor[] stiffness, "
    "Tensor[] anchors, Tensor(c!)[] paths, float[] strength, bool[] implicit, float[] lr, float[] momentum, "
    "bool[] nesterov, float[] weight_decay, bool[] maximize, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
    "connection_update_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] importances, Tensor(d!) skipped, int[] layer, float[] lr, float[] momentum, bool[] nesterov, "
    "float[] weight_decay, bool[] maximize, float[] alpha, float[] beta, float[] delta, str[] sigma, "
    "bool[] active_only, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
    "network_step_(Tensor[] activations, Tensor[] activation_gradients, int[] channel_dim, int[] batch_dim, "
    f"{_NETWORK}{_OPTIONS}) -> ()",
    "layer_step_(Tensor activation, Tensor activation_gradient, Tensor(a!)[] parameters, Tensor[] gradients, "
    "Tensor(b!)[] momentum_buffers, Tensor(c!) importance, Tensor(d!) skipped, int[] neuron_dim, int[] groups, "
    "int channel_dim=1, int batch_dim=0, float lr=0.1, float momentum=0.0, bool nesterov=False, "
    "float weight_decay=0.0, bool maximize=False, float alpha=0.5, float beta=0.5, float delta=0.9998, "
    'str sigma="sigmoid", bool active_only=False, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()',
)
for _schema in _SCHEMAS:
    _library.define(_schema)


def importance(activation: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0) -> Tensor:
    """How much each neuron of a layer matters to the loss: a_i = sum over b of |sum over p of n_bip * dL/dn_bip|.

    That is eq. 2 of the NPC paper without its two means, which eq. 3 cancels. One pass over the two tensors, in any
    memory layout, without copies; the same input gives the same bits for a given number of threads.

    Args:
        activation: n, at least two-dimensional: samples, neurons and any number of positions. float32, float16,
            bfloat16 or float64, any strides.
        gradient: dL/dn, of the same shape and dtype, on the same device.
        channel_dim: the dimension that counts neurons: 1 after convolutions, -1 after linear layers.
        batch_dim: the dimension that counts samples; all others are positions.

    Returns:
        (N,), summed and returned in float32, for float64 input in float64. A neuron that received no gradient (dL/dn
        is 0 everywhere) has -0.0; added to anything else that is lost, so sums keep the meaning.

    Raises:
        ValueError: shapes, dtypes, devices or dimensions do not fit.
    """
    check_pair("activation", activation, gradient, channel_dim, batch_dim)
    return importance_of_checked(activation, gradient, channel_dim, batch_dim)


def importance_of_checked(activation: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0) -> Tensor:
    """`importance` for a caller who knows that its arguments fit, as autograd does of a tensor and its gradient."""
    if _is_plain_call(activation, gradient) and native_takes((activation,)):
        return launch.importance(activation, gradient, channel_dim, batch_dim)
    return torch.ops.npc_ext.importance.default(activation, gradient, channel_dim, batch_dim)


@torch.no_grad()
def relu_backward_importance(
    output: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0
) -> tuple[Tensor, Tensor]:
    """The backward pass of ReLU and the `importance` at its output, both from the two tensors that the former reads.

    Args:
        output: y = max(x, 0), at least two-dimensional, as `activation` in `importance`.
        gradient: dL/dy, of the same shape and dtype, on the same device.
        channel_dim, batch_dim: as in `importance`.

    Returns:
        dL/dx, like `output`: `gradient` where y > 0 (or NaN, as in torch), else 0; and `importance(output, gradient)`.

    Raises:
        ValueError: shapes, dtypes, devices or dimensions do not fit.
    """
    check_pair("output", output, gradient, channel_dim, batch_dim)
    return relu_backward_importance_of_checked(output, gradient, channel_dim, batch_dim)


def relu_backward_importance_of_checked(
    output: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0
) -> tuple[Tensor, Tensor]:
    """`relu_backward_importance` for a caller who knows that its arguments fit, and records no gradients."""
    if _is_plain_call(output, gradient) and native_takes((output,)):
        return _relu_backward_importance(output, gradient, channel_dim, batch_dim)
    return torch.ops.npc_ext.relu_backward_importance.default(output, gradient, channel_dim, batch_dim)


@torch.no_grad()
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
    """Eqs. 3, 4 and 7 and the weight update for all layers of a network in one call, in place.

    Lists over parameters (P of them) and over layers (L of them) run side by side.

    Args:
        parameters: P tensors, changed in place: w <- w - lr s_i (dw + weight_decay w), with eq. 7's share
            s_i = min(1, alpha sqrt(max(beta / C_i - 1, 0))) of the neuron, and with momentum as in
            `torch.optim.SGD`. Rows of frozen neurons (C_i >= beta) stay bit-identical; long ones are neither
            read nor written, nor is their momentum.
        gradients: P tensors like the parameters.
        momentum_buffers: P tensors like the parameters, changed in place; those of parameters with momentum 0 are
            ignored (an empty tensor will do), and the whole list may be empty if all are. The rows of a neuron that
            freezes in this call (C_i >= beta after it, but not before) are set to 0.
        importances: L float32 tensors (N,), the moving averages C, changed in place.
        measured: L float32 tensors (N,), sums from `importance`; an empty tensor leaves that layer's C as it is, as
            do sums of zero and, counted in `skipped`, sums that are not finite. To clear sums, fill them with -0.0.
        skipped: (L,) int64, changed in place.
        layer: for each parameter its layer, or -1 for a parameter that trains at plain `lr`.
        neuron_dim: for each parameter the dimension that counts neurons.
        groups: for each parameter 1, or the groups of a grouped transposed convolution's weight.
        lr, momentum, nesterov, weight_decay, maximize: for each parameter.
        alpha, beta, delta: for each layer the constants of eqs. 4 and 7; alpha is in units of lr.
        sigma: for each layer "sigmoid", "tanh" or "erf".
        active_only: for each layer, whether neurons whose measured sum is -0.0 (they received no gradient) take no
            part: eq. 3's mean is over the others, and their importance, weights and momentum stay as they are.
        grad_scale: one element by which gradients are divided, or None.
        found_inf: one element; if it is not zero nothing is changed at all.
        first_neuron: for each parameter the neuron that its first row belongs to, where parameters are shards, blocks
            of rows of larger ones. By default they are whole, as are those with groups.
        steps: empty, or for each parameter one float32, how many steps it has taken, raised by one; an empty tensor
            where nobody counts.
        seeds: empty, or for each parameter -1, or for a bfloat16 one whose steps are counted a seed: its values are
            then rounded stochastically. The random bits depend on the seed, the steps and the element only.

    Raises:
        ValueError: lengths, shapes, dtypes, devices or layouts do not fit. Nothing is changed then.
    """
    network = (parameters, gradients, momentum_buffers, importances, skipped, layer, neuron_dim, groups, momentum)
    check_network(*network, first_neuron)
    check_layers(importances, measured, alpha=alpha, beta=beta, delta=delta, sigma=sigma)
    check_rounding(parameters, steps, seeds)
    torch.ops.npc_ext.update_.default(
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
        check_sigma(sigma),
        active_only,
        grad_scale,
        found_inf,
        first_neuron,
        steps=steps,
        seeds=seeds,
    )


@torch.no_grad()
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
    """`update_` with the step of `torch.optim.AdamW`, of which each neuron takes a share, in one call, in place.

        w <- w - s_i lr (m' / (sqrt(v') + epsilon) + weight_decay w)

    with the share s_i as in `update_`, the moving averages m of the gradient and v of its square, m' and v' freed of
    their bias.

    Args:
        parameters, gradients: as in `update_`. Rows of frozen neurons (C_i >= beta) stay bit-identical, and so do
            their moments; in the call that freezes them their first moment is set to 0.
        first_moments, second_moments: m and v, like the parameters, but float32 for halves; changed in place.
        steps: for each parameter one float32, how many steps it has taken, raised by one.
        importances, measured, skipped, layer, neuron_dim, groups: as in `update_`.
        lr, weight_decay, maximize: for each parameter, as in `torch.optim.AdamW`.
        first_decay, second_decay, epsilon: for each parameter AdamW's betas and eps.
        alpha, beta, delta, sigma, active_only: as in `update_`.
        grad_scale, found_inf, first_neuron, seeds: as in `update_`.

    Raises:
        ValueError: lengths, shapes, dtypes, devices or layouts do not fit. Nothing is changed then.
    """
    count = len(parameters)
    no_momentum: list[Tensor] = []
    network = (parameters, gradients, no_momentum, importances, skipped, layer, neuron_dim, groups, [0.0] * count)
    check_network(*network, first_neuron)
    check_layers(importances, measured, alpha=alpha, beta=beta, delta=delta, sigma=sigma)
    check_lengths(count, first_moments=first_moments, second_moments=second_moments, steps=steps)
    check_lengths(count, lr=lr, first_decay=first_decay, second_decay=second_decay, epsilon=epsilon)
    for index, parameter in enumerate(parameters):
        for name, moments in (("first_moments", first_moments), ("second_moments", second_moments)):
            check_beside(f"{name}[{index}]", moments[index], parameter, reference.compute_dtype(parameter.dtype))
        if steps[index].numel() != 1:
            raise ValueError(f"steps[{index}] has {steps[index].numel()} elements; Adam counts every parameter's steps")
    check_rounding(parameters, steps, seeds)
    torch.ops.npc_ext.adam_update_.default(
        parameters,
        gradients,
        first_moments,
        second_moments,
        steps,
        importances,
        measured,
        skipped,
        layer,
        neuron_dim,
        groups,
        lr,
        first_decay,
        second_decay,
        epsilon,
        weight_decay,
        maximize,
        alpha,
        beta,
        delta,
        check_sigma(sigma),
        active_only,
        grad_scale,
        found_inf,
        first_neuron,
        seeds,
    )


@torch.no_grad()
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
    """The weight update of EWC, MAS, SI and SSL for a whole network in one call, in place: SGD with anchors.

    Adds the penalty strength * stiffness * (w - anchor)^2 of every weight w to the loss. Lists run over parameters.

    Args:
        parameters: changed in place. An implicit pull is a proximal step after the step that `torch.optim.SGD` takes
            along dL/dw, see `npc_ext.baselines.anchored.Anchored`. An explicit one adds the penalty's gradient to
            dL/dw.
        gradients: dL/dw, like the parameters, without the penalty's.
        momentum_buffers: as in `update_`.
        stiffness, anchors: like the parameters, but float32 for halves; empty tensors where there is no penalty.
            Implicit anchors ignore elements whose stiffness is not above 0.
        paths: like `stiffness`, changed in place: SI's path integral, from which dL/dw times the weight's movement is
            taken; empty tensors where none is wanted.
        strength: the penalties' factors.
        implicit: whether the pull to the anchors is implicit, which requires a momentum below 1.
        lr, momentum, nesterov, weight_decay, maximize: as in `torch.optim.SGD`.
        grad_scale, found_inf: as in `update_`.

    Raises:
        ValueError: lengths, shapes, dtypes, devices or layouts do not fit. Nothing is changed then.
    """
    count = len(parameters)
    check_lengths(count, gradients=gradients, stiffness=stiffness, anchors=anchors, paths=paths, strength=strength)
    check_lengths(count, implicit=implicit)
    check_parameters(parameters, gradients, momentum_buffers, momentum)
    for index, parameter in enumerate(parameters):
        for name, tensors in (("stiffness", stiffness), ("anchors", anchors), ("paths", paths)):
            if tensors[index].numel():
                check_beside(f"{name}[{index}]", tensors[index], parameter, reference.compute_dtype(parameter.dtype))
        if stiffness[index].numel() != anchors[index].numel():
            raise ValueError(f"stiffness[{index}] and anchors[{index}] go together, but one of them is empty")
        if implicit[index] and not momentum[index] < 1:
            raise ValueError(f"momentum[{index}] is {momentum[index]}; implicit anchors need a momentum below 1")
    torch.ops.npc_ext.anchored_update_.default(
        parameters,
        gradients,
        momentum_buffers,
        stiffness,
        anchors,
        paths,
        strength,
        implicit,
        lr,
        momentum,
        nesterov,
        weight_decay,
        maximize,
        grad_scale,
        found_inf,
    )


@torch.no_grad()
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
    """CPC for a whole network in one call, in place: `update_` with an importance and a rate to every connection.

    The importance |w dL/dw| of a connection takes the place of a neuron's; eq. 3's mean is over all connections of the
    layer.

    Args:
        parameters, gradients, momentum_buffers: as in `update_`. Frozen connections (C >= beta) stay bit-identical.
            With `active_only`, connections whose gradient is 0 take no part.
        importances: for each parameter a float32 tensor of its shape, the moving averages C, changed in place; an
            empty tensor where `layer` is -1.
        skipped, layer, lr, ...: as in `update_`.

    Raises:
        ValueError: lengths, shapes, dtypes, devices or layouts do not fit. Nothing is changed then.
    """
    count, layers = len(parameters), len(alpha)
    check_lengths(count, gradients=gradients, importances=importances, layer=layer)
    check_lengths(layers, beta=beta, delta=delta, sigma=sigma, active_only=active_only)
    check_skipped(skipped, layers)
    check_parameters(parameters, gradients, momentum_buffers, momentum, skipped=[skipped])
    for index, parameter in enumerate(parameters):
        if layer[index] >= layers:
            raise ValueError(f"layer[{index}] is {layer[index]}, but there are {layers} layers")
        if layer[index] >= 0:
            check_beside(f"importances[{index}]", importances[index], parameter, torch.float32)
    torch.ops.npc_ext.connection_update_.default(
        parameters,
        gradients,
        momentum_buffers,
        importances,
        skipped,
        layer,
        lr,
        momentum,
        nesterov,
        weight_decay,
        maximize,
        alpha,
        beta,
        delta,
        check_sigma(sigma),
        active_only,
        grad_scale,
        found_inf,
    )


@torch.no_grad()
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
    """A whole NPC step in one call: `importance` of every layer from its activation, then `update_`, in place.

    On CUDA it is a single cooperative launch. It saves launches, which is what small networks spend their time on. For
    large ones `importance` for each layer and `update_` should be faster: this kernel is compiled for every layout and
    dtype at once, so fewer of its blocks fit on a multiprocessor (docs/kernels.md). Where the one overtakes the other
    is not measured.

    Args:
        activations, activation_gradients, channel_dim, batch_dim: for each layer what `importance` takes.
        parameters, ...: as in `update_`.

    Raises:
        ValueError: as in `importance` and `update_`. Nothing is changed then.
    """
    layers = len(importances)
    check_network(parameters, gradients, momentum_buffers, importances, skipped, layer, neuron_dim, groups, momentum)
    check_lengths(
        layers,
        activations=activations,
        activation_gradients=activation_gradients,
        channel_dim=channel_dim,
        batch_dim=batch_dim,
        sigma=sigma,
    )
    for index in range(layers):
        check_activation(
            f"[{index}]",
            activations[index],
            activation_gradients[index],
            channel_dim[index],
            batch_dim[index],
            importances[index],
        )
    torch.ops.npc_ext.network_step_.default(
        activations,
        activation_gradients,
        channel_dim,
        batch_dim,
        parameters,
        gradients,
        momentum_buffers,
        importances,
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
        check_sigma(sigma),
        active_only,
        grad_scale,
        found_inf,
    )


@torch.no_grad()
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
    """`network_step_` for one layer whose parameters share their options: from n and dL/dn to the new weights.

    Args:
        activation, activation_gradient, channel_dim, batch_dim: as in `importance`.
        parameters, gradients, momentum_buffers, neuron_dim, groups: the layer's own, as in `update_`.
        importance: (N,) float32, the moving average C, changed in place.
        skipped: (1,) int64, changed in place.
        lr, ...: as in `update_`, one value for all.

    Raises:
        ValueError: as in `importance` and `update_`. Nothing is changed then.
    """
    count = len(parameters)
    check_network(
        parameters,
        gradients,
        momentum_buffers,
        [importance],
        skipped,
        [0] * count,
        neuron_dim,
        groups,
        [momentum] * count,
    )
    check_activation("", activation, activation_gradient, channel_dim, batch_dim, importance)
    torch.ops.npc_ext.layer_step_.default(
        activation,
        activation_gradient,
        parameters,
        gradients,
        momentum_buffers,
        importance,
        skipped,
        neuron_dim,
        groups,
        channel_dim,
        batch_dim,
        lr,
        momentum,
        nesterov,
        weight_decay,
        maximize,
        alpha,
        beta,
        delta,
        check_sigma([sigma])[0],
        active_only,
        grad_scale,
        found_inf,
    )


# ----------------------------------------------------------------------------------------------------------- kernels


@cache
def _warn_without_native(kernels: str, reason: str) -> None:
    warn(
        f"npc_ext's {kernels} kernels are not available, plain PyTorch is used instead, which is slower: {reason} "
        "('python -m npc_ext' says how to fix it)",
        RuntimeWarning,
    )


def _is_plain_call(*tensors: Tensor) -> bool:
    """Whether nobody listens in on operations: no compiler, no dispatch mode, no tensor subclass.

    PyTorch's dispatcher takes 5 microseconds to come back to Python, as long as the work on a small layer takes.
    """
    if torch.compiler.is_compiling() or listening_modes() > 0:
        return False
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return False
    return True


# The options of update_ and network_step_ from `layer` to `active_only`; grad_scale, found_inf (and update_'s
# first_neuron) follow, as far as they are given.
_CONSTANTS = 13
_ADAM_CONSTANTS = 14


def native_takes(tensors: Iterable[Tensor]) -> bool:
    """Whether the compiled kernels do the work on these tensors; warns, once, if they would but are missing."""
    gpu = None
    for tensor in tensors:
        if not launch.supports(tensor):
            return False
        if tensor.is_cuda:
            gpu = tensor.device.index
    reason = native.status().reason if gpu is None else native.why_not_on(gpu)
    if reason:
        _warn_without_native("compiled" if gpu is None else "CUDA", reason)
    return not reason


def _importance(activation: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0) -> Tensor:
    kernel = launch.importance if native_takes((activation, gradient)) else reference.importance
    return kernel(activation, gradient, channel_dim, batch_dim)


def _relu_backward_importance(
    output: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0
) -> tuple[Tensor, Tensor]:
    if launch.has_relu_backward(output) and native_takes((output, gradient)):
        return launch.relu_backward_importance(output, gradient, channel_dim, batch_dim)
    grad_input = torch.empty_like(output)
    torch.ops.aten.threshold_backward.grad_input(gradient, output, 0, grad_input=grad_input)
    return grad_input, _importance(output, gradient, channel_dim, batch_dim)


def _update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    momentum_buffers: list[Tensor],
    importances: list[Tensor],
    measured: list[Tensor],
    skipped: Tensor,
    *options: Any,
    steps: list[Tensor],
    seeds: list[int],
) -> None:
    constants, (*flags, first_neuron) = options[:_CONSTANTS], [*options[_CONSTANTS:], *[None] * 3][:3]
    update: Callable[..., None] = reference.update_
    given: list[Any] = [measured, skipped, *constants, *flags, first_neuron, steps, seeds]
    if native_takes([*parameters, *importances]):
        neurons = [average.numel() for average in importances]
        tables = launch.Tables(parameters, neurons, *constants, first_neuron=first_neuron)
        update = partial(launch.update_, tables)
        gradients = list(map(launch.in_memory_order_of, parameters, gradients))
        given = [_given(measured), skipped, None, *flags, _given(steps), seeds]
    update(parameters, gradients, momentum_buffers, importances, *given)


def _adam_update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    steps: list[Tensor],
    importances: list[Tensor],
    measured: list[Tensor],
    skipped: Tensor,
    *options: Any,
) -> None:
    beside = (first_moments, second_moments, steps, importances)
    if native_takes([*parameters, *importances]):
        constants, rest = options[:_ADAM_CONSTANTS], [*options[_ADAM_CONSTANTS:], *[None] * 3][:3]
        (*flags, first_neuron), seeds = rest, options[_ADAM_CONSTANTS + 3 :]
        neurons = [average.numel() for average in importances]
        tables = launch.AdamTables(parameters, neurons, *constants, first_neuron=first_neuron)
        ordered = list(map(launch.in_memory_order_of, parameters, gradients))
        launch.adam_update_(tables, parameters, ordered, *beside, _given(measured), skipped, None, *flags, *seeds)
    else:
        reference.adam_update_(parameters, gradients, *beside, measured, skipped, *options)


def _given(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [tensor if tensor.numel() else None for tensor in tensors]


def _anchored_update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    momentum_buffers: list[Tensor],
    stiffness: list[Tensor],
    anchors: list[Tensor],
    paths: list[Tensor],
    *options: Any,
) -> None:
    if not parameters:
        return
    if native_takes(parameters):
        constants, flags = options[:7], options[7:]
        tables = launch.AnchoredTables(parameters, *constants)
        ordered = list(map(launch.in_memory_order_of, parameters, gradients))
        network = (parameters, ordered, momentum_buffers, _given(stiffness), _given(anchors), _given(paths))
        launch.anchored_update_(tables, *network, *flags)
    else:
        beside = (stiffness, anchors, paths)
        reference.anchored_update_(parameters, gradients, momentum_buffers, *beside, *options)


def _connection_update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    momentum_buffers: list[Tensor],
    importances: list[Tensor],
    skipped: Tensor,
    layer: list[int],
    *options: Any,
) -> None:
    if native_takes(parameters):
        constants, flags = options[:10], options[10:]
        whole = ([0] * len(parameters), [1] * len(parameters))
        tables = launch.Tables(parameters, [0] * skipped.numel(), layer, *whole, *constants)
        ordered = list(map(launch.in_memory_order_of, parameters, gradients))
        averages = [one if at >= 0 else None for one, at in zip(importances, layer, strict=True)]
        launch.connection_update_(tables, parameters, ordered, momentum_buffers, averages, skipped, None, *flags)
    else:
        network = (parameters, gradients, momentum_buffers, importances, skipped, layer)
        reference.connection_update_(*network, *options)


def _network_step(
    activations: list[Tensor],
    activation_gradients: list[Tensor],
    channel_dim: list[int],
    batch_dim: list[int],
    parameters: list[Tensor],
    gradients: list[Tensor],
    momentum_buffers: list[Tensor],
    importances: list[Tensor],
    skipped: Tensor,
    *options: Any,
) -> None:
    inputs: list[Any] = [activations, activation_gradients, channel_dim, batch_dim]
    if native_takes([*activations, *parameters, *importances]):
        constants, flags = options[:_CONSTANTS], options[_CONSTANTS:]
        tables = launch.Tables(parameters, [average.numel() for average in importances], *constants)
        ordered = list(map(launch.in_memory_order_of, parameters, gradients))
        network: list[Any] = [parameters, ordered, momentum_buffers, importances, skipped]
        launch.network_step_(tables, *inputs, *network, *flags)
    else:
        network = [parameters, gradients, momentum_buffers, importances, skipped]
        reference.network_step_(*inputs, *network, *options)


def _layer_step(
    activation: Tensor,
    activation_gradient: Tensor,
    parameters: list[Tensor],
    gradients: list[Tensor],
    momentum_buffers: list[Tensor],
    importance: Tensor,
    skipped: Tensor,
    neuron_dim: list[int],
    groups: list[int],
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
    per_parameter = [[value] * len(parameters) for value in (lr, momentum, nesterov, weight_decay, maximize)]
    _network_step(
        [activation],
        [activation_gradient],
        [channel_dim],
        [batch_dim],
        parameters,
        gradients,
        momentum_buffers,
        [importance],
        skipped,
        [0] * len(parameters),
        neuron_dim,
        groups,
        *per_parameter,
        [alpha],
        [beta],
        [delta],
        [sigma],
        [active_only],
        grad_scale,
        found_inf,
    )


def _fake_importance(activation: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0) -> Tensor:
    dtype = reference.compute_dtype(activation.dtype)
    return activation.new_empty(activation.shape[channel_dim], dtype=dtype)


def _fake_relu_backward_importance(
    output: Tensor, gradient: Tensor, channel_dim: int = 1, batch_dim: int = 0
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(output), _fake_importance(output, gradient, channel_dim, batch_dim)


def _fake_nothing(*arguments: Any, **options: Any) -> None:
    return None


_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "importance": (_importance, _fake_importance),
    "relu_backward_importance": (_relu_backward_importance, _fake_relu_backward_importance),
    "update_": (_update, _fake_nothing),
    "adam_update_": (_adam_update, _fake_nothing),
    "anchored_update_": (_anchored_update, _fake_nothing),
    "connection_update_": (_connection_update, _fake_nothing),
    "network_step_": (_network_step, _fake_nothing),
    "layer_step_": (_layer_step, _fake_nothing),
}
for _name, (_kernel, _fake) in _KERNELS.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"npc_ext::{_name}", _fake, lib=_library)
