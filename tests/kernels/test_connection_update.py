"""CPC's update against its float64 reference, and what it promises about connections it must not touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from npc_ext import ops, reference

from ..tolerances import DTYPES, assert_average, assert_stepped
from .arguments import (
    Arguments,
    any_options,
    any_plasticity,
    at_offset,
    call,
    check_changes_nothing,
    check_is_refused,
    copied,
    exact,
    flat,
    no_nonfinite_steps,
    plasticity,
    sgd,
    tensors,
)

# shape and layer
PARAMETERS: list[tuple[tuple[int, ...], int]] = [
    ((10, 7), 0),
    ((100,), -1),
    ((10,), 0),
    ((64, 3, 3, 3), 1),
    ((64,), 1),
    ((5, 0), 1),
    ((), 2),
    ((3, 700), 3),
]
WRITTEN = ("parameters", "momentum_buffers", "importances", "nonfinite_steps")


def network(
    dtype: torch.dtype = torch.float32,
    *,
    sigma: str = "sigmoid",
    active_only: bool = False,
    grad_scale: float | None = None,
    channels_last: bool = False,
    device: str = "cpu",
    parameters: list[tuple[tuple[int, ...], int]] = PARAMETERS,
    **options: Any,
) -> Arguments:
    """Arguments of `connection_update_`; half of all connections are frozen."""
    count, layers = len(parameters), max(layer for _, layer in parameters) + 1
    shapes = [shape for shape, _ in parameters]
    of_parameters = {
        name: tensors(shapes, dtype, device, channels_last) for name in ("parameters", "gradients", "momentum_buffers")
    }
    of_parameters["gradients"][0].flatten()[:20] = 0
    averages = tensors(shapes, device=device, last=channels_last)
    return {
        **of_parameters,
        "importances": [a.abs() if layer >= 0 else None for a, (_, layer) in zip(averages, parameters, strict=True)],
        "nonfinite_steps": no_nonfinite_steps(layers, device),
        "layer": [layer for _, layer in parameters],
        **sgd(count, [0.1 + 0.01 * index for index in range(count)], **options),
        **plasticity(layers, sigma=sigma, active=active_only),
        "delta": [0.9, 0.99, 0.5, 0.98][:layers] + [0.9] * (layers - 4),
        "grad_scale": None if grad_scale is None else torch.tensor(grad_scale, device=device),
        "found_inf": None,
    }


def check(arguments: dict[str, Any]) -> None:
    """Importance against float64; weights against float64 from the importance that the kernel came to."""
    before, want = copied(arguments), exact(arguments)
    call(ops.connection_update_, arguments)
    call(reference.connection_update_, want)
    sizes: dict[int, int] = {}
    for parameter, layer in zip(before["parameters"], before["layer"], strict=True):
        sizes[layer] = sizes.get(layer, 0) + parameter.numel()
    for got, average, layer in zip(arguments["importances"], want["importances"], before["layer"], strict=True):
        if layer >= 0:
            assert_average(got, average, sizes[layer])
    for index, got in enumerate(arguments["parameters"]):
        double = copied({name: before[name][index] for name in WRITTEN[:2]} | {"g": before["gradients"][index]}, True)
        value, gradient = double["parameters"], double["g"] / (before["grad_scale"] or 1)
        rate, frozen, alpha = before["lr"][index], False, 0.0
        if (layer := before["layer"][index]) >= 0:
            constants = free_constants(before, layer)
            alpha = rate * constants[0]
            rate = reference.learning_rate(arguments["importances"][index].double(), rate, *constants)
            frozen = rate == 0
            was_free = reference.plasticity(before["importances"][index], *constants) != 0
            inactive = double["g"] == 0 if before["active_only"][layer] else torch.zeros_like(frozen)
            rate = rate.masked_fill(inactive, 0)
            cleared = frozen & was_free & ~inactive
            frozen = frozen | inactive
        else:
            cleared = inactive = False
        momentum, decay = before["momentum"][index], before["weight_decay"][index]
        buffer = double["momentum_buffers"] if momentum else None
        step = gradient.abs() + decay * value.abs()
        if momentum:
            step = 2 * step + momentum * double["momentum_buffers"].abs()
        options = (momentum, before["nesterov"][index], decay, before["maximize"][index])
        reference.descend_(value, gradient, buffer, rate, frozen, *options, cleared=cleared)
        assert_stepped(got, value, step, alpha)
        for name in ("parameters", "momentum_buffers", "importances"):
            if inactive is not False:
                assert torch.equal(arguments[name][index][inactive], before[name][index][inactive])
        if momentum:
            assert_stepped(arguments["momentum_buffers"][index], buffer, step, 0.0)


def free_constants(arguments: dict[str, Any], layer: int) -> tuple[float, float, str]:
    return arguments["alpha"][layer], arguments["beta"][layer], arguments["sigma"][layer]


@pytest.mark.parametrize("sigma", ["sigmoid", "erf"])
def test_connections_move_at_the_papers_rates_and_these_scale_with_lr_down_to_zero(sigma: str, device: str) -> None:
    importance = torch.cat([torch.zeros(3), torch.rand(600)]).to(device)

    def moved(lr: float) -> Tensor:  # from zero, so that |w dL/dw| leaves C as it is
        weight = torch.zeros(603, device=device)
        arguments = {"parameters": [weight], "gradients": [torch.ones_like(weight)], "importances": [importance]}
        arguments |= {"nonfinite_steps": no_nonfinite_steps(1, device), "layer": [0]}
        call(ops.connection_update_, {**arguments, **sgd(1, lr), **plasticity(1, sigma=sigma)})
        return weight

    ratio = 0.5 / importance.double()
    surplus = (ratio.log() if sigma == "erf" else ratio - 1).clamp(min=0)
    eta = (0.05 * surplus.sqrt()).clamp(max=0.1)  # eq. 7 as in the paper, with alpha = 0.05 and eta_max = 0.1
    assert_stepped(moved(0.1), -eta, torch.ones_like(eta), 0.05)
    full = moved(0.125)
    for share in (0.5, 2**-7, 0.0):  # without rounding
        assert torch.equal(moved(0.125 * share), share * full)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.5, "maximize": True, "grad_scale": 3.0, "channels_last": True},
    {"sigma": "erf", "active_only": True},
    {"momentum": 0.9, "weight_decay": 0.1, "active_only": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_connection_update_agrees_with_the_reference(dtype: torch.dtype, options: dict[str, Any], device: str) -> None:
    check(network(dtype, **options, device=device))


@given(st.data())
def test_connection_update_of_any_network(data: st.DataObject) -> None:
    draw = data.draw
    check(network(**any_options(draw), **any_plasticity(draw)))


@pytest.mark.parametrize(("layers", "each"), [(130, 2), (1, 200), (1, 1)])
def test_connection_update_of_any_number_of_layers_and_parameters(layers: int, each: int, device: str) -> None:
    parameters = [((4, 5), layer) for layer in range(layers) for _ in range(each)]
    check(network(parameters=[((7,), -1), *parameters], device=device))


@pytest.mark.parametrize("offset", [1, 4])
def test_connection_update_of_tensors_that_begin_anywhere(offset: int, device: str) -> None:
    arguments = network(parameters=[((6, 24), 0), ((9,), 0)], device=device)

    for name in ("parameters", "importances"):
        arguments[name][0] = at_offset(arguments[name][0], offset)
    check(arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_frozen_connections_stay_bit_identical_but_for_the_momentum_once(dtype: torch.dtype, device: str) -> None:
    arguments = network(dtype, momentum=0.9, weight_decay=0.1, device=device)
    before = copied(arguments)
    call(ops.connection_update_, arguments)
    seen = 0
    for index, average in enumerate(arguments["importances"]):
        if arguments["layer"][index] < 0:
            continue
        frozen = average >= 0.5
        seen += int(frozen.sum())
        for name in ("parameters", "momentum_buffers"):
            got, want = arguments[name][index], before[name][index]
            froze = frozen & (before["importances"][index] < 0.5)
            if name == "momentum_buffers":
                assert not bool(got[froze].any())
            same = frozen & ~froze if name == "momentum_buffers" else frozen
            assert torch.equal(got[same], want[same])
        moved = (arguments["parameters"][index] != before["parameters"][index])[~frozen]
        assert moved.numel() == 0 or moved.double().mean() > 0.5
    assert seen > 500


def test_importance_that_is_not_finite_is_left_out_and_counted(device: str) -> None:
    arguments = network(device=device)
    arguments["gradients"][0][0, 0] = torch.inf
    arguments["gradients"][3].zero_()
    arguments["gradients"][4].zero_()
    before = copied(arguments)
    call(ops.connection_update_, arguments)
    assert arguments["nonfinite_steps"].tolist() == [1, 0, 0, 0]
    for index in (0, 2, 3, 4):  # of the layer that overflowed, and of the one without any importance
        assert torch.equal(arguments["importances"][index], before["importances"][index])
    assert not torch.equal(arguments["importances"][7], before["importances"][7])


def test_an_overflow_changes_nothing(device: str) -> None:
    arguments = network(momentum=0.9, device=device)
    arguments["found_inf"] = torch.ones(1, device=device)
    check_changes_nothing(ops.connection_update_, arguments, WRITTEN)


def test_connection_update_passes_opcheck() -> None:
    opcheck(torch.ops.npc_ext.connection_update_.default, flat("connection_update_", network(momentum=0.9)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("importances", lambda a: [a["importances"][0].double(), *a["importances"][1:]], r"importances\[0\] is torch.float64"),
        ("importances", lambda a: [torch.empty(0), *a["importances"][1:]], r"importances\[0\] is torch.float32 of shape \(0,\)"),
        ("layer", lambda a: [9, *a["layer"][1:]], r"layer\[0\] is 9, but there are 4 layers"),
        ("beta", lambda a: a["beta"][:2], "beta has 2 entries, expected 4"),
        ("nonfinite_steps", lambda a: torch.zeros(4), "nonfinite_steps is torch.float32"),
        ("sigma", lambda a: ["relu"] * 4, "sigma is 'relu'"),
    ],
)  # fmt: skip
def test_connection_update_refuses_what_does_not_fit_and_changes_nothing(name: str, value: Any, message: str) -> None:
    arguments = network(momentum=0.9)
    arguments[name] = value(arguments)
    check_is_refused(ops.connection_update_, arguments, message, ["parameters", "momentum_buffers"])
