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
from npc_ext.kernels.checks import SIGMAS

from ..tolerances import DTYPES, assert_average, assert_stepped
from .test_update import copied

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
WRITTEN = ("parameters", "momentum_buffers", "importances", "skipped")


def network(
    dtype: torch.dtype = torch.float32,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    sigma: str = "sigmoid",
    active_only: bool = False,
    grad_scale: float | None = None,
    channels_last: bool = False,
    device: str = "cpu",
    parameters: list[tuple[tuple[int, ...], int]] = PARAMETERS,
) -> dict[str, Any]:
    """Arguments of `connection_update_`; half of all connections are frozen."""

    def tensors(dtype: torch.dtype) -> list[Tensor]:
        made = [torch.randn(shape).to(device, dtype) for shape, _ in parameters]
        return [t.contiguous(memory_format=torch.channels_last) if channels_last and t.ndim == 4 else t for t in made]

    count, layers = len(parameters), max(layer for _, layer in parameters) + 1
    gradients = tensors(dtype)
    gradients[0].flatten()[:20] = 0
    nothing = torch.empty(0, device=device)
    averages = [average.abs() for average in tensors(torch.float32)]
    return {
        "parameters": tensors(dtype),
        "gradients": gradients,
        "momentum_buffers": tensors(dtype),
        "importances": [a if layer >= 0 else nothing for a, (_, layer) in zip(averages, parameters, strict=True)],
        "skipped": torch.zeros(layers, dtype=torch.int64, device=device),
        "layer": [layer for _, layer in parameters],
        "lr": [0.1 + 0.01 * index for index in range(count)],
        "momentum": [momentum] * count,
        "nesterov": [nesterov] * count,
        "weight_decay": [weight_decay] * count,
        "maximize": [maximize] * count,
        "alpha": [0.5] * layers,
        "beta": [0.5] * layers,
        "delta": [0.9, 0.99, 0.5, 0.98][:layers] + [0.9] * (layers - 4),
        "sigma": [sigma] * layers,
        "active_only": [active_only] * layers,
        "grad_scale": None if grad_scale is None else torch.tensor(grad_scale, device=device),
        "found_inf": None,
    }


def check(arguments: dict[str, Any]) -> None:
    """Importance against float64; weights against float64 from the importance that the kernel came to."""
    before, exact = copied(arguments), copied(arguments, double=True)
    ops.connection_update_(**arguments)
    reference.connection_update_(**exact)
    sizes: dict[int, int] = {}
    for parameter, layer in zip(before["parameters"], before["layer"], strict=True):
        sizes[layer] = sizes.get(layer, 0) + parameter.numel()
    for got, want, layer in zip(arguments["importances"], exact["importances"], before["layer"], strict=True):
        if layer >= 0:
            assert_average(got, want, sizes[layer])
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
        weight, skipped = torch.zeros(603, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        options = ([lr], [0.0], [False], [0.0], [False], [0.5], [0.5], [0.99], [sigma], [False])
        ops.connection_update_([weight], [torch.ones_like(weight)], [], [importance], skipped, [0], *options)
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
    torch.manual_seed(draw(st.integers(0, 2**31)))
    momentum = draw(st.sampled_from([0.0, 0.9]))
    check(
        network(
            draw(st.sampled_from(DTYPES)),
            momentum=momentum,
            nesterov=momentum > 0 and draw(st.booleans()),
            weight_decay=draw(st.sampled_from([0.0, 0.1])),
            maximize=draw(st.booleans()),
            sigma=draw(st.sampled_from(SIGMAS)),
            active_only=draw(st.booleans()),
            grad_scale=draw(st.sampled_from([None, 2.0**16, 0.3])),
        )
    )


@pytest.mark.parametrize(("layers", "each"), [(130, 2), (1, 200), (1, 1)])
def test_connection_update_of_any_number_of_layers_and_parameters(layers: int, each: int, device: str) -> None:
    parameters = [((4, 5), layer) for layer in range(layers) for _ in range(each)]
    check(network(parameters=[((7,), -1), *parameters], device=device))


@pytest.mark.parametrize("offset", [1, 4])
def test_connection_update_of_tensors_that_begin_anywhere(offset: int, device: str) -> None:
    arguments = network(parameters=[((6, 24), 0), ((9,), 0)], device=device)

    def cut(tensor: Tensor) -> Tensor:
        return torch.cat([torch.zeros(offset, device=device), tensor.flatten()])[offset:].view(tensor.shape)

    for name in ("parameters", "importances"):
        arguments[name][0] = cut(arguments[name][0])
    check(arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_frozen_connections_stay_bit_identical_but_for_the_momentum_once(dtype: torch.dtype, device: str) -> None:
    arguments = network(dtype, momentum=0.9, weight_decay=0.1, device=device)
    before = copied(arguments)
    ops.connection_update_(**arguments)
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
    ops.connection_update_(**arguments)
    assert arguments["skipped"].tolist() == [1, 0, 0, 0]
    for index in (0, 2, 3, 4):  # of the layer that overflowed, and of the one without any importance
        assert torch.equal(arguments["importances"][index], before["importances"][index])
    assert not torch.equal(arguments["importances"][7], before["importances"][7])


def test_an_overflow_changes_nothing(device: str) -> None:
    arguments = network(momentum=0.9, device=device)
    arguments["found_inf"] = torch.ones(1, device=device)
    before = copied(arguments)
    ops.connection_update_(**arguments)
    for name in WRITTEN[:3]:
        assert all(map(torch.equal, arguments[name], before[name]))


def test_connection_update_passes_opcheck() -> None:
    opcheck(torch.ops.npc_ext.connection_update_.default, tuple(network(momentum=0.9).values()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("importances", lambda a: [a["importances"][0].double(), *a["importances"][1:]], r"importances\[0\] is torch.float64"),
        ("importances", lambda a: [torch.empty(0), *a["importances"][1:]], r"importances\[0\] is torch.float32 of shape \(0,\)"),
        ("layer", lambda a: [9, *a["layer"][1:]], r"layer\[0\] is 9, but there are 4 layers"),
        ("beta", lambda a: a["beta"][:2], "beta has 2 entries, expected 4"),
        ("skipped", lambda a: torch.zeros(4), "skipped is torch.float32"),
        ("sigma", lambda a: ["relu"] * 4, "sigma is 'relu'"),
    ],
)  # fmt: skip
def test_connection_update_refuses_what_does_not_fit_and_changes_nothing(name: str, value: Any, message: str) -> None:
    arguments = network(momentum=0.9)
    arguments[name] = value(arguments)
    before = copied(arguments)
    with pytest.raises(ValueError, match=message):
        ops.connection_update_(**arguments)
    for written in ("parameters", "momentum_buffers"):
        assert all(map(torch.equal, arguments[written], before[written]))
