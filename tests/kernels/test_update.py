"""The update kernel against the float64 reference, and what it promises about rows it must not touch."""

from __future__ import annotations

import inspect
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from npc_ext import ops, reference
from npc_ext.columns import Layer, LayerStepOptions, Network

from .. import cuda_on_cpu
from ..tolerances import DTYPES, assert_average, assert_stepped
from .arguments import (
    Arguments,
    any_options,
    any_plasticity,
    assert_equal,
    at_offset,
    call,
    check_averages_and_start_again,
    check_changes_nothing,
    check_is_refused,
    copied,
    exact,
    expected_exceptions,
    flat,
    no_nonfinite_steps,
    one_layer,
    placement,
    plasticity,
    sgd,
    tensors,
    with_threads,
)
from .test_importance import strided_pairs

LAYERS = (10, 64, 12, 33, 1)
# shape, layer, dimension of neurons, groups; the last two belong to no neuron.
PARAMETERS: list[tuple[tuple[int, ...], int, int, int]] = [
    ((10, 7), 0, 0, 1),
    ((10,), 0, 0, 1),
    ((64, 3, 3, 3), 1, 0, 1),
    ((64,), 1, 0, 1),
    ((6, 4, 3, 3), 2, 1, 3),
    ((12,), 2, 0, 1),
    ((5, 33, 3), 3, 1, 1),
    ((33, 400), 3, 0, 1),
    ((1, 70), 4, 0, 1),
    ((100,), -1, 0, 1),
    ((7, 9), -1, 0, 1),
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
    **options: Any,
) -> Arguments:
    """Arguments of `update_` for a small network with every kind of parameter; a third of all neurons are frozen."""
    count, layers, shapes = len(PARAMETERS), len(LAYERS), [shape for shape, *_ in PARAMETERS]
    importances = [torch.rand(neurons).to(device) * 0.75 for neurons in LAYERS]
    importances[0][:2] = 0
    measured = [torch.rand(neurons).to(device) * 100 for neurons in LAYERS]
    measured[1][:40] = -0.0  # received no gradient
    measured[1][:5] = 0  # received gradients, which sum to zero
    of_parameters = ("parameters", "gradients", "momentum_buffers")
    return {
        **{name: tensors(shapes, dtype, device, channels_last) for name in of_parameters},
        "importances": importances,
        "measured": measured,
        "nonfinite_steps": no_nonfinite_steps(layers, device),
        "layer": [layer for _, layer, _, _ in PARAMETERS],
        "neuron_dim": [dim for _, _, dim, _ in PARAMETERS],
        "groups": [groups for *_, groups in PARAMETERS],
        **sgd(count, [0.1 + 0.01 * index for index in range(count)], **options),
        **plasticity(layers, sigma=sigma, active=active_only),
        "alpha": [0.5, 0.4, 0.6, 0.5, 0.5],
        "beta": [0.5, 0.6, 0.5, 0.4, 0.5],
        "delta": [0.99, 0.9, 0.0, 0.98, 0.99],
        "grad_scale": None if grad_scale is None else torch.tensor(grad_scale, device=device),
        "found_inf": None,
    }


def check(arguments: Arguments) -> None:
    """Importance against float64; weights against float64 from the importance that the kernel came to."""
    before, given_average = check_averages_and_start_again("update_", arguments, "momentum_buffers")
    for index, got in enumerate(arguments["parameters"]):
        # Every term of the step in absolute value: the scale of its rounding.
        gradient, value = before["gradients"][index].double().abs(), before["parameters"][index].double().abs()
        gradient = gradient / (before["grad_scale"] or 1)
        step = gradient + before["weight_decay"][index] * value
        if before["momentum"][index]:
            step = 2 * step + before["momentum"][index] * before["momentum_buffers"][index].double().abs()
        layer = before["layer"][index]
        alpha = before["lr"][index] * before["alpha"][layer] if layer >= 0 else 0.0
        assert_stepped(got, given_average["parameters"][index], step, alpha)
        if before["momentum"][index]:
            assert_stepped(arguments["momentum_buffers"][index], given_average["momentum_buffers"][index], step, 0.0)


def zero_weights(importance: Tensor, lr: float, sigma: str) -> tuple[Tensor, Arguments]:
    """Weights of zero, two to each neuron, and the arguments of `update_` for them, with the paper's alpha and beta."""
    weight = torch.zeros(importance.numel(), 2, device=importance.device)
    arguments = one_layer(importance, [weight], [torch.ones_like(weight)])
    return weight, {**arguments, **sgd(1, lr), "sigma": [sigma]}


@pytest.mark.parametrize("sigma", ["sigmoid", "tanh", "erf"])
def test_update_moves_weights_at_the_rates_that_the_paper_states_for_its_constants(sigma: str, device: str) -> None:
    importance = torch.tensor([0.0, 1e-30, 0.05, 0.1, 0.25, 0.4, 0.499, 0.5, 0.7, 1e30], device=device)
    weight, arguments = zero_weights(importance, 0.1, sigma)
    call(ops.update_, arguments)
    ratio = 0.5 / importance.double()
    surplus = (ratio.log() if sigma == "erf" else ratio - 1).clamp(min=0)
    eta = (0.05 * surplus.sqrt()).clamp(max=0.1)  # eq. 7 as in the paper, with alpha = 0.05 and eta_max = 0.1
    assert_stepped(weight, -eta.unsqueeze(1).expand(-1, 2), torch.ones_like(weight).double(), 0.05)
    assert bool((weight[7:] == 0).all())


@pytest.mark.parametrize("sigma", ["sigmoid", "erf"])
def test_update_scales_every_rate_with_lr_and_a_warm_up_may_begin_at_zero(sigma: str, device: str) -> None:
    importance = torch.cat([torch.zeros(3), torch.rand(61)]).to(device)
    full, arguments = zero_weights(importance, 0.125, sigma)
    call(ops.update_, arguments)
    for share in (0.5, 2**-7, 0.0):  # without rounding
        weight, arguments = zero_weights(importance, 0.125 * share, sigma)
        call(ops.update_, arguments)
        assert torch.equal(weight, share * full)
    assert 0 < int((full == 0).all(1).sum()) < 61


OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.1, "active_only": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"weight_decay": 0.01, "maximize": True},
    {"sigma": "erf", "active_only": True},
    {"sigma": "tanh", "grad_scale": 8.0},
    {"momentum": 0.5, "maximize": True, "grad_scale": 3.0, "channels_last": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_agrees_with_the_reference(dtype: torch.dtype, options: dict[str, Any], device: str) -> None:
    check(network(dtype, **options, device=device))


MIXED = [torch.float32, torch.bfloat16, torch.float16]


def mixed_network(device: str) -> Arguments:
    """A network whose parameters have three dtypes, also those of one layer."""
    arguments = network(momentum=0.9, weight_decay=0.1, device=device)
    for name in ("parameters", "gradients", "momentum_buffers"):
        arguments[name] = [one.to(MIXED[index % 3]) for index, one in enumerate(arguments[name])]
    return arguments


def test_update_of_parameters_of_several_dtypes(device: str) -> None:
    check(mixed_network(device))


@pytest.mark.parametrize("device", ["cuda_on_cpu"], indirect=True)
def test_an_update_is_one_launch_and_one_more_for_each_further_dtype(device: str) -> None:
    one_dtype, mixed = network(momentum=0.9, device=device), mixed_network(device)
    assert cuda_on_cpu.counted("launches", lambda: call(ops.update_, one_dtype)) == 1
    assert cuda_on_cpu.counted("launches", lambda: call(ops.update_, mixed)) == 4, (
        "three dtypes, and layers that have two of them"
    )
    mixed["layer"] = [-1] * len(mixed["layer"])
    assert cuda_on_cpu.counted("launches", lambda: call(ops.update_, mixed)) == 3


LONG_RUNS = [  # rows, run, dimension of neurons, groups; the other dimension is 4
    *((3000, 1, 0, 1), (1000, 2, 0, 1), (1000, 3, 0, 1), (300, 7, 0, 1), (40, 300, 0, 1), (2, 20_000, 0, 1)),
    *((3000, 1, 1, 1), (5000, 1, 1, 1), (700, 3, 1, 1), (9, 1000, 1, 1), (500, 2, 1, 3), (5, 3000, 1, 2)),
]


@pytest.mark.parametrize(("rows", "run", "dim", "groups"), LONG_RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_update_of_runs_of_any_length(
    rows: int, run: int, dim: int, groups: int, dtype: torch.dtype, device: str
) -> None:
    check_one_parameter(groups, rows, run, dim, dtype, device)


@given(st.data())
def test_update_of_any_network(data: st.DataObject) -> None:
    draw = data.draw
    check(network(**any_options(draw), **any_plasticity(draw), channels_last=draw(st.booleans())))


@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2), st.sampled_from(DTYPES))
def test_update_of_one_parameter_of_any_shape(groups: int, rows: int, run: int, dim: int, dtype: torch.dtype) -> None:
    check_one_parameter(groups, rows, run, dim, dtype, "cpu")


@pytest.mark.parametrize("count", range(30))
def test_update_of_one_parameter_of_a_random_shape(count: int, device: str) -> None:
    draw = random.Random(count)
    dtype = draw.choice([torch.float32, torch.float16, torch.bfloat16])
    sizes = draw.randint(1, 3), draw.randint(1, 70), draw.choice([1, 3, 8, 70, 700]), draw.randint(0, 2)
    check_one_parameter(*sizes, dtype, device)


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_update_of_parameters_that_begin_anywhere(offset: int, device: str) -> None:
    weight, gradient, buffer = (at_offset(torch.randn(10, 24).to(device), offset) for _ in range(3))
    arguments = one_layer(torch.rand(10).to(device) * 0.75, [weight], [gradient])
    arguments |= {"momentum_buffers": [buffer], **sgd(1, momentum=0.9)}
    want = exact(arguments)
    step = gradient.double().abs() + buffer.double().abs()
    call(ops.update_, arguments)
    call(reference.update_, want)
    assert_stepped(weight, want["parameters"][0], step, 0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_come_to_the_same_bits_as_the_whole(dtype: torch.dtype, device: str) -> None:
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    whole = network(dtype, **options, device=device)
    in_parts = copied(whole)
    call(ops.update_, whole)
    for rank in range(12):
        shard = shard_of(in_parts, rank, 12)
        call(ops.update_, shard)
        assert_equal(shard, whole, ["importances"])
    assert_equal(in_parts, whole, ["parameters", "momentum_buffers"])


@pytest.mark.parametrize("rank", [0, 2, 11])
def test_shards_agree_with_the_reference(rank: int, device: str) -> None:
    check(shard_of(network(weight_decay=0.01, sigma="erf", device=device), rank, 12))


def shard_of(arguments: Arguments, rank: int, processes: int) -> Arguments:
    """What one of several processes holds: views of blocks of rows, some of them empty, and all of the importance."""
    arguments = {**arguments, "first_neuron": [0] * len(PARAMETERS)}
    for name in ("importances", "nonfinite_steps"):
        arguments[name] = copied({name: arguments[name]})[name]
    for name in ("parameters", "gradients", "momentum_buffers"):
        arguments[name] = list(arguments[name])
    for index, (shape, _, dim, groups) in enumerate(PARAMETERS):
        rows = -(-shape[0] // processes)
        first = min(rank * rows, shape[0])
        if groups > 1:  # cannot be divided: one process has it all
            first, rows = (0, shape[0]) if rank == 0 else (shape[0], 0)
            arguments["layer"] = [-1 if at == index and rank else layer for at, layer in enumerate(arguments["layer"])]
        for name in ("parameters", "gradients", "momentum_buffers"):
            arguments[name][index] = arguments[name][index][first : first + rows]
        arguments["first_neuron"][index] = first if dim == 0 and groups == 1 else 0
    return arguments


def test_shards_outside_of_their_layer_are_refused(device: str) -> None:
    arguments = shard_of(network(device=device), 1, 12)
    arguments["first_neuron"][2] = 60
    check_is_refused(ops.update_, arguments, "6 rows from neuron 60 on, but importance has 64 values", WRITTEN)


def many_layers(layers: int, each: int, device: str = "cpu") -> Arguments:
    """Arguments of `update_` for layers of 4 neurons, and 3 parameters of no layer."""
    count = layers * each + 3
    return {
        **{name: tensors([(4, 5)] * count, device=device) for name in ("parameters", "gradients")},
        **{name: [torch.rand(4).to(device) for _ in range(layers)] for name in ("importances", "measured")},
        "nonfinite_steps": no_nonfinite_steps(layers, device),
        **placement(count),
        "layer": [index for index in range(layers) for _ in range(each)] + [-1] * 3,
        **sgd(count, weight_decay=0.1),
        **plasticity(layers, beta=0.9, delta=0.9),
    }


@pytest.mark.parametrize(("layers", "each", "launches"), [(7, 3, 1), (69, 3, 1), (70, 3, 2), (71, 1, 2), (70, 0, 1)])
@pytest.mark.parametrize("device", ["cuda_on_cpu"], indirect=True)
def test_a_launch_holds_210_parameters_and_70_layers(layers: int, each: int, launches: int, device: str) -> None:
    arguments = many_layers(layers, each, device)
    assert cuda_on_cpu.counted("launches", lambda: call(ops.update_, arguments)) == launches


@pytest.mark.parametrize(("layers", "each"), [(130, 2), (69, 3), (1, 400), (90, 1), (3, 0)])
def test_networks_of_any_number_of_layers_and_parameters(layers: int, each: int, device: str) -> None:
    arguments = many_layers(layers, each, device)
    want = exact(arguments)
    call(ops.update_, arguments)
    call(reference.update_, want)
    for name in ("parameters", "importances"):
        for got, other in zip(arguments[name], want[name], strict=True):
            torch.testing.assert_close(got.double(), other, rtol=1e-5, atol=1e-5)


# On CUDA, layers above 4,096 neurons have their importance summed once, before the update (csrc/cuda/wide.h).
around_4096 = pytest.mark.parametrize("neurons", [4096, 4097, 6000])


def wide_network(neurons: int, *, inputs: int = 1, active_only: bool = False, device: str = "cpu") -> Arguments:
    """Arguments of `update_` for a layer of many neurons, one of few, and one of many that has no parameters."""
    shapes, layers = [(neurons, inputs), (3, 5), (neurons,), (7,)], (neurons, 3, neurons + 1)
    measured = [torch.rand(size).to(device) for size in layers]
    for one in measured:
        one[::3] = -0.0  # received no gradient
        one[::9] = 0  # received gradients, which sum to zero
    return {
        **{name: tensors(shapes, device=device) for name in ("parameters", "gradients", "momentum_buffers")},
        "importances": [torch.rand(size).to(device) * 0.75 for size in layers],
        "measured": measured,
        "nonfinite_steps": no_nonfinite_steps(len(layers), device),
        **placement(len(shapes)),
        "layer": [0, 1, 0, -1],
        **sgd(len(shapes), momentum=0.9),
        **plasticity(3, active=active_only),
        "delta": [0.9, 0.99, 0.8],
        "grad_scale": None,
        "found_inf": None,
    }


@around_4096
@pytest.mark.parametrize("active_only", [False, True])
def test_update_of_layers_of_very_many_neurons(neurons: int, active_only: bool, device: str) -> None:
    arguments = wide_network(neurons, active_only=active_only, device=device)
    before = [average.clone() for average in arguments["importances"]]
    check(arguments)
    assert not any(map(torch.equal, arguments["importances"], before))
    assert not arguments["nonfinite_steps"].any()


@around_4096
def test_many_neurons_with_non_finite_importance_keep_their_average_and_are_counted(neurons: int, device: str) -> None:
    arguments = wide_network(neurons, device=device)
    arguments["measured"][0][-1], arguments["measured"][2][5] = torch.nan, torch.inf
    before = copied(arguments)
    call(ops.update_, arguments)
    assert arguments["nonfinite_steps"].tolist() == [1, 0, 1]
    changed = [not torch.equal(a, b) for a, b in zip(arguments["importances"], before["importances"], strict=True)]
    assert changed == [False, True, False]


@around_4096
def test_many_neurons_do_not_change_on_overflow_nor_their_average_unmeasured(neurons: int, device: str) -> None:
    arguments = wide_network(neurons, device=device)
    arguments["found_inf"] = torch.tensor(1.0, device=device)
    check_changes_nothing(ops.update_, arguments, WRITTEN)
    before = copied(arguments)
    arguments["found_inf"] = torch.tensor(0.0, device=device)
    arguments["measured"] = [None] * 3
    call(ops.update_, arguments)
    assert all(map(torch.equal, arguments["importances"], before["importances"]))
    assert not torch.equal(arguments["parameters"][0], before["parameters"][0])


def test_any_number_of_layers_of_very_many_neurons(device: str) -> None:
    layers, neurons = 34, 4097
    averages, measured = ([torch.rand(neurons).to(device) for _ in range(layers)] for _ in range(2))
    arguments = one_layer(averages[0], tensors([(neurons, 1)], device=device), tensors([(neurons, 1)], device=device))
    arguments |= {"importances": averages, "measured": measured, "layer": [33], **sgd(1)}
    arguments |= {**plasticity(layers, beta=0.9, delta=0.9), "nonfinite_steps": no_nonfinite_steps(layers, device)}
    want = exact(arguments)
    call(ops.update_, arguments)
    call(reference.update_, want)
    for got, other in zip(averages, want["importances"], strict=True):
        assert_average(got, other, neurons)
    weight, exact_weight = arguments["parameters"][0], want["parameters"][0]
    torch.testing.assert_close(weight.double(), exact_weight, rtol=1e-5, atol=1e-5)


def check_one_parameter(groups: int, rows: int, run: int, dim: int, dtype: torch.dtype, device: str) -> None:
    shape = [2 * groups if groups > 1 else 3, 4, run]
    dim = 1 if groups > 1 else dim
    shape[dim] = rows
    parameter, neurons = torch.randn(shape).to(device, dtype), rows * groups
    importance = torch.rand(neurons).to(device) * 0.75
    gradient = torch.randn_like(parameter.cpu()).to(device)
    arguments = {**one_layer(importance, [parameter], [gradient]), **sgd(1), "neuron_dim": [dim], "groups": [groups]}
    want = exact(arguments)
    call(ops.update_, arguments)
    call(reference.update_, want)
    assert_stepped(parameter, want["parameters"][0], gradient.double().abs(), 0.05)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_update_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(1)
        weight, bias = torch.randn(301, 1003), torch.randn(301)
        gradients, buffers = [weight * 2, bias * 3], [weight * 4, bias * 5]
        arguments = one_layer(torch.rand(301), [weight, bias], gradients, torch.rand(301))
        arguments |= {"momentum_buffers": buffers, "delta": [0.9]}
        call(ops.update_, {**arguments, **sgd(2, momentum=0.9, nesterov=True, weight_decay=0.01)})
        return [weight, bias, *buffers]

    assert all(map(torch.equal, with_threads(1, run), with_threads(threads, run)))


def test_frozen_rows_stay_bit_identical_under_momentum_nesterov_and_weight_decay(device: str) -> None:
    arguments = network(momentum=0.9, nesterov=True, weight_decay=0.1, device=device)
    arguments["measured"] = [None] * len(LAYERS)
    for gradient in arguments["gradients"]:
        gradient.view(-1)[::3] = torch.nan  # not even read
    before = copied(arguments)
    call(ops.update_, arguments)
    for index, (shape, layer, dim, groups) in enumerate(PARAMETERS):
        if layer < 0:
            continue
        frozen = before["importances"][layer] >= before["beta"][layer]
        rows = (
            reference.per_element(frozen.double(), torch.empty(shape, device=device), dim, groups).bool().expand(shape)
        )
        for name in ("parameters", "momentum_buffers"):
            assert torch.equal(arguments[name][index][rows], before[name][index][rows])  # also what is not zero
        assert not torch.equal(arguments["parameters"][index], before["parameters"][index]) or bool(rows.all())


@pytest.mark.parametrize("at_random", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_neuron_that_freezes_loses_its_momentum_once(dtype: torch.dtype, at_random: bool, device: str) -> None:
    if at_random and dtype != torch.bfloat16:
        pytest.skip("only bfloat16 is rounded at random")
    arguments = network(dtype, momentum=0.9, weight_decay=0.1, device=device)
    if at_random:
        arguments["steps"] = [torch.ones((), device=device) for _ in PARAMETERS]
        arguments["seeds"] = list(range(len(PARAMETERS)))
    arguments["lr"] = [0.0] * len(PARAMETERS)  # frozen means that eq. 7 is zero, not that lr is
    before = copied(arguments)
    call(ops.update_, arguments)
    froze = {index: own for index, (own, _) in expected_exceptions(before, arguments["importances"]).items()}
    assert sum(int(own.sum()) for own in froze.values()) > 100
    for index, (_, layer, dim, groups) in enumerate(PARAMETERS):
        buffer, was = arguments["momentum_buffers"][index], before["momentum_buffers"][index]
        assert torch.equal(arguments["parameters"][index], before["parameters"][index])
        if layer < 0:
            continue
        assert not bool(buffer[froze[index]].any())
        frozen = (arguments["importances"][layer] >= arguments["beta"][layer]).double()
        frozen = reference.per_element(frozen, was, dim, groups).expand_as(was).bool()
        assert torch.equal(buffer[frozen & ~froze[index]], was[frozen & ~froze[index]])
        assert frozen.all() or bool((buffer != was)[~frozen].double().mean() > 0.5)
    # Once: what is in their momentum after that is nobody's business.
    arguments["measured"] = [None] * len(LAYERS)
    for index, own in froze.items():
        arguments["momentum_buffers"][index][own] = 7
    call(ops.update_, arguments)
    for index, own in froze.items():
        assert bool((arguments["momentum_buffers"][index][own] == 7).all())


@pytest.mark.parametrize("count", [3, 400])
@pytest.mark.parametrize("at_once", [False, True])
def test_all_parameters_of_a_layer_see_it_freeze_in_however_many_launches(
    count: int, at_once: bool, device: str
) -> None:
    weights, gradients, buffers = ([torch.ones(3, 2, device=device) for _ in range(count)] for _ in range(3))
    average, measured = (torch.tensor(values, device=device) for values in ([0.4, 0.6, 0.0], [2.0, 2.0, 0.0]))
    arguments = one_layer(average, weights, gradients, measured)
    arguments |= {"momentum_buffers": buffers, "delta": [0.5], **sgd(count, momentum=0.9)}
    if at_once:
        del arguments["measured"]
        n = measured.unsqueeze(0)
        inputs = {
            "activations": [n],
            "activation_gradients": [torch.ones_like(n)],
            "channel_dim": [1],
            "batch_dim": [0],
        }
        call(ops.network_step_, {**inputs, **arguments})
    else:
        call(ops.update_, arguments)
    torch.testing.assert_close(average.cpu(), torch.tensor([0.95, 1.05, 0.0]))
    for weight, buffer in zip(weights, buffers, strict=True):
        assert weight[:2].eq(1).all(), "frozen now, and frozen before"
        torch.testing.assert_close(weight[2].cpu(), torch.tensor([0.81, 0.81]))
        torch.testing.assert_close(buffer.cpu(), torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.9, 1.9]]))


def test_a_neuron_without_a_gradient_takes_no_part_in_a_step_of_the_active(device: str) -> None:
    arguments = network(momentum=0.9, weight_decay=0.1, active_only=True, device=device)
    arguments["measured"][0].copy_(torch.tensor([-0.0, 0.0, 1.0] + [2.0] * 7))
    arguments["measured"][3].fill_(-0.0)  # none of a layer does
    before = copied(arguments)
    call(ops.update_, arguments)
    for layer, inactive in ((0, [0]), (3, range(33))):
        kept = torch.zeros(LAYERS[layer], dtype=torch.bool, device=device)
        kept[list(inactive)] = True
        same = arguments["importances"][layer] == before["importances"][layer]
        assert torch.equal(same | (before["importances"][layer] == 0), kept | (before["importances"][layer] == 0))
    for index, start in ((0, 1), (1, 1)):
        for name in ("parameters", "momentum_buffers"):
            assert torch.equal(arguments[name][index][0], before[name][index][0])
            assert not torch.equal(arguments[name][index][start], before[name][index][start])
    for index in (6, 7):
        for name in ("parameters", "momentum_buffers"):
            assert torch.equal(arguments[name][index], before[name][index])


def test_a_neuron_without_a_gradient_stays_also_where_importance_does_not_count(device: str) -> None:
    arguments = network(momentum=0.9, weight_decay=0.1, active_only=True, device=device)
    arguments["beta"] = [1.0] * len(LAYERS)  # nothing is frozen
    arguments["measured"][0].copy_(torch.tensor([-0.0] + [torch.nan] * 9))
    arguments["measured"][3].copy_(torch.tensor([-0.0] + [0.0] * 32))
    arguments["measured"][0][1].neg_()  # a NaN of either sign is no mark
    before = copied(arguments)
    call(ops.update_, arguments)
    for index in (0, 7):  # the weights of these layers
        for name in ("parameters", "momentum_buffers"):
            changed = (arguments[name][index] != before[name][index]).any(1)
            assert not changed[0] and changed[1:].all()
    for layer in (0, 3):
        assert torch.equal(arguments["importances"][layer], before["importances"][layer])


def test_neurons_that_received_only_gradients_that_sum_to_zero_train(device: str) -> None:
    arguments = network(active_only=True, device=device)
    for one in arguments["measured"]:
        one.zero_()
    before = copied(arguments)
    call(ops.update_, arguments)
    assert all(map(torch.equal, arguments["importances"], before["importances"]))
    for got, was, free in zip(arguments["parameters"], before["parameters"], before["layer"], strict=True):
        assert free == 4 or not torch.equal(got, was)


def test_a_layer_with_non_finite_importance_keeps_its_average_and_counts(device: str) -> None:
    arguments = network(device=device)
    arguments["measured"][0][3], arguments["measured"][2][0] = torch.nan, torch.inf
    before = copied(arguments)
    call(ops.update_, arguments)
    assert arguments["nonfinite_steps"].tolist() == [1, 0, 1, 0, 0]
    changed = [not torch.equal(a, b) for a, b in zip(arguments["importances"], before["importances"], strict=True)]
    assert changed == [False, True, False, True, True]
    assert all(bool(parameter.isfinite().all()) for parameter in arguments["parameters"])


def test_a_layer_whose_importance_sums_to_zero_keeps_its_average(device: str) -> None:
    arguments = network(device=device)
    arguments["measured"][1].zero_()
    before = arguments["importances"][1].clone()
    call(ops.update_, arguments)
    assert torch.equal(arguments["importances"][1], before)
    assert not arguments["nonfinite_steps"].any()


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e30])
def test_importance_of_extreme_size_is_normalized_like_any_other(size: float, device: str) -> None:
    arguments = network(device=device)
    pattern = (torch.arange(33, device=device) % 7).float()
    arguments["measured"][3] = pattern * size
    arguments["delta"][3] = 0.0
    call(ops.update_, arguments)
    measured = arguments["measured"][3].double()
    shares = measured / measured.sum() * 33
    torch.testing.assert_close(arguments["importances"][3].double(), shares, rtol=1e-5, atol=0)


def test_found_inf_changes_nothing_at_all(device: str) -> None:
    arguments = network(momentum=0.9, device=device)
    arguments["found_inf"] = torch.tensor(1.0, device=device)
    check_changes_nothing(ops.update_, arguments, WRITTEN)


def test_every_written_tensor_gets_a_new_version() -> None:
    arguments = network(momentum=0.9)
    written = [one for name in WRITTEN for one in (arguments[name] if name != "nonfinite_steps" else [arguments[name]])]
    versions = [tensor._version for tensor in written]
    call(ops.update_, arguments)
    assert all(tensor._version > old for tensor, old in zip(written, versions, strict=True))


def test_update_passes_opcheck() -> None:
    arguments = network(momentum=0.9)
    opcheck(torch.ops.npc_ext.update_.default, flat("update_", arguments))
    opcheck(torch.ops.npc_ext.update_.default, flat("update_", {**arguments, "first_neuron": [0] * len(PARAMETERS)}))


def activations(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Arguments:
    shapes = [(4, 10), (4, 64, 5, 5), (4, 12, 3, 3), (4, 7, 33), (4, 1)]
    return {
        "activations": tensors(shapes, dtype, device),
        "activation_gradients": tensors(shapes, dtype, device),
        "channel_dim": [1, 1, 1, -1, 1],
        "batch_dim": [0] * 5,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_network_step_is_importance_and_then_update(dtype: torch.dtype, device: str) -> None:
    inputs, whole = activations(dtype, device), network(dtype, momentum=0.9, weight_decay=0.01, device=device)
    del whole["measured"]
    parts = copied(whole)
    call(ops.network_step_, {**inputs, **whole})
    measured = [ops.importance(*one).float() for one in zip(*inputs.values(), strict=True)]
    call(ops.update_, {**parts, "measured": measured})
    assert_equal(whole, parts, ["parameters", "momentum_buffers", "importances"])


@around_4096
@pytest.mark.parametrize("active_only", [False, True])
def test_network_step_of_very_many_neurons_is_importance_and_then_update(
    neurons: int, active_only: bool, device: str
) -> None:
    whole = wide_network(neurons, active_only=active_only, device=device)
    del whole["measured"]
    shapes = [(2, len(one)) for one in whole["importances"]]
    activations, gradients = tensors(shapes, device=device), tensors(shapes, device=device)
    for gradient in gradients:
        gradient[:, ::3] = 0
    gradients[2][0, 1] = torch.nan
    inputs = {
        "activations": activations,
        "activation_gradients": gradients,
        "channel_dim": [1] * 3,
        "batch_dim": [0] * 3,
    }
    parts, nothing = copied(whole), copied(whole)
    overflow = {"found_inf": torch.tensor(1.0, device=device)}
    check_changes_nothing(ops.network_step_, {**inputs, **nothing, **overflow}, WRITTEN)
    call(ops.network_step_, {**inputs, **whole})
    measured = [ops.importance(n, g) for n, g in zip(activations, gradients, strict=True)]
    call(ops.update_, {**parts, "measured": measured})
    assert whole["nonfinite_steps"].tolist() == [0, 0, 1]
    assert_equal(whole, parts, WRITTEN)
    assert not torch.equal(whole["importances"][0], nothing["importances"][0])


def test_a_network_step_of_shards_is_importance_and_then_update(device: str) -> None:
    inputs, whole = activations(device=device), shard_of(network(momentum=0.9, device=device), 1, 12)
    del whole["measured"]
    parts = copied(whole)
    call(ops.network_step_, {**inputs, **whole})
    measured = [ops.importance(*one) for one in zip(*inputs.values(), strict=True)]
    call(ops.update_, {**parts, "measured": measured})
    assert_equal(whole, parts, WRITTEN)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0), (2, 3, 0, 4), (2, 0), (2, 0, 4, 4)], ids=str)
def test_a_network_step_with_an_empty_activation_leaves_its_layer_as_unmeasured(
    shape: tuple[int, ...], device: str
) -> None:
    inputs, whole = activations(device=device), network(device=device)
    del whole["measured"]
    for name in ("activations", "activation_gradients"):
        inputs[name].append(torch.empty(shape, device=device))
    inputs["channel_dim"].append(1)
    inputs["batch_dim"].append(0)
    whole["importances"].append(torch.rand(shape[1]).to(device))
    whole["nonfinite_steps"] = no_nonfinite_steps(6, device)
    for name in ("alpha", "beta", "delta", "sigma", "active_only"):
        whole[name].append(whole[name][0])
    parts = copied(whole)
    call(ops.network_step_, {**inputs, **whole})
    measured = [ops.importance(*one).float() for one in zip(*inputs.values(), strict=True)]
    call(ops.update_, {**parts, "measured": measured})
    assert_equal(whole, parts, ["parameters", "importances"])
    assert whole["nonfinite_steps"].tolist() == [0] * 6


@given(st.data())
def test_steps_of_layers_of_any_shape_and_strides(data: st.DataObject) -> None:
    draw = data.draw
    activation, gradient, channel_dim, batch_dim = draw(strided_pairs())
    neurons, inputs = activation.shape[channel_dim], draw(st.integers(1, 40))
    momentum = draw(st.sampled_from([0.0, 0.9]))
    before = [torch.randn(neurons, inputs), torch.randn(neurons)]
    gradients, buffers = [w * 2 for w in before], [w * 3 for w in before]
    average = torch.rand(neurons)

    def run(operation: Any, **inputs: Any) -> Arguments:
        own = {"parameters": before, "momentum_buffers": buffers, "importances": [average]}
        arguments = {**one_layer(average, before, gradients), **sgd(2, momentum=momentum), "delta": [1 - 2e-4]}
        arguments |= {**copied(own), **inputs}
        if "measured" not in inputs:
            del arguments["measured"]
        call(operation, arguments)
        return arguments

    want = run(ops.update_, measured=[ops.importance(activation, gradient, channel_dim, batch_dim).float()])
    dims = {"channel_dim": [channel_dim], "batch_dim": [batch_dim]}
    got = run(ops.network_step_, activations=[activation], activation_gradients=[gradient], **dims)
    names = ["parameters", "momentum_buffers", "importances"]
    assert_equal(got, want, names)
    options = LayerStepOptions(channel_dim, batch_dim, momentum=momentum)
    layer = Layer(activation, gradient, average, no_nonfinite_steps(1), [0, 0], [1, 1])
    ops.layer_step_(layer, Network(before, gradients, buffers), options)
    alone = {"parameters": before, "momentum_buffers": buffers, "importances": [average]}
    assert_equal(alone, want, names)


def test_layer_step_is_a_network_step_of_one_layer(device: str) -> None:
    n, g, weight, bias = tensors([(4, 64, 5, 5), (4, 64, 5, 5), (64, 27), (64,)], device=device)
    steps, average = no_nonfinite_steps(1, device), torch.rand(64).to(device)
    gradients, before = tensors([(64, 27), (64,)], device=device), weight.clone()
    want = [tensor.double() for tensor in (weight, bias, average)]
    options = LayerStepOptions(lr=0.2, weight_decay=0.1, delta=0.9, sigma="erf", alpha=0.2, beta=0.6)
    ops.layer_step_(Layer(n, g, average, steps, [0, 0], [1, 1]), Network([weight, bias], gradients), options)
    layer = Layer(n.double(), g.double(), want[2], steps, [0, 0], [1, 1])
    reference.layer_step_(layer, Network(want[:2], [gradient.double() for gradient in gradients]), options)
    for got, one in zip((weight, bias, average), want, strict=True):
        torch.testing.assert_close(got.double(), one, rtol=1e-4, atol=1e-5)
    assert not torch.equal(before, weight)


def test_step_operations_pass_opcheck() -> None:
    arguments = flat("network_step_", {**network(momentum=0.9), **activations()})
    opcheck(torch.ops.npc_ext.network_step_.default, arguments)
    weight = torch.randn(10, 7)
    layer = (torch.randn(4, 10), torch.randn(4, 10), torch.rand(10), no_nonfinite_steps(1), [0], [1])
    opcheck(torch.ops.npc_ext.layer_step_.default, (*layer, [weight], [weight * 2], []))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gradients", lambda a: a["gradients"][:-1], "gradients has 10 entries, expected 11"),
        ("gradients", lambda a: [a["gradients"][1], *a["gradients"][1:]], r"gradients\[0\] is torch.float32 of shape \(10,\)"),
        ("gradients", lambda a: [a["gradients"][0].half(), *a["gradients"][1:]], r"gradients\[0\] is torch.float16"),
        ("gradients", lambda a: [a["gradients"][0].to_sparse(), *a["gradients"][1:]], r"gradients\[0\] is sparse"),
        ("importances", lambda a: [torch.rand(9), *a["importances"][1:]], r"parameters\[0\] has 10 rows, but importance has 9 values"),
        ("importances", lambda a: [a["importances"][0].double(), *a["importances"][1:]], r"importances\[0\] is torch.float64"),
        ("measured", lambda a: [torch.rand(4), *a["measured"][1:]], r"measured\[0\] is torch.float32 of shape \(4,\)"),
        ("sigma", lambda a: ["relu"] * 5, "sigma is 'relu'; expected one of 'sigmoid', 'tanh', 'erf'"),
        ("layer", lambda a: [5, *a["layer"][1:]], r"layer\[0\] is 5, but there are 5 layers"),
        ("nonfinite_steps", lambda a: torch.zeros(2), r"nonfinite_steps is torch.float32 of shape \(2,\); expected int64 of shape \(5,\)"),
        ("neuron_dim", lambda a: [3, *a["neuron_dim"][1:]], r"neuron_dim\[0\] is 3, but parameters\[0\] has 2 dimensions"),
        ("parameters", lambda a: [a["parameters"][0].cfloat(), *a["parameters"][1:]], r"parameters\[0\] is torch.complex64"),
        ("momentum_buffers", lambda a: a["momentum_buffers"][:3], "momentum_buffers has 3 entries, expected 11"),
        ("parameters", lambda a: [torch.randn(10, 14)[:, ::2], *a["parameters"][1:]], "which leave gaps or overlap"),
    ],
)  # fmt: skip
def test_update_refuses_what_does_not_fit_and_changes_nothing(name: str, value: Any, message: str) -> None:
    arguments = network(momentum=0.9)
    arguments[name] = value(arguments)
    check_is_refused(ops.update_, arguments, message, WRITTEN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": None}, "is missing the arguments network, measured, placement, options, constants"),
        ({"lr": [0.1]}, "got an unexpected argument 'lr'"),
        (
            {name: [] for name in ("network", "layers", "measured", "placement", "options", "constants")},
            r"update_\(\): network is list; expected npc_ext.columns.Network",
        ),
    ],
)
def test_update_refuses_arguments_that_it_does_not_have(arguments: Arguments, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ops.update_(**arguments)


@pytest.mark.parametrize(
    "name", ["update_", "adam_update_", "anchored_update_", "connection_update_", "network_step_", "layer_step_"]
)
def test_operations_have_the_signature_of_their_reference(name: str) -> None:
    assert inspect.signature(getattr(ops, name)) == inspect.signature(getattr(reference, name))


def test_the_kernels_name_their_columns() -> None:
    columns = cuda_on_cpu.module().COLUMNS
    assert " ".join(columns) == (
        "dtype size outer middle run layer first_neuron lr momentum nesterov weight_decay maximize first_decay "
        "second_decay epsilon strength implicit neurons alpha beta delta sigma active_only"
    )
    operations = [getattr(torch.ops.npc_ext, name).default for name in ("update_", "adam_update_", "anchored_update_")]
    arguments = {argument.name for operation in operations for argument in operation._schema.arguments}
    of_tensors = {"dtype", "size", "outer", "middle", "run", "neurons"}
    assert set(columns) - of_tensors <= arguments
