"""The update with anchors and path integrals (EWC, MAS, SI, SSL) against its float64 reference and its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from npc_ext import ops, reference
from npc_ext.columns import AnchorOptions, Anchors, Network, SGDOptions, columns_of
from npc_ext.kernels import launch

from ..tolerances import DTYPES, U, assert_stepped
from .arguments import (
    Arguments,
    any_options,
    assert_equal,
    at_offset,
    call,
    check_changes_nothing,
    check_is_refused,
    copied,
    exact,
    flat,
    no_layers,
    sgd,
    tensors,
)

SHAPES = [(10, 7), (64, 3, 3, 3), (1,), (33,), (), (3, 400), (5, 0)]
WRITTEN = ("parameters", "momentum_buffers", "paths")


def network(
    dtype: torch.dtype = torch.float32,
    *,
    anchors: bool = True,
    paths: bool = True,
    implicit: bool = True,
    grad_scale: float | None = None,
    channels_last: bool = False,
    device: str = "cpu",
    shapes: list[tuple[int, ...]] = SHAPES,
    **options: Any,
) -> Arguments:
    """Arguments of `anchored_update_`. The second parameter has neither an anchor nor a path."""
    real, count = reference.compute_dtype(dtype), len(shapes)

    def kept(wanted: bool) -> list[Tensor | None]:
        made = tensors(shapes, real, device, channels_last)
        return [one if wanted and at != 1 else None for at, one in enumerate(made)]

    of_parameters = ("parameters", "gradients", "momentum_buffers")
    return {
        **{name: tensors(shapes, dtype, device, channels_last) for name in of_parameters},
        "stiffness": [None if stiff is None else stiff.abs() for stiff in kept(anchors)],
        "anchors": kept(anchors),
        "paths": kept(paths),
        "strength": [0.1 + 0.05 * index for index in range(count)],
        "implicit": [implicit] * count,
        **sgd(count, [0.1 + 0.01 * index for index in range(count)], **options),
        "grad_scale": None if grad_scale is None else torch.tensor(grad_scale, device=device),
        "found_inf": None,
    }


def check(arguments: Arguments) -> None:
    before, want = exact(arguments), exact(arguments)
    call(ops.anchored_update_, arguments)
    call(reference.anchored_update_, want)
    for index, got in enumerate(arguments["parameters"]):
        scale = before["grad_scale"] or 1
        loss_gradient, value = before["gradients"][index].abs() / scale, before["parameters"][index]
        step = loss_gradient + before["weight_decay"][index] * value.abs()
        has_anchor, implicit = before["stiffness"][index] is not None, before["implicit"][index]
        if has_anchor and not implicit:
            distance = value.abs() + before["anchors"][index].abs()
            step = step + 2 * before["strength"][index] * before["stiffness"][index] * distance
        if before["momentum"][index]:
            step = 2 * step + before["momentum"][index] * before["momentum_buffers"][index].abs()
            assert_stepped(arguments["momentum_buffers"][index], want["momentum_buffers"][index], 2 * step, 0.0)
        if has_anchor and implicit:
            step = (
                step + value.abs() + before["anchors"][index].abs()
            )  # the pull's share of their distance is at most 1
        assert_stepped(got, want["parameters"][index], 2 * step, 0.0)
        if before["paths"][index] is not None:
            # The movement is that of the weight as stored, whose rounding the float64 reference does not know.
            path, moved = before["paths"][index], got.double() - value
            share = before["gradients"][index] / scale * moved * (-1 if before["maximize"][index] else 1)
            u = U[arguments["paths"][index].dtype]
            bound = 4 * u * (path.abs() + share.abs())
            assert bool(((arguments["paths"][index].double() - (path - share)).abs() <= bound).all())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"paths": False},
    {"implicit": False},
    {"implicit": False, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "paths": False},
    {"anchors": False},
    {"anchors": False, "paths": False, "momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.01, "channels_last": True},
    {"momentum": 0.9, "nesterov": True, "paths": False, "grad_scale": 8.0},
    {"maximize": True, "grad_scale": 3.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_anchored_update_agrees_with_the_reference(dtype: torch.dtype, options: dict[str, Any], device: str) -> None:
    check(network(dtype, **options, device=device))


@given(st.data())
def test_anchored_update_of_any_network(data: st.DataObject) -> None:
    draw = data.draw
    wanted = {name: draw(st.booleans()) for name in ("anchors", "paths", "implicit")}
    shapes = draw(st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=2, max_size=5))
    check(network(**any_options(draw), **wanted, shapes=shapes))


@pytest.mark.parametrize("count", [2, 24, 25, 300])
def test_anchored_update_of_any_number_of_parameters(count: int, device: str) -> None:
    check(network(shapes=[(3, 5)] * count, device=device))


@pytest.mark.parametrize("offset", [1, 4])
def test_anchored_update_of_tensors_that_begin_anywhere(offset: int, device: str) -> None:
    arguments = network(shapes=[(6, 24), (1,)], device=device)

    for name in ("parameters", "stiffness", "anchors", "paths"):
        arguments[name][0] = at_offset(arguments[name][0], offset)
    check(arguments)


def test_without_anchors_and_paths_it_is_sgd_to_the_bit(device: str) -> None:
    arguments = network(anchors=False, paths=False, device=device)
    kept = ("stiffness", "anchors", "paths", "strength", "implicit")
    plain = {name: value for name, value in copied(arguments).items() if name not in kept}
    call(ops.anchored_update_, arguments)
    call(ops.update_, {**plain, **no_layers(len(SHAPES), device)})
    assert_equal(arguments, plain, ["parameters"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.5, "nesterov": True, "maximize": True, "grad_scale": 3.0},
    ],
    ids=str,
)
def test_implicit_anchors_change_no_bit_where_there_is_no_stiffness_nor_of_the_buffer(
    options: dict[str, Any], device: str
) -> None:
    """Beside the same kernel without strength: where compilers fuse products with sums differs between kernels."""
    arguments = network(**options, paths=False, device=device, shapes=[(40, 30), (1,)])
    plain = copied(arguments)
    plain["strength"] = [0.0, 0.0]
    stiffness = arguments["stiffness"][0]
    stiffness[2] *= -1
    stiffness[::4] = 0
    arguments["anchors"][0][4] = torch.inf
    call(ops.anchored_update_, arguments)
    call(ops.anchored_update_, plain)
    same = arguments["parameters"][0] == plain["parameters"][0]
    assert torch.equal(same, stiffness <= 0)
    assert_equal(arguments, plain, ["momentum_buffers"])


def test_a_negative_zero_without_stiffness_stays_one(device: str) -> None:
    arguments = on(device, one_weight(-0.0, 0.0))
    call(ops.anchored_update_, arguments)
    assert bool(arguments["parameters"][0].signbit())


def one_weight(
    value: float, stiffness: float, *, gradient: float = 0.0, velocity: float = 0.0, path: bool = False, **options: Any
) -> Arguments:
    """Arguments for one weight whose anchor is at 1."""
    numbers = {"parameters": value, "gradients": gradient, "momentum_buffers": velocity, "stiffness": stiffness}
    of_weight = {name: [torch.full((1,), number)] for name, number in {**numbers, "anchors": 1.0}.items()}
    paths = [torch.zeros(1) if path else None]
    scalars = {"strength": 1.0, "implicit": True, **options}
    return {**of_weight, "paths": paths, **sgd(1, 0.5), **{name: [scalar] for name, scalar in scalars.items()}}


def on(device: str, arguments: Arguments) -> Arguments:
    return {
        name: [one.to(device) if isinstance(one, Tensor) else one for one in own] for name, own in arguments.items()
    }


@pytest.mark.parametrize(
    ("options", "weight", "velocity"),
    [
        # SGD moves 3 to 3 - 0.5 * 2 = 2; c = 2 * 0.5 * 1 * 3 = 3, and (2 + 3 * 1) / (1 + 3) = 1.25.
        ({}, 1.25, 0.0),
        ({"implicit": False}, 3 - 0.5 * (2 + 2 * 3 * (3 - 1)), 0.0),
        # Maximized, SGD moves it to 4: (4 + 3) / 4. The pull keeps its sign.
        ({"maximize": True}, 1.75, 0.0),
        # With weight decay to 3 - 0.5 * (2 + 3) = 0.5: (0.5 + 3) / 4.
        ({"weight_decay": 1.0}, 0.875, 0.0),
        # The buffer becomes 0.5 * 4 + 2 = 4, SGD moves to 3 - 0.5 * 4 = 1; c = 3 / (1 - 0.5) = 6.
        ({"momentum": 0.5, "velocity": 4.0}, 1.0, 4.0),
        ({"momentum": 0.5, "velocity": 4.0, "weight_decay": 1.0}, (-0.5 + 6) / 7, 7.0),
        # Nesterov: the buffer becomes 2, SGD moves to 3 - 0.5 * (2 + 0.5 * 2) = 1.5.
        ({"momentum": 0.5, "nesterov": True}, (1.5 + 6) / 7, 2.0),
    ],
    ids=str,
)
def test_a_step_of_one_weight_is_the_one_done_by_hand(
    options: dict[str, Any], weight: float, velocity: float, device: str
) -> None:
    for update in (ops.anchored_update_, reference.anchored_update_):
        arguments = on(device, one_weight(3.0, 3.0, gradient=2.0, path=True, **options))
        call(update, arguments)
        assert arguments["parameters"][0].item() == pytest.approx(weight, rel=1e-6)
        assert arguments["momentum_buffers"][0].item() == pytest.approx(velocity)
        # The path integral takes the loss's gradient times the whole movement, the pull's part of it, too.
        sign = -1 if options.get("maximize") else 1
        assert arguments["paths"][0].item() == pytest.approx(-sign * 2 * (weight - 3), rel=1e-5)


@pytest.mark.parametrize("implicit", [True, False])
def test_a_rate_in_memory_scales_the_pull_as_well(implicit: bool, device: str) -> None:
    """As CUDA graphs have it: the kernel reads the rate when it runs."""
    rate, usual = torch.ones((), device=device), on(device, one_weight(3.0, 3.0, gradient=2.0, implicit=implicit))
    inputs = {name: usual[name] for name in ("parameters", "gradients", "momentum_buffers", "stiffness", "anchors")}
    read = {name: [tensor.clone() for tensor in tensors] for name, tensors in inputs.items()}
    options = columns_of(SGDOptions, [{name: usual[name][0] for name in SGDOptions._fields}], lr=[rate])
    tables = launch.Tables(
        torch.device(device), read["parameters"], [], options, AnchorOptions(usual["strength"], usual["implicit"])
    )
    rate.fill_(0.5)
    network = Network(read["parameters"], read["gradients"], read["momentum_buffers"])
    launch.anchored_update_(tables, network, Anchors(read["stiffness"], read["anchors"], [None]))
    call(ops.anchored_update_, usual)
    assert torch.equal(read["parameters"][0], usual["parameters"][0])


@pytest.mark.parametrize("implicit", [True, False])
def test_implicit_pulls_neither_diverge_nor_overshoot_at_any_strength_and_explicit_ones_do(
    implicit: bool, device: str
) -> None:
    strengths = (1e-30, 1e-3, 1.0, 10.0, 1e3, 1e9, 1e30, 1e300)
    sgd: list[dict[str, Any]] = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}]
    diverged, overshot = [], []
    for options in sgd:
        for strength in strengths:
            arguments = network(implicit=implicit, paths=False, **options, device=device, shapes=[(7, 9), (1,)])
            for gradient, velocity in zip(arguments["gradients"], arguments["momentum_buffers"], strict=True):
                gradient.zero_(), velocity.zero_()
            arguments["strength"] = [strength] * 2
            weight, anchor = arguments["parameters"][0], arguments["anchors"][0]
            side = (weight - anchor).sign()
            scale = 2**-23 * (weight.abs() + anchor.abs())
            for _ in range(4):
                before = (weight - anchor).abs()
                call(ops.anchored_update_, arguments)
                diverged.append(bool(((weight - anchor).abs() > before + scale).any() | ~weight.isfinite().all()))
                overshot.append(bool(((weight - anchor) * side < -scale).any()))
            if implicit and strength >= 1e9:
                assert bool(((weight - anchor).abs() <= scale).all())
    assert any(diverged) is any(overshot) is not implicit


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_implicit_and_explicit_pulls_agree_to_first_order_in_the_learning_rate(options: dict[str, Any]) -> None:
    apart = []
    for steps in (50, 500):  # of a tenth of the length
        ends = []
        for implicit in (True, False):
            torch.manual_seed(0)
            arguments = network(torch.float64, implicit=implicit, paths=False, **options, shapes=[(50,), (1,)])
            arguments["momentum_buffers"][0].zero_()
            arguments["lr"] = [(1 - arguments["momentum"][0]) / steps] * 2
            arguments["strength"] = [1.0] * 2
            for _ in range(steps):
                call(ops.anchored_update_, arguments)
            ends.append(arguments["parameters"][0])
        apart.append((ends[0] - ends[1]).abs().max().item())
    assert apart[1] < 0.12 * apart[0]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
@pytest.mark.parametrize("implicit", [True, False])
def test_steps_come_to_rest_at_the_minimum_of_loss_and_penalty(implicit: bool, options: dict[str, Any]) -> None:
    """Of (w + 2)^2 / 2 + 3 (w - 1)^2, with momentum or without: strength means the same."""
    arguments = one_weight(5.0, 3.0, implicit=implicit, **{"lr": 0.05, **options})
    for _ in range(400):
        arguments["gradients"][0].copy_(arguments["parameters"][0] + 2)
        call(ops.anchored_update_, arguments)
    assert arguments["parameters"][0].item() == pytest.approx((3 * 2 * 1 - 2) / (3 * 2 + 1), rel=1e-5)


@pytest.mark.parametrize("scale", [{"lr": 0.0}, {"strength": 0.0}, {"lr": 0.0, "strength": 1e300}], ids=str)
def test_no_rate_and_no_strength_are_no_pull(scale: dict[str, float], device: str) -> None:
    for update in (ops.anchored_update_, reference.anchored_update_):
        arguments = on(device, one_weight(3.0, 3.0, **scale))
        call(update, arguments)
        assert arguments["parameters"][0].item() == 3.0


def test_an_overflow_changes_nothing(device: str) -> None:
    arguments = network(momentum=0.9, device=device)
    arguments["found_inf"] = torch.ones(1, device=device)
    check_changes_nothing(ops.anchored_update_, arguments, WRITTEN)


def test_the_pull_is_the_gradient_of_the_penalty() -> None:
    value, anchor = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    stiffness = torch.rand(7, dtype=torch.float64)
    reference.anchor_penalty(value, anchor, stiffness, 1.7).backward()
    torch.testing.assert_close(value.grad, reference.anchor_gradient(value.detach(), anchor, stiffness, 1.7))
    # The implicit pull is the same gradient, where it ends.
    start = value.detach()
    end = reference.towards_anchor(start, anchor, stiffness, 1.7, lr=0.3)
    torch.testing.assert_close(start - end, 0.3 * reference.anchor_gradient(end, anchor, stiffness, 1.7))


def test_anchored_update_passes_opcheck() -> None:
    arguments = network(momentum=0.9)
    opcheck(torch.ops.npc_ext.anchored_update_.default, flat("anchored_update_", arguments))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stiffness", lambda a: a["stiffness"][:-1], "stiffness has 6 entries, expected 7"),
        ("stiffness", lambda a: [a["stiffness"][0].half(), *a["stiffness"][1:]], r"stiffness\[0\] is torch.float16"),
        ("anchors", lambda a: [None, *a["anchors"][1:]], r"stiffness\[0\] and anchors\[0\] go together"),
        ("paths", lambda a: [torch.randn(7, 10).t(), *a["paths"][1:]], r"paths\[0\] has strides \(1, 10\)"),
        ("gradients", lambda a: [a["gradients"][0].half(), *a["gradients"][1:]], r"gradients\[0\] is torch.float16"),
        ("implicit", lambda a: a["implicit"][:-1], "implicit has 6 entries, expected 7"),
        (
            "momentum",
            lambda a: [*a["momentum"][:-1], 1.0],
            r"momentum\[6\] is 1.0; implicit anchors need a momentum below",
        ),
    ],
)
def test_anchored_update_refuses_what_does_not_fit_and_changes_nothing(name: str, value: Any, message: str) -> None:
    arguments = network(momentum=0.9)
    arguments[name] = value(arguments)
    check_is_refused(ops.anchored_update_, arguments, message, WRITTEN)
