"""SGD's update of neurons that are frozen, inactive or not measured, and the step of a whole network."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from npc_ext import ops, reference
from npc_ext.columns import Layer, LayerStepOptions, Network, PlasticityOptions
from npc_ext.kernels import native

from .. import cuda_on_cpu
from ..tolerances import DTYPES
from .arguments import (
    DIVISIBLE,
    LAYERS,
    MANY_NEURONS,
    PARAMETERS,
    Arguments,
    Placed,
    activations,
    call,
    copied,
    flat,
    network,
    no_nonfinite_steps,
    one_layer,
    several_layers,
    sgd,
    shard_of,
    tensors,
    wide_layers,
)
from .checks import assert_equal, assert_rests, check, check_changes_nothing, check_network_step
from .test_importance import strided_pairs

many_neurons = pytest.mark.parametrize("neurons", MANY_NEURONS)
few_or_many_neurons = pytest.mark.parametrize(
    "shapes", [{}, *map(wide_layers, MANY_NEURONS)], ids=["few", *map(str, MANY_NEURONS)]
)
MIXED = [torch.float32, torch.bfloat16, torch.float16]


def mixed_network(device: str) -> Arguments:
    """A network whose parameters have three dtypes, also those of one layer."""
    arguments = network("update_", parameters=PARAMETERS[:11], momentum=0.9, weight_decay=0.1, device=device)
    for name in ("parameters", "gradients", "momentum_buffers"):
        arguments[name] = [tensor.to(MIXED[index % 3]) for index, tensor in enumerate(arguments[name])]
    return arguments


def test_update_of_parameters_of_several_dtypes(device: str) -> None:
    check("update_", mixed_network(device))


@pytest.mark.parametrize("device", ["cuda_on_cpu"], indirect=True)
def test_an_update_is_one_launch_and_one_more_for_each_further_dtype(device: str) -> None:
    one_dtype, mixed = network("update_", momentum=0.9, device=device), mixed_network(device)
    assert cuda_on_cpu.counted("launches", lambda: call(ops.update_, one_dtype)) == 1
    assert cuda_on_cpu.counted("launches", lambda: call(ops.update_, mixed)) == 4, (
        "three dtypes, and layers that have two of them"
    )
    mixed["layer"] = [-1] * len(mixed["layer"])
    assert cuda_on_cpu.counted("launches", lambda: call(ops.update_, mixed)) == 3


@pytest.mark.parametrize(("layers", "each", "launches"), [(7, 3, 1), (69, 3, 1), (70, 3, 2), (71, 1, 2), (70, 0, 1)])
@pytest.mark.parametrize("device", ["cuda_on_cpu"], indirect=True)
def test_a_launch_holds_210_parameters_and_70_layers(layers: int, each: int, launches: int, device: str) -> None:
    arguments = network("update_", **several_layers(layers, each), device=device)
    assert cuda_on_cpu.counted("launches", lambda: call(ops.update_, arguments)) == launches


def check_one_parameter(groups: int, rows: int, run: int, dim: int, dtype: torch.dtype, device: str) -> None:
    shape = [2 * groups if groups > 1 else 3, 4, run]
    dim = 1 if groups > 1 else dim
    shape[dim] = rows
    placed = [Placed(tuple(shape), 0, dim, groups)]
    check("update_", network("update_", dtype, layers=[rows * groups], parameters=placed, device=device))


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


@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2), st.sampled_from(DTYPES))
def test_update_of_one_parameter_of_any_shape(groups: int, rows: int, run: int, dim: int, dtype: torch.dtype) -> None:
    check_one_parameter(groups, rows, run, dim, dtype, "cpu")


@pytest.mark.parametrize("count", range(30))
def test_update_of_one_parameter_of_a_random_shape(count: int, device: str) -> None:
    draw = random.Random(count)
    dtype = draw.choice([torch.float32, torch.float16, torch.bfloat16])
    sizes = draw.randint(1, 3), draw.randint(1, 70), draw.choice([1, 3, 8, 70, 700]), draw.randint(0, 2)
    check_one_parameter(*sizes, dtype, device)


def test_any_number_of_layers_of_very_many_neurons(device: str) -> None:
    check("update_", network("update_", layers=[4097] * 34, parameters=[Placed((4097, 1), 33)], device=device))


@few_or_many_neurons
def test_few_or_many_neurons_with_non_finite_importance_keep_their_average_and_are_counted(
    shapes: Arguments, device: str
) -> None:
    arguments = network("update_", **shapes, device=device)
    arguments["measured"][0][-1], arguments["measured"][2][5] = torch.nan, torch.inf
    before = copied(arguments)
    call(ops.update_, arguments)
    layers = len(arguments["importances"])
    assert arguments["nonfinite_steps"].tolist() == [1, 0, 1, 0, 0][:layers]
    changed = [not torch.equal(a, b) for a, b in zip(arguments["importances"], before["importances"], strict=True)]
    assert changed == [False, True, False, True, True][:layers]
    assert all(bool(parameter.isfinite().all()) for parameter in arguments["parameters"])


@many_neurons
def test_many_neurons_do_not_change_on_overflow_nor_their_average_unmeasured(neurons: int, device: str) -> None:
    arguments = network("update_", **wide_layers(neurons), momentum=0.9, device=device)
    arguments["found_inf"] = torch.tensor(1.0, device=device)
    check_changes_nothing("update_", arguments)
    before = copied(arguments)
    arguments["found_inf"] = torch.tensor(0.0, device=device)
    arguments["measured"] = [None] * 3
    call(ops.update_, arguments)
    assert_equal(arguments, before, ["importances"])
    assert not torch.equal(arguments["parameters"][0], before["parameters"][0])


def test_gradients_of_frozen_rows_are_not_even_read(device: str) -> None:
    arguments = network("update_", momentum=0.9, nesterov=True, weight_decay=0.1, device=device)
    arguments["measured"] = [None] * len(LAYERS)
    for gradient in arguments["gradients"]:
        gradient.view(-1)[::3] = torch.nan
    before = copied(arguments)
    call(ops.update_, arguments)
    for index, rest in assert_rests(arguments, before).items():
        assert not torch.equal(arguments["parameters"][index], before["parameters"][index]) or bool(rest.all.all())


@pytest.mark.parametrize("count", [3, 400])
@pytest.mark.parametrize("at_once", [False, True])
def test_all_parameters_of_a_layer_see_it_freeze_in_any_number_of_launches(
    count: int, at_once: bool, device: str
) -> None:
    weights, gradients, buffers = ([torch.ones(3, 2, device=device) for _ in range(count)] for _ in range(3))
    average, measured = (torch.tensor(values, device=device) for values in ([0.4, 0.6, 0.0], [2.0, 2.0, 0.0]))
    arguments = one_layer(average, weights, gradients, measured)
    arguments |= {"momentum_buffers": buffers, "delta": [0.5], **sgd(count, momentum=0.9)}
    if at_once:
        del arguments["measured"]
        inputs = activations([(1, 3)], [1], device=device)
        inputs |= {"activations": [measured.unsqueeze(0)], "activation_gradients": [torch.ones(1, 3, device=device)]}
        call(ops.network_step_, {**inputs, **arguments})
    else:
        call(ops.update_, arguments)
    torch.testing.assert_close(average.cpu(), torch.tensor([0.95, 1.05, 0.0]))
    for weight, buffer in zip(weights, buffers, strict=True):
        assert weight[:2].eq(1).all(), "frozen now, and frozen before"
        torch.testing.assert_close(weight[2].cpu(), torch.tensor([0.81, 0.81]))
        torch.testing.assert_close(buffer.cpu(), torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.9, 1.9]]))


def test_a_neuron_without_a_gradient_takes_no_part_in_a_step_of_the_active(device: str) -> None:
    arguments = network("update_", momentum=0.9, weight_decay=0.1, active_only=True, device=device)
    arguments["measured"][0].copy_(torch.tensor([-0.0, 0.0, 1.0] + [2.0] * 7))
    arguments["measured"][3].fill_(-0.0)  # none of a layer does
    arguments["importances"][0][:2] = 0
    before = copied(arguments)
    call(ops.update_, arguments)
    for layer, inactive in ((0, [0]), (3, range(33))):
        kept = torch.zeros(LAYERS[layer], dtype=torch.bool, device=device)
        kept[list(inactive)] = True
        same = arguments["importances"][layer] == before["importances"][layer]
        assert torch.equal(same | (before["importances"][layer] == 0), kept | (before["importances"][layer] == 0))
    for name in ("parameters", "momentum_buffers"):
        for index in (0, 1):
            assert torch.equal(arguments[name][index][0], before[name][index][0])
            assert not torch.equal(arguments[name][index][1], before[name][index][1])
        for index in (6, 7):
            assert torch.equal(arguments[name][index], before[name][index])


def test_a_neuron_without_a_gradient_stays_also_where_importance_does_not_count(device: str) -> None:
    arguments = network("update_", momentum=0.9, weight_decay=0.1, active_only=True, device=device)
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


@pytest.mark.parametrize("active_only", [False, True])
def test_neurons_that_received_only_gradients_that_sum_to_zero_train(active_only: bool, device: str) -> None:
    arguments = network("update_", parameters=PARAMETERS[:8], active_only=active_only, device=device)
    for tensor in arguments["measured"]:
        tensor.zero_()
    before = copied(arguments)
    call(ops.update_, arguments)
    assert_equal(arguments, before, ["importances", "nonfinite_steps"])
    for got, was in zip(arguments["parameters"], before["parameters"], strict=True):
        assert not torch.equal(got, was)


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e30])
def test_importance_of_extreme_size_is_normalized_like_any_other(size: float, device: str) -> None:
    arguments = network("update_", device=device)
    pattern = (torch.arange(33, device=device) % 7).float()
    arguments["measured"][3] = pattern * size
    arguments["delta"][3] = 0.0
    call(ops.update_, arguments)
    measured = arguments["measured"][3].double()
    shares = measured / measured.sum() * 33
    torch.testing.assert_close(arguments["importances"][3].double(), shares, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_network_step_is_importance_and_then_update(dtype: torch.dtype, device: str) -> None:
    arguments = network("update_", dtype, momentum=0.9, weight_decay=0.01, device=device)
    check_network_step(activations(dtype=dtype, device=device), arguments)


@many_neurons
@pytest.mark.parametrize("active_only", [False, True])
def test_network_step_of_very_many_neurons_is_importance_and_then_update(
    neurons: int, active_only: bool, device: str
) -> None:
    options: dict[str, Any] = {"momentum": 0.9, "active_only": active_only, "device": device}
    arguments = network("update_", **wide_layers(neurons), **options)
    inputs = activations([(2, len(tensor)) for tensor in arguments["importances"]], [1, 1, 1], device=device)
    for gradient in inputs["activation_gradients"]:
        gradient[:, ::3] = 0
    inputs["activation_gradients"][2][0, 1] = torch.nan
    before = copied(arguments)
    check_network_step(inputs, arguments)
    assert arguments["nonfinite_steps"].tolist() == [0, 0, 1]
    assert not torch.equal(arguments["importances"][0], before["importances"][0])
    del before["measured"]
    overflow = {"found_inf": torch.tensor(1.0, device=device)}
    check_changes_nothing("network_step_", {**inputs, **before, **overflow})


def test_a_network_step_of_shards_is_importance_and_then_update(device: str) -> None:
    arguments = network("update_", parameters=DIVISIBLE, momentum=0.9, device=device)
    check_network_step(activations(device=device), shard_of(arguments, 1, 12))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0), (2, 3, 0, 4), (2, 0), (2, 0, 4, 4)], ids=str)
def test_a_network_step_with_an_empty_activation_leaves_its_layer_as_unmeasured(
    shape: tuple[int, ...], device: str
) -> None:
    arguments = network("update_", layers=[10, shape[1]], parameters=PARAMETERS[:2], device=device)
    before = copied(arguments)
    check_network_step(activations([(4, 10), shape], [1, 1], device=device), arguments)
    assert torch.equal(arguments["importances"][1], before["importances"][1])
    assert arguments["nonfinite_steps"].tolist() == [0, 0]


@given(st.data())
def test_steps_of_layers_of_any_shape_and_strides(data: st.DataObject) -> None:
    draw = data.draw
    activation, gradient, channel_dim, batch_dim = draw(strided_pairs())
    neurons, inputs = activation.shape[channel_dim], draw(st.integers(1, 40))
    momentum = draw(st.sampled_from([0.0, 0.9]))
    placed = [Placed((neurons, inputs), 0), Placed((neurons,), 0)]
    arguments = network("update_", layers=[neurons], parameters=placed, momentum=momentum) | {"lr": [0.1, 0.1]}
    alone = copied(arguments)
    measured = {"activations": [activation], "activation_gradients": [gradient]}
    check_network_step({**measured, "channel_dim": [channel_dim], "batch_dim": [batch_dim]}, arguments)
    options = LayerStepOptions(channel_dim, batch_dim, momentum=momentum, delta=arguments["delta"][0])
    layer = Layer(activation, gradient, alone["importances"][0], alone["nonfinite_steps"], [0, 0], [1, 1])
    ops.layer_step_(layer, Network(*(alone[name] for name in Network._fields)), options)
    assert_equal(alone, arguments)


def test_layer_step_is_a_network_step_of_one_layer(device: str) -> None:
    n, g, weight, bias = tensors([(4, 64, 5, 5), (4, 64, 5, 5), (64, 27), (64,)], device=device)
    steps, average = no_nonfinite_steps(1, device), torch.rand(64).to(device)
    gradients, before = tensors([(64, 27), (64,)], device=device), weight.clone()
    want = [tensor.double() for tensor in (weight, bias, average)]
    options = LayerStepOptions(lr=0.2, weight_decay=0.1, delta=0.9, sigma="erf", alpha=0.2, beta=0.6)
    ops.layer_step_(Layer(n, g, average, steps, [0, 0], [1, 1]), Network([weight, bias], gradients), options)
    layer = Layer(n.double(), g.double(), want[2], steps, [0, 0], [1, 1])
    reference.layer_step_(layer, Network(want[:2], [gradient.double() for gradient in gradients]), options)
    for got, expected in zip((weight, bias, average), want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(before, weight)


def test_step_operations_pass_opcheck() -> None:
    arguments = flat("network_step_", {**network("update_", momentum=0.9), **activations()})
    opcheck(torch.ops.npc_ext.network_step_.default, arguments)
    weight = torch.randn(10, 7)
    layer = (torch.randn(4, 10), torch.randn(4, 10), torch.rand(10), no_nonfinite_steps(1), [0], [1])
    opcheck(torch.ops.npc_ext.layer_step_.default, (*layer, [weight], [weight * 2], []))


def test_an_operation_that_is_called_without_checks_refuses_rows_beyond_their_layer(device: str) -> None:
    arguments = network("update_", device=device)
    arguments["importances"][0] = arguments["importances"][0][1:].clone()
    with pytest.raises(ValueError, match="a parameter has more rows than its layer"):
        torch.ops.npc_ext.update_.default(*flat("update_", arguments))


@pytest.mark.parametrize(("name", "message"), [("lr", "that all updates read"), ("run", "no layout")])
def test_the_module_refuses_a_network_without_its_columns(name: str, message: str) -> None:
    module = native.module()
    columns: dict[str, list[Any]] = {column: [] for column in module.COLUMNS if column in PlasticityOptions._fields}
    columns |= {column: [1] for column in module.COLUMNS if column not in (*columns, "neurons")} | {"neurons": []}
    columns |= {"dtype": [0], "layer": [-1]}
    module.Network([0], [], 0, columns)
    columns.pop(name) if name == "lr" else columns.update({name: [0]})
    with pytest.raises(ValueError, match=message):
        module.Network([0], [], 0, columns)
    adam = {column: numbers for column, numbers in columns.items() if column != "epsilon"} | {"lr": [1], "run": [1]}
    network = module.Network([0], [], 0, adam)
    with pytest.raises(ValueError, match="the network has no column epsilon"):
        module.cpu.adam_update(module.cpu.Threads(1), network, [0], [], 0, 0, [], [], [], [1], [], [0], [0])
