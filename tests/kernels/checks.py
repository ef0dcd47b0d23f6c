"""Checks that the tests of all updates share, above all the comparison with the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from npc_ext import ops, reference

from ..tolerances import U, assert_adam_stepped, assert_average, assert_stepped
from .arguments import WRITTEN, Arguments, call, copied, exact


def check(operation: str, arguments: Arguments) -> None:
    """Calls an update and compares all that it changes with the reference in float64.

    Weights and moments are compared with a step from the importance that the kernel has computed, because eq. 7 is not
    continuous where neurons freeze. What rests is compared bit for bit.
    """
    before, want = copied(arguments), exact(arguments)
    call(getattr(ops, operation), arguments)
    call(getattr(reference, operation), want)
    if "importances" in arguments:
        assert torch.equal(arguments["nonfinite_steps"], want["nonfinite_steps"])
        _compare_averages(arguments, want)
        rests = assert_rests(arguments, before)
        want = exact(before | {"importances": arguments["importances"]})
        want["delta"] = [1.0] * len(want["delta"])  # importance stays
        for index, rest in rests.items():
            for name in ("momentum_buffers", "first_moments"):
                if name in want:
                    want[name][index][rest.cleared] = 0
        call(getattr(reference, operation), want)
    compare = {"adam_update_": _compare_adam, "anchored_update_": _compare_anchored}
    compare.get(operation, _compare_sgd)(exact(before), arguments, want)


def _compare_averages(got: Arguments, want: Arguments) -> None:
    for index, (average, exact_average) in enumerate(zip(got["importances"], want["importances"], strict=True)):
        if average is None:
            continue
        size = average.numel()
        if "measured" not in got:  # of connections
            layers = zip(got["parameters"], got["layer"], strict=True)
            size = sum(parameter.numel() for parameter, layer in layers if layer == got["layer"][index])
        assert_average(average, exact_average, size)


def _largest_step(before: Arguments, index: int) -> Tensor:
    """Every term of the gradient and its decay in absolute value: the scale of their rounding."""
    gradient = before["gradients"][index].abs() / (before["grad_scale"] or 1)
    return gradient + before["weight_decay"][index] * before["parameters"][index].abs()


def _alpha(before: Arguments, index: int) -> float:
    layer = before["layer"][index]
    return float(before["alpha"][layer]) if layer >= 0 else 0.0


def _compare_sgd(before: Arguments, got: Arguments, want: Arguments) -> None:
    for index, parameter in enumerate(got["parameters"]):
        step = _largest_step(before, index)
        if before["momentum"][index]:
            step = 2 * step + before["momentum"][index] * before["momentum_buffers"][index].abs()
            assert_stepped(got["momentum_buffers"][index], want["momentum_buffers"][index], step, 0.0)
        assert_stepped(parameter, want["parameters"][index], step, before["lr"][index] * _alpha(before, index))


def _compare_anchored(before: Arguments, got: Arguments, want: Arguments) -> None:
    for index, parameter in enumerate(got["parameters"]):
        step = _largest_step(before, index)
        value, stiffness, anchor = (before[name][index] for name in ("parameters", "stiffness", "anchors"))
        implicit = before["implicit"][index]
        if stiffness is not None and not implicit:
            step = step + 2 * before["strength"][index] * stiffness * (value.abs() + anchor.abs())
        if before["momentum"][index]:
            step = 2 * step + before["momentum"][index] * before["momentum_buffers"][index].abs()
            assert_stepped(got["momentum_buffers"][index], want["momentum_buffers"][index], 2 * step, 0.0)
        if stiffness is not None and implicit:  # the pull's share of their distance is at most 1
            step = step + value.abs() + anchor.abs()
        assert_stepped(parameter, want["parameters"][index], 2 * step, 0.0)
        if (path := before["paths"][index]) is not None:
            # The movement is that of the weight as stored, whose rounding the float64 reference does not know.
            moved = (parameter.double() - value) * (-1 if before["maximize"][index] else 1)
            share = before["gradients"][index] / (before["grad_scale"] or 1) * moved
            bound = 4 * U[got["paths"][index].dtype] * (path.abs() + share.abs())
            assert bool(((got["paths"][index].double() - (path - share)).abs() <= bound).all())


def _compare_adam(before: Arguments, got: Arguments, want: Arguments) -> None:
    for index, parameter in enumerate(got["parameters"]):
        names = ("lr", "weight_decay", "first_decay", "second_decay", "epsilon")
        lr, weight_decay, first_decay, second_decay, epsilon = (before[name][index] for name in names)
        steps = int(before["steps"][index]) + 1
        gradient = before["gradients"][index].abs() / (before["grad_scale"] or 1)
        first, second = (want[name][index] for name in ("first_moments", "second_moments"))
        moment = before["first_moments"][index].abs()
        moment = moment + (1 - first_decay) * (gradient + moment)
        bias, second_bias = (reference.bias_correction(decay, steps) for decay in (first_decay, second_decay))
        direction = moment / bias / ((second / second_bias).sqrt() + epsilon)
        step = lr * (direction + weight_decay * before["parameters"][index].abs())
        assert_adam_stepped(parameter, want["parameters"][index], step, _alpha(before, index))
        u = U[torch.float64 if parameter.dtype == torch.float64 else torch.float32]
        assert bool(((got["first_moments"][index].double() - first).abs() <= 6 * u * moment).all())
        assert bool(((got["second_moments"][index].double() - second).abs() <= 8 * u * second).all())
        assert got["steps"][index] == steps


class Rest(NamedTuple):
    """Which elements of a parameter do not move in a step, and which of those lose their first moment."""

    all: Tensor
    cleared: Tensor


def at_rest(before: Arguments, averages: list[Tensor]) -> dict[int, Rest]:
    """What rests in a step to these averages, by parameter: what is frozen, and with `active_only` what is inactive."""
    result = {}
    for index, layer in enumerate(before["layer"]):
        if layer < 0:
            continue
        of_neurons = "measured" in before
        at = layer if of_neurons else index
        constants = [before[name][layer] for name in ("alpha", "beta", "sigma")]
        was_frozen, frozen = (
            reference.plasticity(average, *constants) == 0 for average in (before["importances"][at], averages[at])
        )
        parameter, gradient = before["parameters"][index], before["gradients"][index]
        sums = before["measured"][layer] if of_neurons else reference.connection_importance(parameter, gradient)
        inactive = torch.zeros_like(frozen)
        if before["active_only"][layer] and sums is not None:
            inactive = reference.received_no_gradient(sums)
        rest = Rest(frozen | inactive, frozen & ~was_frozen & ~inactive)
        if of_neurons:
            dim, groups = before["neuron_dim"][index], before["groups"][index]
            first = before["first_neuron"][index] if "first_neuron" in before else 0
            rows = slice(first, first + parameter.shape[dim] * groups)
            masks = (reference.per_element(mask[rows], parameter, dim, groups) for mask in rest)
            rest = Rest(*(mask.expand_as(parameter) for mask in masks))
        result[index] = rest
    return result


def assert_rests(got: Arguments, before: Arguments) -> dict[int, Rest]:
    """Checks that what rests is bit-identical, except for first moments that are cleared. Returns what rests."""
    result = at_rest(before, got["importances"])
    for index, (rests, cleared) in result.items():
        for name in ("parameters", "momentum_buffers", "first_moments", "second_moments"):
            if name not in before:
                continue
            want = before[name][index].clone()
            if name == "first_moments" or (name == "momentum_buffers" and before["momentum"][index]):
                want[cleared] = 0
            assert torch.equal(got[name][index][rests], want[rests]), name
    return result


def check_changes_nothing(operation: str, arguments: Arguments) -> None:
    """Checks that a call changes no argument."""
    before = copied(arguments)
    call(getattr(ops, operation), arguments)
    assert_equal(arguments, before)


def check_is_refused(operation: str, arguments: Arguments, message: str) -> None:
    """Checks that a call raises ValueError and changes no argument."""
    before = copied(arguments)
    with pytest.raises(ValueError, match=message):
        call(getattr(ops, operation), arguments)
    assert_equal(arguments, before)


def check_network_step(inputs: Arguments, arguments: Arguments) -> None:
    """Checks that a network's step is importance and then an update, to the bit. It ignores `measured`."""
    whole = {name: value for name, value in arguments.items() if name != "measured"}
    parts = copied(whole)
    call(ops.network_step_, {**inputs, **whole})
    names = ("activations", "activation_gradients", "channel_dim", "batch_dim")
    pairs = zip(*(inputs[name] for name in names), strict=True)
    call(ops.update_, {**parts, "measured": [ops.importance(*pair).float() for pair in pairs]})
    assert_equal(whole, parts)


def assert_equal(got: Arguments, want: Arguments, names: Iterable[str] = WRITTEN) -> None:
    for name in names:
        for tensor, other in zip(got.get(name, ()), want.get(name, ()), strict=True):
            assert tensor is other is None or torch.equal(tensor, other), name


def with_threads(count: int, function: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)
