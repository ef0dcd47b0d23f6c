"""What all updates of parameters have in common: agreement with the float64 reference, layouts, sizes and errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from npc_ext import ops, reference
from npc_ext.kernels.checks import SIGMAS

from .. import cuda_on_cpu
from ..tolerances import DTYPES, U, assert_stepped
from .arguments import (
    DIVISIBLE,
    LIKE_PARAMETERS,
    MANY_NEURONS,
    PARAMETERS,
    WRITTEN,
    Arguments,
    Placed,
    adam,
    at_offset,
    call,
    copied,
    flat,
    names_of,
    network,
    no_layers,
    several_layers,
    shard_of,
    wide_layers,
)
from .checks import (
    assert_equal,
    assert_rests,
    check,
    check_changes_nothing,
    check_is_refused,
    with_threads,
)

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "update_": [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 0.1, "active_only": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"weight_decay": 0.01, "maximize": True},
        {"sigma": "erf", "active_only": True},
        {"sigma": "tanh", "grad_scale": 8.0},
        {"momentum": 0.5, "maximize": True, "grad_scale": 3.0, "channels_last": True},
    ],
    "adam_update_": [
        {"weight_decay": 0.01},
        {"steps": 0},
        {"weight_decay": 0.01, "maximize": True, "grad_scale": 8.0, "sigma": "erf"},
        {"weight_decay": 0.01, "steps": 100_000, "channels_last": True, "active_only": True},
    ],
    "anchored_update_": [
        {},
        {"paths": False},
        {"implicit": False},
        {"implicit": False, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "paths": False},
        {"anchors": False},
        {"anchors": False, "paths": False, "momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 0.01, "channels_last": True},
        {"momentum": 0.9, "nesterov": True, "paths": False, "grad_scale": 8.0},
        {"maximize": True, "grad_scale": 3.0},
    ],
    "connection_update_": [
        {},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"momentum": 0.5, "maximize": True, "grad_scale": 3.0, "channels_last": True},
        {"sigma": "erf", "active_only": True},
        {"momentum": 0.9, "weight_decay": 0.1, "active_only": True},
        {"momentum": 0.9, "parameters": [Placed((), 0), Placed((5, 0), 1), Placed((3, 700), 1)]},
    ],
}
every_update = pytest.mark.parametrize("operation", OPTIONS)
of_importance = pytest.mark.parametrize("operation", ["update_", "adam_update_", "connection_update_"])
of_neurons = pytest.mark.parametrize("operation", ["update_", "adam_update_"])


@pytest.mark.parametrize(
    ("operation", "options"), [(name, each) for name in OPTIONS for each in OPTIONS[name]], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_updates_agree_with_the_reference(
    operation: str, options: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    check(operation, network(operation, dtype, **options, device=device))


@every_update
@given(st.data())
def test_updates_of_any_network(operation: str, data: st.DataObject) -> None:
    draw, known = data.draw, names_of(operation)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    options: dict[str, Any] = {
        "dtype": draw(st.sampled_from(DTYPES)),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "maximize": draw(st.booleans()),
        "grad_scale": draw(st.sampled_from([None, 2.0**16, 0.3])),
        "channels_last": draw(st.booleans()),
    }
    if "momentum" in known:
        options["momentum"] = draw(st.sampled_from([0.0, 0.9]))
        options["nesterov"] = options["momentum"] > 0 and draw(st.booleans())
    if "sigma" in known:
        options |= {"sigma": draw(st.sampled_from(SIGMAS)), "active_only": draw(st.booleans())}
    if operation == "adam_update_":
        options["steps"] = draw(st.integers(0, 10**6))
    if operation == "anchored_update_":
        options |= {name: draw(st.booleans()) for name in ("anchors", "paths", "implicit")}
        shapes = draw(st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=2, max_size=5))
        options["parameters"] = [Placed(shape) for shape in shapes]
    check(operation, network(operation, **options))


@pytest.mark.slow
@every_update
@pytest.mark.parametrize(("layers", "each"), [(130, 2), (69, 3), (1, 215), (90, 1), (7, 3), (11, 2), (3, 0), (1, 1)])
def test_networks_of_any_number_of_layers_and_parameters(layers: int, each: int, operation: str, device: str) -> None:
    options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1, "active_only": layers == 1, "device": device}
    check(operation, network(operation, **several_layers(layers, each), **options))


@every_update
@pytest.mark.parametrize("offset", [1, 4])
def test_updates_of_tensors_that_begin_anywhere(operation: str, offset: int, device: str) -> None:
    given = network(operation, parameters=[Placed((10, 24), 0), Placed((9,))], momentum=0.9, device=device)
    read = [name for name in (*LIKE_PARAMETERS, "importances") if name in given]
    for names in [read, *([name] for name in read)]:
        arguments = copied(given)
        for name in names:
            arguments[name][0] = at_offset(arguments[name][0], offset)
        check(operation, arguments)


@of_neurons
@pytest.mark.parametrize("neurons", MANY_NEURONS)
@pytest.mark.parametrize("active_only", [False, True])
def test_updates_of_layers_of_very_many_neurons(operation: str, neurons: int, active_only: bool, device: str) -> None:
    arguments = network(operation, **wide_layers(neurons), momentum=0.9, active_only=active_only, device=device)
    before = copied(arguments)
    check(operation, arguments)
    assert not any(map(torch.equal, arguments["importances"], before["importances"]))
    assert not arguments["nonfinite_steps"].any()


def moved_from_zero(operation: str, importance: Tensor, lr: float, sigma: str) -> Tensor:
    """Weights (N, 2) after a step along gradients of one. They begin at zero, so |w dL/dw| leaves importance as it is."""
    options: dict[str, Any] = {"steps": 0, "sigma": sigma, "device": str(importance.device)}
    arguments = network(operation, layers=[len(importance)], parameters=[Placed((len(importance), 2), 0)], **options)
    for name in ("parameters", "first_moments", "second_moments"):
        for tensor in arguments.get(name, ()):
            tensor.zero_()
    arguments["gradients"][0].fill_(1)
    if operation == "connection_update_":
        importance = importance.unsqueeze(1).repeat(1, 2)
    else:
        arguments["measured"] = [None]
    call(getattr(ops, operation), arguments | {"importances": [importance], "lr": [lr]})
    weight: Tensor = arguments["parameters"][0]
    return weight


@pytest.mark.parametrize("operation", ["update_", "connection_update_"])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_weights_move_at_the_rates_that_the_paper_states_for_its_constants(
    operation: str, sigma: str, device: str
) -> None:
    some = torch.tensor([0.0, 1e-30, 0.05, 0.1, 0.25, 0.4, 0.499, 0.5, 0.7, 1e30])
    importance = torch.cat([some, torch.rand(600)]).to(device)
    weight = moved_from_zero(operation, importance, 0.1, sigma)
    ratio = 0.5 / importance.double().unsqueeze(1).expand(-1, 2)
    surplus = (ratio.log() if sigma == "erf" else ratio - 1).clamp(min=0)
    eta = (0.05 * surplus.sqrt()).clamp(max=0.1)  # eq. 7 as in the paper, with alpha = 0.05 and eta_max = 0.1
    assert_stepped(weight, -eta, torch.ones_like(eta), 0.05)
    assert bool((weight[importance >= 0.5] == 0).all())


@of_importance
@pytest.mark.parametrize("sigma", ["sigmoid", "erf"])
def test_every_rate_scales_with_lr_and_a_warm_up_may_begin_at_zero(operation: str, sigma: str, device: str) -> None:
    importance = torch.cat([torch.zeros(3), torch.rand(600)]).to(device)
    full = moved_from_zero(operation, importance, 0.125, sigma)
    for share in (0.5, 2**-7, 0.0):  # without rounding
        assert torch.equal(moved_from_zero(operation, importance, 0.125 * share, sigma), share * full)
    assert 0 < int((full == 0).all(1).sum()) < 600


@of_importance
@pytest.mark.parametrize("lr", [0.0, 0.25])  # frozen means that eq. 7 is zero, not that lr is
@pytest.mark.parametrize("stochastic_rounding", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_elements_stay_bit_identical_but_lose_their_momentum_once(
    dtype: torch.dtype, stochastic_rounding: bool, lr: float, operation: str, device: str
) -> None:
    if stochastic_rounding and (dtype != torch.bfloat16 or "seeds" not in names_of(operation)):
        pytest.skip("only bfloat16 is rounded stochastically, and not by all updates")
    options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1, "stochastic_rounding": stochastic_rounding}
    arguments = network(operation, dtype, **options, device=device)
    arguments["lr"] = [lr] * len(PARAMETERS)
    before = copied(arguments)
    call(getattr(ops, operation), arguments)
    rests = assert_rests(arguments, before)
    assert sum(int(rest.cleared.sum()) for rest in rests.values()) > 100
    first_moment = "momentum_buffers" if "momentum_buffers" in arguments else "first_moments"
    for index, rest in rests.items():
        if rest.all.all():
            continue
        for name in ("parameters", first_moment):
            moved = (arguments[name][index] != before[name][index])[~rest.all].double().mean()
            assert moved > 0.5 if lr or name == first_moment else moved == 0
    # Once: the next step leaves their momentum as it is.
    if "measured" in arguments:
        arguments["measured"] = [None] * len(arguments["importances"])
    for gradient in arguments["gradients"]:
        gradient.zero_()  # so that importance stays
    for index, rest in rests.items():
        arguments[first_moment][index][rest.cleared] = 7
    call(getattr(ops, operation), arguments)
    for index, rest in rests.items():
        assert bool((arguments[first_moment][index][rest.cleared] == 7).all())


@of_neurons
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_give_the_same_bits_as_the_whole(operation: str, dtype: torch.dtype, device: str) -> None:
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    whole = network(operation, dtype, parameters=DIVISIBLE, **options, device=device)
    in_parts = copied(whole)
    call(getattr(ops, operation), whole)
    for rank in range(12):
        shard = shard_of(in_parts, rank, 12)
        call(getattr(ops, operation), shard)
        assert_equal(shard, whole, ["importances", "steps"])
    assert_equal(in_parts, whole, ["parameters", "momentum_buffers", "first_moments", "second_moments"])


@of_neurons
@pytest.mark.parametrize("rank", [0, 2, 11])
def test_shards_agree_with_the_reference(operation: str, rank: int, device: str) -> None:
    options: dict[str, Any] = {"weight_decay": 0.01, "sigma": "erf", "device": device}
    check(operation, shard_of(network(operation, parameters=DIVISIBLE, **options), rank, 12))


@of_neurons
def test_shards_outside_of_their_layer_are_refused(operation: str, device: str) -> None:
    arguments = shard_of(network(operation, parameters=DIVISIBLE, device=device), 1, 12)
    arguments["first_neuron"][2] = 60
    check_is_refused(operation, arguments, "6 rows from neuron 60 on, but importance has 64 values")


def test_connections_whose_importance_is_not_finite_are_left_out_and_counted(device: str) -> None:
    arguments = network("connection_update_", device=device)
    arguments["gradients"][0][0, 0] = torch.inf
    for index in (2, 3):  # all of a layer
        arguments["gradients"][index].zero_()
    before = copied(arguments)
    call(ops.connection_update_, arguments)
    assert arguments["nonfinite_steps"].tolist() == [1, 0, 0, 0, 0]
    for index in (0, 1, 2, 3):  # of the layer that overflowed, and of the one without any importance
        assert torch.equal(arguments["importances"][index], before["importances"][index])
    assert not torch.equal(arguments["importances"][7], before["importances"][7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adam_without_neurons_is_adamw(dtype: torch.dtype, device: str) -> None:
    value = torch.randn(40, 9).to(device, dtype)
    peer = torch.nn.Parameter(value.clone())
    optimizer = torch.optim.AdamW([peer], lr=0.01, weight_decay=0.1)
    arguments = {"parameters": [value], **no_layers(1, device), **adam(1, weight_decay=0.1)}
    arguments |= {name: [torch.zeros_like(value)] for name in ("first_moments", "second_moments")}
    arguments["steps"] = [torch.zeros((), device=device)]
    for _ in range(20):
        peer.grad = torch.randn_like(peer.cpu()).to(device)
        optimizer.step()
        call(ops.adam_update_, {**arguments, "gradients": [peer.grad]})
    torch.testing.assert_close(value, peer.detach(), rtol=40 * U[dtype], atol=0.01 * 20 * 24 * U[dtype])


@every_update
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_updates_do_not_depend_on_the_number_of_threads(operation: str, threads: int) -> None:
    parameters = [Placed((301, 1003), 0), Placed((301,), 0), Placed((70_001,))]
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    one = network(operation, layers=[301], parameters=parameters, **options)
    several = copied(one)
    with_threads(1, lambda: call(getattr(ops, operation), one))
    with_threads(threads, lambda: call(getattr(ops, operation), several))
    assert_equal(several, one)


@every_update
def test_an_overflow_changes_nothing(operation: str, device: str) -> None:
    arguments = network(operation, momentum=0.9, device=device)
    arguments["found_inf"] = torch.ones(1, device=device)
    check_changes_nothing(operation, arguments)


@every_update
def test_every_written_tensor_gets_a_new_version(operation: str) -> None:
    arguments = network(operation, momentum=0.9)
    columns = [arguments[name] for name in WRITTEN if name in arguments]
    written = [tensor for column in columns for tensor in (column if isinstance(column, list) else [column])]
    tensors = [tensor for tensor in written if tensor is not None and tensor.numel()]
    versions = [tensor._version for tensor in tensors]
    call(getattr(ops, operation), arguments)
    assert all(tensor._version > old for tensor, old in zip(tensors, versions, strict=True))


@every_update
def test_updates_pass_opcheck(operation: str) -> None:
    arguments = network(operation, momentum=0.9)
    opcheck(getattr(torch.ops.npc_ext, operation).default, flat(operation, arguments))
    if operation == "update_":
        arguments["first_neuron"] = [0] * len(PARAMETERS)
        opcheck(torch.ops.npc_ext.update_.default, flat(operation, arguments))


def first(change: Callable[[Any], Any]) -> Callable[[list[Any]], list[Any]]:
    """Changes the first entry of a column."""
    return lambda column: [change(column[0]), *column[1:]]


@pytest.mark.parametrize(
    ("operation", "name", "change", "message"),
    [
        ("update_", "gradients", lambda column: column[:-1], "gradients has 12 entries, expected 13"),
        ("update_", "gradients", first(lambda gradient: gradient[:, 0]), r"gradients\[0\] is torch.float32 of shape \(10,\)"),
        ("update_", "gradients", first(Tensor.half), r"gradients\[0\] is torch.float16"),
        ("update_", "gradients", first(Tensor.to_sparse), r"gradients\[0\] is sparse"),
        ("update_", "importances", first(lambda _: torch.rand(9)), r"parameters\[0\] has 10 rows, but importance has 9 values"),
        ("update_", "importances", first(Tensor.double), r"importances\[0\] is torch.float64"),
        ("update_", "measured", first(lambda _: torch.rand(4)), r"measured\[0\] is torch.float32 of shape \(4,\)"),
        ("update_", "sigma", lambda _: ["relu"] * 5, "sigma is 'relu'; expected one of 'sigmoid', 'tanh', 'erf'"),
        ("update_", "layer", first(lambda _: 5), r"layer\[0\] is 5, but there are 5 layers"),
        ("update_", "nonfinite_steps", lambda _: torch.zeros(2), r"nonfinite_steps is torch.float32 of shape \(2,\); expected int64 of shape \(5,\)"),
        ("update_", "neuron_dim", first(lambda _: 3), r"neuron_dim\[0\] is 3, but parameters\[0\] has 2 dimensions"),
        ("update_", "parameters", first(Tensor.cfloat), r"parameters\[0\] is torch.complex64"),
        ("update_", "momentum_buffers", lambda column: column[:3], "momentum_buffers has 3 entries, expected 13"),
        ("update_", "parameters", first(lambda _: torch.randn(10, 14)[:, ::2]), "which leave gaps or overlap"),
        ("adam_update_", "first_moments", lambda column: column[:-1], "first_moments has 12 entries, expected 13"),
        ("adam_update_", "second_moments", first(Tensor.half), r"second_moments\[0\] is torch.float16"),
        ("adam_update_", "first_moments", first(lambda _: None), r"first_moments\[0\] is None; expected torch.float32"),
        ("adam_update_", "steps", first(lambda _: None), r"steps\[0\] is None"),
        ("adam_update_", "steps", first(Tensor.long), r"steps\[0\] is torch.int64"),
        ("adam_update_", "seeds", lambda _: [0] * 13, r"seeds\[0\] is 0, but parameters\[0\] is torch.float32"),
        ("adam_update_", "beta", lambda column: column[:2], "beta has 2 entries, expected 5"),
        ("adam_update_", "epsilon", lambda _: [1e-8], "epsilon has 1 entries, expected 13"),
        ("anchored_update_", "stiffness", lambda column: column[:-1], "stiffness has 12 entries, expected 13"),
        ("anchored_update_", "stiffness", first(Tensor.half), r"stiffness\[0\] is torch.float16"),
        ("anchored_update_", "anchors", first(lambda _: None), r"stiffness\[0\] and anchors\[0\] go together"),
        ("anchored_update_", "paths", first(lambda _: torch.randn(7, 10).t()), r"paths\[0\] has strides \(1, 10\)"),
        ("anchored_update_", "gradients", first(Tensor.half), r"gradients\[0\] is torch.float16"),
        ("anchored_update_", "implicit", lambda column: column[:-1], "implicit has 12 entries, expected 13"),
        ("anchored_update_", "momentum", lambda column: [*column[:-1], 1.0], r"momentum\[12\] is 1.0; implicit anchors need a momentum below"),
        ("connection_update_", "importances", first(Tensor.double), r"importances\[0\] is torch.float64"),
        ("connection_update_", "importances", first(lambda _: torch.empty(0)), r"importances\[0\] is torch.float32 of shape \(0,\)"),
        ("connection_update_", "layer", first(lambda _: 9), r"layer\[0\] is 9, but there are 5 layers"),
        ("connection_update_", "beta", lambda column: column[:2], "beta has 2 entries, expected 5"),
        ("connection_update_", "nonfinite_steps", lambda _: torch.zeros(5), "nonfinite_steps is torch.float32"),
        ("connection_update_", "sigma", lambda _: ["relu"] * 5, "sigma is 'relu'"),
    ],
)  # fmt: skip
def test_updates_refuse_what_does_not_fit_and_change_nothing(
    operation: str, name: str, change: Callable[[Any], Any], message: str
) -> None:
    arguments = network(operation, momentum=0.9)
    arguments[name] = change(arguments[name])
    check_is_refused(operation, arguments, message)


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
def test_an_update_refuses_arguments_that_it_does_not_have(arguments: Arguments, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ops.update_(**arguments)


@pytest.mark.parametrize("operation", [*OPTIONS, "network_step_", "layer_step_"])
def test_operations_have_the_signature_of_their_reference(operation: str) -> None:
    assert inspect.signature(getattr(ops, operation)) == inspect.signature(getattr(reference, operation))


def test_the_kernels_name_their_columns() -> None:
    columns = cuda_on_cpu.module().COLUMNS
    assert " ".join(columns) == (
        "dtype size outer middle run layer first_neuron lr momentum nesterov weight_decay maximize first_decay "
        "second_decay epsilon strength implicit neurons alpha beta delta sigma active_only"
    )
    arguments = {name for operation in ("update_", "adam_update_", "anchored_update_") for name in names_of(operation)}
    of_tensors = {"dtype", "size", "outer", "middle", "run", "neurons"}
    assert set(columns) - of_tensors <= arguments
