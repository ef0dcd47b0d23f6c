"""Adam's step for neurons against its float64 reference and torch's AdamW, and what it promises of frozen rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from npc_ext import ops, reference

from ..tolerances import DTYPES, U, assert_adam_stepped
from . import test_update
from .arguments import (
    Arguments,
    adam,
    any_options,
    any_plasticity,
    call,
    check_averages_and_start_again,
    check_changes_nothing,
    check_is_refused,
    copied,
    flat,
    no_layers,
    no_nonfinite_steps,
    one_layer,
    with_threads,
)
from .test_update import PARAMETERS

WRITTEN = ("parameters", "first_moments", "second_moments", "steps", "importances", "nonfinite_steps")


def network(
    dtype: torch.dtype = torch.float32,
    *,
    steps: int = 3,
    weight_decay: float = 0.01,
    maximize: bool = False,
    device: str = "cpu",
    **options: Any,
) -> Arguments:
    """Arguments of `adam_update_` for the network of test_update.py, a third of whose neurons are frozen."""
    plain = test_update.network(dtype, maximize=maximize, weight_decay=weight_decay, device=device, **options)
    count = len(PARAMETERS)
    return {
        **with_moments(plain, steps),
        "lr": [0.01 + 0.001 * index for index in range(count)],
        "first_decay": [0.9] * (count - 1) + [0.0],
        "second_decay": [0.999] * (count - 1) + [0.5],
        "epsilon": [1e-8] * (count - 1) + [1e-3],
        "weight_decay": plain["weight_decay"],
        "maximize": plain["maximize"],
    }


def with_moments(plain: Arguments, steps: int = 3) -> Arguments:
    """Arguments of `update_` with Adam's state and options in place of SGD's."""
    parameters = plain["parameters"]

    def moments() -> list[Tensor]:
        reals = [reference.compute_dtype(parameter.dtype) for parameter in parameters]
        pairs = zip(parameters, reals, strict=True)
        return [torch.randn_like(one.cpu(), dtype=real).to(one.device) for one, real in pairs]

    return {
        **{name: value for name, value in plain.items() if name not in ("momentum_buffers", "momentum", "nesterov")},
        "first_moments": moments(),
        "second_moments": [moment.square() for moment in moments()],
        "steps": [torch.tensor(float(steps), device=parameter.device) for parameter in parameters],
        "seeds": [],
        **adam(len(parameters)),
    }


def check(arguments: Arguments) -> None:
    """Importance against float64; weights and moments against float64 from the importance that the kernel came to."""
    before, from_average = check_averages_and_start_again("adam_update_", arguments, "first_moments")
    for index, got in enumerate(arguments["parameters"]):
        one = {name: before[name][index] for name in ("lr", "first_decay", "second_decay", "epsilon", "weight_decay")}
        steps = int(before["steps"][index]) + 1
        gradient = before["gradients"][index].double().abs() / (before["grad_scale"] or 1)
        first, second = (from_average[name][index] for name in ("first_moments", "second_moments"))
        moment = before["first_moments"][index].double().abs()
        moment = moment + (1 - one["first_decay"]) * (gradient + moment)
        bias, second_bias = (reference.bias_correction(one[name], steps) for name in ("first_decay", "second_decay"))
        direction = moment / bias / ((second / second_bias).sqrt() + one["epsilon"])
        step = one["lr"] * (direction + one["weight_decay"] * before["parameters"][index].double().abs())
        layer = before["layer"][index]
        assert_adam_stepped(got, from_average["parameters"][index], step, before["alpha"][layer] if layer >= 0 else 0.0)
        u = U[first.dtype if got.dtype == torch.float64 else torch.float32]
        assert bool(((arguments["first_moments"][index].double() - first).abs() <= 6 * u * moment).all())
        assert bool(((arguments["second_moments"][index].double() - second).abs() <= 8 * u * second).all())
        assert arguments["steps"][index] == steps


def test_adam_update_scales_every_neurons_step_with_lr_and_a_warm_up_may_begin_at_zero(device: str) -> None:
    importance = torch.cat([torch.zeros(3), torch.rand(61)]).to(device)

    def moved(lr: float) -> Tensor:
        weight = torch.zeros(64, 2, device=device)
        arguments = with_moments(one_layer(importance, [weight], [torch.ones_like(weight)]), steps=0)
        for name in ("first_moments", "second_moments"):
            arguments[name][0].zero_()
        call(ops.adam_update_, {**arguments, **adam(1, lr)})
        return weight

    full = moved(0.125)
    for share in (0.5, 2**-7, 0.0):  # without rounding
        assert torch.equal(moved(0.125 * share), share * full)
    assert 0 < int((full == 0).all(1).sum()) < 61


OPTIONS: list[dict[str, Any]] = [
    {},
    {"steps": 0, "weight_decay": 0.0},
    {"maximize": True, "grad_scale": 8.0, "sigma": "erf"},
    {"steps": 100_000, "channels_last": True, "active_only": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adam_update_agrees_with_the_reference(dtype: torch.dtype, options: dict[str, Any], device: str) -> None:
    check(network(dtype, **options, device=device))


@test_update.around_4096
@pytest.mark.parametrize("active_only", [False, True])
def test_adam_update_of_layers_of_very_many_neurons(neurons: int, active_only: bool, device: str) -> None:
    check(with_moments(test_update.wide_network(neurons, active_only=active_only, device=device)))


@pytest.mark.parametrize("count", [3, 400])
def test_all_parameters_of_a_layer_see_it_freeze_in_however_many_launches(count: int, device: str) -> None:
    """And a neuron without a gradient, the last one, takes no part in any of them."""
    weights, gradients, firsts, seconds = ([torch.ones(4, 2, device=device) for _ in range(count)] for _ in range(4))
    average, measured = (
        torch.tensor(values, device=device) for values in ([0.4, 0.6, 0.0, 0.4], [2.0, 2.0, 0.0, -0.0])
    )
    steps = [torch.zeros((), device=device) for _ in range(count)]
    arguments = one_layer(average, weights, gradients, measured) | {"delta": [0.5], "active_only": [True]}
    arguments |= {"first_moments": firsts, "second_moments": seconds, "steps": steps}
    call(ops.adam_update_, {**arguments, **adam(count, 0.1, weight_decay=0.0, second_decay=0.99)})
    torch.testing.assert_close(average.cpu(), torch.tensor([0.95, 1.05, 0.0, 0.4]))
    for weight, first, second, step in zip(weights, firsts, seconds, steps, strict=True):
        moved = (weight != 1).any(1).tolist()
        assert moved == [False, False, True, False]
        assert first[:, 0].tolist() == [0, 1, 1, 1] and second[:, 0].tolist() == [1, 1, 1, 1] and step == 1


@given(st.data())
def test_adam_update_of_any_network(data: st.DataObject) -> None:
    draw = data.draw
    options = {**any_options(draw), **any_plasticity(draw)}
    del options["momentum"], options["nesterov"]
    check(network(steps=draw(st.integers(0, 10**6)), **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_neurons_it_is_adamw(dtype: torch.dtype, device: str) -> None:
    value = torch.randn(40, 9).to(device, dtype)
    peer = torch.nn.Parameter(value.clone())
    optimizer = torch.optim.AdamW([peer], lr=0.01, weight_decay=0.1)
    arguments = {**outside(value), **adam(1, weight_decay=0.1)}
    for _ in range(20):
        peer.grad = torch.randn_like(peer.cpu()).to(device)
        optimizer.step()
        call(ops.adam_update_, {**arguments, "gradients": [peer.grad]})
    torch.testing.assert_close(value, peer.detach(), rtol=40 * U[dtype], atol=0.01 * 20 * 24 * U[dtype])


def outside(value: Tensor) -> Arguments:
    """Arguments for a parameter in no layer, without its gradient and options."""
    state = {"first_moments": [torch.zeros_like(value)], "second_moments": [torch.zeros_like(value)]}
    steps = [torch.zeros((), device=value.device)]
    return {"parameters": [value], **state, "steps": steps, **no_layers(1, str(value.device))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at_random", [False, True])
def test_frozen_rows_and_their_moments_stay_bit_identical_but_for_the_first_once(
    dtype: torch.dtype, at_random: bool, device: str
) -> None:
    if at_random and dtype != torch.bfloat16:
        pytest.skip("only bfloat16 is rounded at random")
    arguments = network(dtype, device=device)
    arguments["seeds"] = list(range(len(PARAMETERS))) if at_random else []
    before = copied(arguments)
    call(ops.adam_update_, arguments)
    seen = 0
    for index, (_, layer, dim, groups) in enumerate(PARAMETERS):
        if layer < 0:
            continue
        frozen, was_frozen = (
            reference.per_element(
                one["importances"][layer] >= one["beta"][layer], one["parameters"][index], dim, groups
            )
            for one in (arguments, before)
        )
        for name in ("parameters", "first_moments", "second_moments"):
            got, want = arguments[name][index], before[name][index]
            where = frozen.expand_as(got)
            if name == "first_moments":
                froze = where & ~was_frozen
                assert not bool(got[froze].any())
                where = where & ~froze
            assert torch.equal(got[where], want[where])
            where = frozen.expand_as(got)
            if not at_random:
                assert name != "second_moments" or bool((got != want)[~where].all())
        seen += int(frozen.sum())
    assert seen > 20


def test_importance_of_a_layer_without_parameters_moves(device: str) -> None:
    arguments = network(device=device)
    gone = [at for at, layer in enumerate(arguments["layer"]) if layer == 0]
    for name, value in arguments.items():
        if isinstance(value, list) and len(value) == len(PARAMETERS):
            arguments[name] = [one for at, one in enumerate(value) if at not in gone]
    before = copied(arguments)
    check(arguments)
    assert not torch.equal(arguments["importances"][0], before["importances"][0])


def test_parameters_without_elements_count_their_steps(device: str) -> None:
    """As shards may be, also where a layer has no others: C moves all the same."""
    arguments = network(device=device)
    for name in ("parameters", "gradients", "first_moments", "second_moments"):
        for at in (0, 1, 9):  # all of a layer, and one outside
            arguments[name][at] = arguments[name][at][:0]
    arguments["first_neuron"] = [10, 10, *[0] * 9]
    before = copied(arguments)
    for _ in range(2):
        call(ops.adam_update_, arguments)
    assert [int(count) for count in arguments["steps"]] == [5] * len(PARAMETERS)
    assert not torch.equal(arguments["importances"][0], before["importances"][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shard_takes_the_step_of_its_rows(dtype: torch.dtype, device: str) -> None:
    whole = network(dtype, device=device)
    rows = {0: (2, 7), 3: (20, 64), 7: (0, 5), 8: (1, 1)}
    shards = copied(whole)
    shards["first_neuron"] = [rows[at][0] if at in rows else 0 for at in range(len(PARAMETERS))]
    for name in ("parameters", "gradients", "first_moments", "second_moments"):
        for at, (first, last) in rows.items():
            shards[name][at] = shards[name][at][first:last].clone()
    for arguments in (whole, shards):
        call(ops.adam_update_, arguments)
    for name in ("parameters", "first_moments", "second_moments"):
        for at, (first, last) in rows.items():
            assert torch.equal(shards[name][at], whole[name][at][first:last])


@pytest.mark.parametrize(("layers", "each"), [(70, 2), (1, 200), (1, 1)])
def test_adam_update_of_any_number_of_layers_and_parameters(layers: int, each: int, device: str) -> None:
    arguments = network(device=device)
    first = {name: value[0] for name, value in copied(arguments).items() if isinstance(value, list) and value}
    per_layer = ("importances", "measured", "alpha", "beta", "delta", "sigma", "active_only")
    for name, value in first.items():
        count = layers if name in per_layer else layers * each
        arguments[name] = [value.clone() if isinstance(value, Tensor) else value for _ in range(count)]
    arguments["layer"] = [index // each for index in range(layers * each)]
    arguments["nonfinite_steps"] = no_nonfinite_steps(layers, device)
    check(arguments)


def test_an_overflow_changes_nothing(device: str) -> None:
    arguments = network(device=device)
    arguments["found_inf"] = torch.ones(1, device=device)
    check_changes_nothing(ops.adam_update_, arguments, WRITTEN)


def test_adam_update_does_not_depend_on_the_number_of_threads() -> None:
    def run() -> Tensor:
        torch.manual_seed(0)
        value, gradient = torch.randn(70_001), torch.randn(70_001)
        call(ops.adam_update_, {**outside(value), "gradients": [gradient], **adam(1, weight_decay=0.1)})
        return value

    assert torch.equal(with_threads(1, run), with_threads(2, run))


def test_adam_update_passes_opcheck() -> None:
    opcheck(torch.ops.npc_ext.adam_update_.default, flat("adam_update_", network()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("first_moments", lambda a: a["first_moments"][:-1], "first_moments has 10 entries, expected 11"),
        ("second_moments", lambda a: [a["second_moments"][0].half(), *a["second_moments"][1:]], r"second_moments\[0\] is torch.float16"),
        ("first_moments", lambda a: [None, *a["first_moments"][1:]], r"first_moments\[0\] is None; expected torch.float32"),
        ("steps", lambda a: [None, *a["steps"][1:]], r"steps\[0\] is None"),
        ("steps", lambda a: [a["steps"][0].long(), *a["steps"][1:]], r"steps\[0\] is torch.int64"),
        ("seeds", lambda a: [0] * 11, r"seeds\[0\] is 0, but parameters\[0\] is torch.float32"),
        ("beta", lambda a: a["beta"][:2], "beta has 2 entries, expected 5"),
        ("epsilon", lambda a: [1e-8], "epsilon has 1 entries, expected 11"),
    ],
)  # fmt: skip
def test_adam_update_refuses_what_does_not_fit_and_changes_nothing(name: str, value: Any, message: str) -> None:
    arguments = network()
    arguments[name] = value(arguments)
    check_is_refused(ops.adam_update_, arguments, message, WRITTEN)
