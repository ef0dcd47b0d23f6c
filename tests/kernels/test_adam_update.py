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
from npc_ext.kernels.checks import SIGMAS

from ..tolerances import DTYPES, U, assert_adam_stepped, assert_average
from . import test_update
from .test_update import PARAMETERS, copied

WRITTEN = ("parameters", "first_moments", "second_moments", "steps", "importances", "skipped")


def network(
    dtype: torch.dtype = torch.float32,
    *,
    steps: int = 3,
    weight_decay: float = 0.01,
    maximize: bool = False,
    sigma: str = "sigmoid",
    active_only: bool = False,
    grad_scale: float | None = None,
    channels_last: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Arguments of `adam_update_` for the network of test_update.py, a third of whose neurons are frozen."""
    options: dict[str, Any] = {"channels_last": channels_last, "device": device}
    plain = test_update.network(dtype, sigma=sigma, active_only=active_only, grad_scale=grad_scale, **options)
    real, count = reference.compute_dtype(dtype), len(PARAMETERS)

    def moments() -> list[Tensor]:
        return [torch.randn_like(parameter.cpu(), dtype=real).to(device) for parameter in plain["parameters"]]

    return {
        "parameters": plain["parameters"],
        "gradients": plain["gradients"],
        "first_moments": moments(),
        "second_moments": [moment.square() for moment in moments()],
        "steps": [torch.tensor(float(steps), device=device) for _ in range(count)],
        **{name: plain[name] for name in ("importances", "measured", "skipped", "layer", "neuron_dim", "groups")},
        "lr": [0.01 + 0.001 * index for index in range(count)],
        "first_decay": [0.9] * (count - 1) + [0.0],
        "second_decay": [0.999] * (count - 1) + [0.5],
        "epsilon": [1e-8] * (count - 1) + [1e-3],
        "weight_decay": [weight_decay] * count,
        "maximize": [maximize] * count,
        **{name: plain[name] for name in ("alpha", "beta", "delta", "sigma", "active_only", "grad_scale", "found_inf")},
        "seeds": [],
    }


def check(arguments: dict[str, Any]) -> None:
    """Importance against float64; weights and moments against float64 from the importance that the kernel came to."""
    before, exact = copied(arguments), copied(arguments, double=True)
    ops.adam_update_(**arguments)
    reference.adam_update_(**exact)
    for got, want in zip(arguments["importances"], exact["importances"], strict=True):
        assert_average(got, want, got.numel())
    from_average = copied(before, double=True)
    from_average["importances"] = [average.double() for average in arguments["importances"]]
    from_average["measured"] = [torch.empty(0, device=average.device) for average in arguments["importances"]]
    exceptions = test_update.expected_exceptions(before, arguments["importances"])
    for index, (cleared, _) in exceptions.items():
        from_average["first_moments"][index][cleared] = 0
    reference.adam_update_(**from_average)
    for index, (_, inactive) in exceptions.items():
        for name in ("parameters", "first_moments", "second_moments"):
            assert torch.equal(arguments[name][index][inactive], before[name][index][inactive])
            from_average[name][index][inactive] = before[name][index][inactive].double()
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
    unmeasured, skipped = torch.empty(0, device=device), torch.zeros(1, dtype=torch.int64, device=device)

    def moved(lr: float) -> Tensor:
        weight = torch.zeros(64, 2, device=device)
        first, second, steps = torch.zeros_like(weight), torch.zeros_like(weight), torch.zeros(1, device=device)
        of_neurons = ([importance], [unmeasured], skipped, [0], [0], [1])
        options = ([lr], [0.9], [0.999], [1e-8], [0.01], [False], [0.5], [0.5], [0.99], ["sigmoid"], [False])
        ops.adam_update_([weight], [torch.ones_like(weight)], [first], [second], [steps], *of_neurons, *options)
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
    plain = test_update.wide_network(neurons, active_only=active_only, device=device)
    count = len(plain["parameters"])
    names = ("parameters", "gradients", "importances", "measured", "skipped", "layer", "neuron_dim", "groups")
    of_layers = ("alpha", "beta", "delta", "sigma", "active_only", "grad_scale", "found_inf")
    check(
        {
            **{name: plain[name] for name in names},
            "first_moments": [torch.randn_like(one.cpu()).to(device) for one in plain["parameters"]],
            "second_moments": [torch.rand_like(one.cpu()).to(device) for one in plain["parameters"]],
            "steps": [torch.tensor(3.0, device=device) for _ in range(count)],
            "lr": [0.01] * count,
            "first_decay": [0.9] * count,
            "second_decay": [0.999] * count,
            "epsilon": [1e-8] * count,
            "weight_decay": [0.01] * count,
            "maximize": [False] * count,
            **{name: plain[name] for name in of_layers},
            "seeds": [],
        }
    )


@pytest.mark.parametrize("count", [3, 400])
def test_all_parameters_of_a_layer_see_it_freeze_in_however_many_launches(count: int, device: str) -> None:
    """And a neuron without a gradient, the last one, takes no part in any of them."""
    weights, gradients, firsts, seconds = ([torch.ones(4, 2, device=device) for _ in range(count)] for _ in range(4))
    average, measured = (
        torch.tensor(values, device=device) for values in ([0.4, 0.6, 0.0, 0.4], [2.0, 2.0, 0.0, -0.0])
    )
    skipped = torch.zeros(1, dtype=torch.int64, device=device)
    steps = [torch.zeros((), device=device) for _ in range(count)]
    places = ([0] * count, [0] * count, [1] * count)
    options = ([0.1] * count, [0.9] * count, [0.99] * count, [1e-8] * count, [0.0] * count, [False] * count)
    rest = (skipped, *places, *options, [0.5], [0.5], [0.5], ["sigmoid"], [True])
    ops.adam_update_(weights, gradients, firsts, seconds, steps, [average], [measured], *rest)
    torch.testing.assert_close(average.cpu(), torch.tensor([0.95, 1.05, 0.0, 0.4]))
    for weight, first, second, step in zip(weights, firsts, seconds, steps, strict=True):
        moved = (weight != 1).any(1).tolist()
        assert moved == [False, False, True, False]
        assert first[:, 0].tolist() == [0, 1, 1, 1] and second[:, 0].tolist() == [1, 1, 1, 1] and step == 1


@given(st.data())
def test_adam_update_of_any_network(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    check(
        network(
            draw(st.sampled_from(DTYPES)),
            steps=draw(st.integers(0, 10**6)),
            weight_decay=draw(st.sampled_from([0.0, 0.1])),
            maximize=draw(st.booleans()),
            sigma=draw(st.sampled_from(SIGMAS)),
            active_only=draw(st.booleans()),
            grad_scale=draw(st.sampled_from([None, 2.0**16, 0.3])),
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_neurons_it_is_adamw(dtype: torch.dtype, device: str) -> None:
    value = torch.randn(40, 9).to(device, dtype)
    peer = torch.nn.Parameter(value.clone())
    optimizer = torch.optim.AdamW([peer], lr=0.01, weight_decay=0.1)
    moments = [[torch.zeros_like(value)], [torch.zeros_like(value)]]
    steps = [torch.zeros((), device=device)]
    outside: list[Any] = [[], [], torch.zeros(0, dtype=torch.int64, device=device), [-1], [0], [1]]
    for _ in range(20):
        peer.grad = torch.randn_like(peer.cpu()).to(device)
        optimizer.step()
        constants = [[0.01], [0.9], [0.999], [1e-8], [0.1], [False]]
        ops.adam_update_([value], [peer.grad], *moments, steps, *outside, *constants, *[[]] * 5)
    torch.testing.assert_close(value, peer.detach(), rtol=40 * U[dtype], atol=0.01 * 20 * 24 * U[dtype])


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
    ops.adam_update_(**arguments)
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
        ops.adam_update_(**arguments)
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
        ops.adam_update_(**arguments)
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
    arguments["skipped"] = torch.zeros(layers, dtype=torch.int64, device=device)
    check(arguments)


def test_an_overflow_changes_nothing(device: str) -> None:
    arguments = network(device=device)
    arguments["found_inf"] = torch.ones(1, device=device)
    before = copied(arguments)
    ops.adam_update_(**arguments)
    for name in WRITTEN:
        assert all(map(torch.equal, arguments[name], before[name]))


def test_adam_update_does_not_depend_on_the_number_of_threads() -> None:
    results = []
    for threads in (1, 2):
        torch.manual_seed(0)
        value, gradient = torch.randn(70_001), torch.randn(70_001)
        moments = [[torch.zeros(70_001)], [torch.zeros(70_001)]]
        outside: list[Any] = [[torch.zeros(())], [], [], torch.zeros(0, dtype=torch.int64), [-1], [0], [1]]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            constants = [[0.01], [0.9], [0.999], [1e-8], [0.1], [False]]
            ops.adam_update_([value], [gradient], *moments, *outside, *constants, *[[]] * 5)
        finally:
            torch.set_num_threads(before)
        results.append(value)
    assert torch.equal(*results)


def test_adam_update_passes_opcheck() -> None:
    opcheck(torch.ops.npc_ext.adam_update_.default, tuple(network().values()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("first_moments", lambda a: a["first_moments"][:-1], "first_moments has 10 entries, expected 11"),
        ("second_moments", lambda a: [a["second_moments"][0].half(), *a["second_moments"][1:]], r"second_moments\[0\] is torch.float16"),
        ("steps", lambda a: [torch.empty(0), *a["steps"][1:]], r"steps\[0\] has 0 elements"),
        ("steps", lambda a: [a["steps"][0].long(), *a["steps"][1:]], r"steps\[0\] is torch.int64"),
        ("seeds", lambda a: [0] * 11, r"seeds\[0\] is 0, but parameters\[0\] is torch.float32"),
        ("beta", lambda a: a["beta"][:2], "beta has 2 entries, expected 5"),
        ("epsilon", lambda a: [1e-8], "epsilon has 1 entries, expected 11"),
    ],
)  # fmt: skip
def test_adam_update_refuses_what_does_not_fit_and_changes_nothing(name: str, value: Any, message: str) -> None:
    arguments = network()
    arguments[name] = value(arguments)
    before = copied(arguments)
    with pytest.raises(ValueError, match=message):
        ops.adam_update_(**arguments)
    for written in WRITTEN:
        assert all(map(torch.equal, arguments[written], before[written]))
