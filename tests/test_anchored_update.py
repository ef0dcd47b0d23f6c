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

from .test_update import copied
from .tolerances import DTYPES, U, assert_stepped

SHAPES = [(10, 7), (64, 3, 3, 3), (1,), (33,), (), (3, 400), (5, 0)]
WRITTEN = ("parameters", "momentum_buffers", "paths")


def network(
    dtype: torch.dtype = torch.float32,
    *,
    anchors: bool = True,
    paths: bool = True,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: float | None = None,
    channels_last: bool = False,
    device: str = "cpu",
    shapes: list[tuple[int, ...]] = SHAPES,
) -> dict[str, Any]:
    """Arguments of `anchored_update_`. The second parameter has neither an anchor nor a path."""
    real = reference.compute_dtype(dtype)

    def tensors(dtype: torch.dtype, wanted: bool = True) -> list[Tensor]:
        made = [torch.randn(shape).to(device, dtype) for shape in shapes]
        if channels_last:
            made = [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in made]
        return [t if wanted and at != 1 else torch.empty(0, dtype=dtype, device=device) for at, t in enumerate(made)]

    def all_tensors() -> list[Tensor]:
        made = tensors(dtype)
        made[1] = torch.randn(shapes[1]).to(device, dtype)
        return [t.contiguous(memory_format=torch.channels_last) if channels_last and t.ndim == 4 else t for t in made]

    count = len(shapes)
    return {
        "parameters": all_tensors(),
        "gradients": all_tensors(),
        "momentum_buffers": all_tensors(),
        "stiffness": [stiff.abs() for stiff in tensors(real, anchors)],
        "anchors": tensors(real, anchors),
        "paths": tensors(real, paths),
        "strength": [0.1 + 0.05 * index for index in range(count)],
        "lr": [0.1 + 0.01 * index for index in range(count)],
        "momentum": [momentum] * count,
        "nesterov": [nesterov] * count,
        "weight_decay": [weight_decay] * count,
        "maximize": [maximize] * count,
        "grad_scale": None if grad_scale is None else torch.tensor(grad_scale, device=device),
        "found_inf": None,
    }


def check(arguments: dict[str, Any]) -> None:
    before, exact = copied(arguments, double=True), copied(arguments, double=True)
    ops.anchored_update_(**arguments)
    reference.anchored_update_(**exact)
    for index, got in enumerate(arguments["parameters"]):
        scale = before["grad_scale"] or 1
        loss_gradient, value = before["gradients"][index].abs() / scale, before["parameters"][index]
        step = loss_gradient + before["weight_decay"][index] * value.abs()
        if before["stiffness"][index].numel():
            distance = value.abs() + before["anchors"][index].abs()
            step = step + 2 * before["strength"][index] * before["stiffness"][index] * distance
        if before["momentum"][index]:
            step = 2 * step + before["momentum"][index] * before["momentum_buffers"][index].abs()
        assert_stepped(got, exact["parameters"][index], 2 * step, 0.0)
        if before["momentum"][index]:
            assert_stepped(arguments["momentum_buffers"][index], exact["momentum_buffers"][index], 2 * step, 0.0)
        if before["paths"][index].numel():
            # The movement is that of the weight as stored, whose rounding the float64 reference does not know.
            path, moved = before["paths"][index], got.double() - value
            share = before["gradients"][index] / scale * moved * (-1 if before["maximize"][index] else 1)
            u = U[arguments["paths"][index].dtype]
            bound = 4 * u * (path.abs() + share.abs())
            assert bool(((arguments["paths"][index].double() - (path - share)).abs() <= bound).all())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"paths": False},
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
    torch.manual_seed(draw(st.integers(0, 2**31)))
    momentum = draw(st.sampled_from([0.0, 0.9]))
    check(
        network(
            draw(st.sampled_from(DTYPES)),
            anchors=draw(st.booleans()),
            paths=draw(st.booleans()),
            momentum=momentum,
            nesterov=momentum > 0 and draw(st.booleans()),
            weight_decay=draw(st.sampled_from([0.0, 0.1])),
            maximize=draw(st.booleans()),
            grad_scale=draw(st.sampled_from([None, 2.0**16, 0.3])),
            shapes=draw(st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=2, max_size=5)),
        )
    )


@pytest.mark.parametrize("count", [2, 24, 25, 300])
def test_anchored_update_of_any_number_of_parameters(count: int, device: str) -> None:
    check(network(shapes=[(3, 5)] * count, device=device))


@pytest.mark.parametrize("offset", [1, 4])
def test_anchored_update_of_tensors_that_begin_anywhere(offset: int, device: str) -> None:
    arguments = network(shapes=[(6, 24), (1,)], device=device)

    def cut(tensor: Tensor) -> Tensor:
        return torch.cat([torch.zeros(offset, device=device), tensor.flatten()])[offset:].view(tensor.shape)

    for name in ("parameters", "stiffness", "anchors", "paths"):
        arguments[name][0] = cut(arguments[name][0])
    check(arguments)


def test_without_anchors_and_paths_it_is_sgd_to_the_bit(device: str) -> None:
    arguments = network(anchors=False, paths=False, device=device)
    plain = copied(arguments)
    ops.anchored_update_(**arguments)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    count = len(SHAPES)
    outside = ([-1] * count, [0] * count, [1] * count)
    rest = [plain[name] for name in ("lr", "momentum", "nesterov", "weight_decay", "maximize")]
    ops.update_(*(plain[n] for n in ("parameters", "gradients")), [], [], [], nothing, *outside, *rest, *[[]] * 5)
    assert all(map(torch.equal, arguments["parameters"], plain["parameters"]))


def test_an_overflow_changes_nothing(device: str) -> None:
    arguments = network(momentum=0.9, device=device)
    arguments["found_inf"] = torch.ones(1, device=device)
    before = copied(arguments)
    ops.anchored_update_(**arguments)
    for name in WRITTEN:
        assert all(map(torch.equal, arguments[name], before[name]))


def test_the_pull_is_the_gradient_of_the_penalty() -> None:
    value, anchor = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    stiffness = torch.rand(7, dtype=torch.float64)
    reference.anchor_penalty(value, anchor, stiffness, 1.7).backward()
    torch.testing.assert_close(value.grad, reference.anchor_gradient(value.detach(), anchor, stiffness, 1.7))


def test_anchored_update_passes_opcheck() -> None:
    arguments = network(momentum=0.9)
    opcheck(torch.ops.npc_ext.anchored_update_.default, tuple(arguments.values()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stiffness", lambda a: a["stiffness"][:-1], "stiffness has 6 entries, expected 7"),
        ("stiffness", lambda a: [a["stiffness"][0].half(), *a["stiffness"][1:]], r"stiffness\[0\] is torch.float16"),
        ("anchors", lambda a: [torch.empty(0), *a["anchors"][1:]], r"stiffness\[0\] and anchors\[0\] go together"),
        ("paths", lambda a: [torch.randn(7, 10).t(), *a["paths"][1:]], r"paths\[0\] has strides \(1, 10\)"),
        ("gradients", lambda a: [a["gradients"][0].half(), *a["gradients"][1:]], r"gradients\[0\] is torch.float16"),
    ],
)
def test_anchored_update_refuses_what_does_not_fit_and_changes_nothing(name: str, value: Any, message: str) -> None:
    arguments = network(momentum=0.9)
    arguments[name] = value(arguments)
    before = copied(arguments)
    with pytest.raises(ValueError, match=message):
        ops.anchored_update_(**arguments)
    for written in WRITTEN:
        assert all(map(torch.equal, arguments[written], before[written]))
