"""The update with anchors and path integrals (EWC, MAS, SI, SSL) against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npc_ext import ops, reference
from npc_ext.columns import AnchorOptions, Anchors, Network, SGDOptions, columns_of
from npc_ext.kernels import launch

from .arguments import PARAMETERS, Arguments, Placed, call, copied, names_of, network, no_layers, sgd
from .checks import assert_equal

MOMENTUM: list[dict[str, Any]] = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}]


def test_without_anchors_and_paths_it_is_sgd_to_the_bit(device: str) -> None:
    arguments = network("anchored_update_", anchors=False, paths=False, device=device)
    plain = {name: value for name, value in copied(arguments).items() if name in names_of("update_")}
    call(ops.anchored_update_, arguments)
    call(ops.update_, {**plain, **no_layers(len(PARAMETERS), device)})
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
    """Compared with the same kernel without strength: compilers do not fuse the same products and sums in every kernel."""
    arguments = network("anchored_update_", parameters=[Placed((40, 30))], paths=False, **options, device=device)
    plain = copied(arguments)
    plain["strength"] = [0.0]
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
        name: [tensor.to(device) if isinstance(tensor, Tensor) else tensor for tensor in own]
        for name, own in arguments.items()
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
    prepared = launch.Prepared(
        rate.device, read["parameters"], [], options, AnchorOptions(usual["strength"], usual["implicit"])
    )
    rate.fill_(0.5)
    network = Network(read["parameters"], read["gradients"], read["momentum_buffers"])
    launch.anchored_update_(prepared, network, Anchors(read["stiffness"], read["anchors"], [None]))
    call(ops.anchored_update_, usual)
    assert torch.equal(read["parameters"][0], usual["parameters"][0])


@pytest.mark.parametrize("implicit", [True, False])
def test_implicit_pulls_neither_diverge_nor_overshoot_at_any_strength_and_explicit_ones_do(
    implicit: bool, device: str
) -> None:
    strengths = (1e-30, 1e-3, 1.0, 10.0, 1e3, 1e9, 1e30, 1e300)
    diverged, overshot = [], []
    for options in MOMENTUM:
        for strength in strengths:
            settings: dict[str, Any] = {"implicit": implicit, "paths": False, **options, "device": device}
            arguments = network("anchored_update_", parameters=[Placed((7, 9))], **settings)
            arguments["strength"] = [strength]
            for name in ("gradients", "momentum_buffers"):
                arguments[name][0].zero_()
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


@pytest.mark.parametrize("options", MOMENTUM, ids=str)
def test_implicit_and_explicit_pulls_agree_to_first_order_in_the_learning_rate(options: dict[str, Any]) -> None:
    apart = []
    for steps in (50, 500):  # of a tenth of the length
        ends = []
        for implicit in (True, False):
            torch.manual_seed(0)
            settings: dict[str, Any] = {"implicit": implicit, "paths": False, **options}
            arguments = network("anchored_update_", torch.float64, parameters=[Placed((50,))], **settings)
            arguments["momentum_buffers"][0].zero_()
            arguments |= {"lr": [(1 - arguments["momentum"][0]) / steps], "strength": [1.0]}
            for _ in range(steps):
                call(ops.anchored_update_, arguments)
            ends.append(arguments["parameters"][0])
        apart.append((ends[0] - ends[1]).abs().max().item())
    assert apart[1] < 0.12 * apart[0]


@pytest.mark.parametrize("options", MOMENTUM, ids=str)
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


def test_the_pull_is_the_gradient_of_the_penalty() -> None:
    value, anchor = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    stiffness = torch.rand(7, dtype=torch.float64)
    reference.anchor_penalty(value, anchor, stiffness, 1.7).backward()
    torch.testing.assert_close(value.grad, reference.anchor_gradient(value.detach(), anchor, stiffness, 1.7))
    # The implicit pull is the same gradient, where it ends.
    start = value.detach()
    end = reference.towards_anchor(start, anchor, stiffness, 1.7, lr=0.3)
    torch.testing.assert_close(start - end, 0.3 * reference.anchor_gradient(end, anchor, stiffness, 1.7))
