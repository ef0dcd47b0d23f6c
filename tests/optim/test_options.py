"""Options of optimizers, of their groups and of single layers."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from npc_ext import CPC, EWC, NPC, SSL, NPCAdamW, PlasticityWrapper

from ..methods import wrapped_sgd
from ..models import paper_cnn
from ..training import batches, refused, same, set_importance, train, weights


def test_options_of_single_layers_by_name_and_pattern() -> None:
    layers = {"conv*": {"delta": 0.5}, "conv1": {"measure_at": "norm1"}, "output": {"normalize": "active", "beta": 0.7}}
    optimizer = NPC(paper_cnn(), layers=layers)
    assert optimizer.constants("conv2")["delta"] == 0.5
    assert optimizer.constants("hidden")["delta"] == 1 - 2e-4
    assert (optimizer.constants("output")["normalize"], optimizer.constants("output")["beta"]) == ("active", 0.7)
    assert str(optimizer.neurons["conv1"].points[0]) == "output of norm1"


def test_options_of_a_layer_are_put_together_from_its_name_and_all_patterns_that_fit() -> None:
    layers = {"*": {"delta": 0.5, "beta": 2.0}, "h*": {"delta": 0.4, "alpha": 0.3}, "hidden": {"beta": 3.0}}
    optimizer = NPC(paper_cnn(), layers=layers)
    taken = {name: optimizer.constants("hidden")[name] for name in ("beta", "delta", "alpha")}
    assert taken == {"beta": 3.0, "delta": 0.5, "alpha": 0.3}
    assert optimizer.constants("output")["beta"] == 2.0


def test_a_half_life_is_the_steps_after_which_half_of_the_importance_is_left() -> None:
    models = [copy.deepcopy(model) for model in [paper_cnn()] * 3]
    delta = 0.5 ** (1 / 20)
    optimizers = [
        NPC(models[0], delta=delta),
        NPC(models[1], half_life=20),
        NPC(models[2], params=[{"params": [*models[2].parameters()], "half_life": 20}]),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, batches(3))
    for model in models[1:]:
        assert same(weights(models[0]), weights(model))
    for optimizer in optimizers:
        set_importance(optimizer, "hidden", 8.0)
    assert all(int(o.plasticity()["hidden"].frozen_for[0]) in (79, 80) for o in optimizers)  # 8 / 2 ** 4 = 0.5


def test_a_layer_or_a_group_with_a_half_life_has_no_delta_and_the_reverse() -> None:
    model = paper_cnn()
    optimizer = NPC(
        model,
        half_life=100,
        params=[{"params": model.conv1.parameters(), "delta": 0.9}, {"params": model.hidden.parameters()}],
        layers={"conv*": {"beta": 2.0}, "hidden": {"delta": 0.8}},
    )
    optimizer.add_param_group({"params": model.output.parameters(), "half_life": 7})
    decays = {
        name: (optimizer.constants(name)["delta"], optimizer.constants(name)["half_life"])
        for name in ("conv1", "hidden", "output")
    }
    assert decays == {"conv1": (0.9, None), "hidden": (0.8, None), "output": (None, 7)}
    again = NPC(model, params=[{"params": group["params"]} for group in optimizer.param_groups])
    again.load_state_dict(optimizer.state_dict())
    assert [(g["delta"], g["half_life"]) for g in again.param_groups] == [(0.9, None), (None, 100), (None, 7)]


def test_a_half_life_can_be_changed_and_a_delta_beside_it_is_refused() -> None:
    model = paper_cnn()
    optimizer = NPC(model, half_life=100)
    train(model, optimizer, batches(1))
    before = optimizer.plasticity()["hidden"].importance
    optimizer.param_groups[0]["half_life"] = 1e-9  # nothing is left after a step
    train(model, optimizer, batches(1, seed=1))
    assert optimizer.plasticity()["hidden"].importance.mean().item() == pytest.approx(1)
    assert before.mean() < 0.1
    optimizer.param_groups[0]["delta"] = 0.9
    with refused(model, optimizer, ValueError, "delta is 0.9 and half_life is 1e-09; expected one of them, and None"):
        train(model, optimizer, batches(1))


def test_active_normalization_leaves_inactive_outputs_out_of_the_mean() -> None:
    model, (x, y) = paper_cnn(), batches(1)[0]
    optimizer = NPC(model, delta=0.0, layers={"output": {"normalize": "active"}})
    F.cross_entropy(model(x)[:, :2], y % 2).backward()
    optimizer.step()
    importance = optimizer.plasticity()["output"].importance
    assert importance[2:].tolist() == [0] * 8
    assert importance.sum().item() == pytest.approx(2)


@pytest.mark.parametrize(("others", "moves"), [("train", True), ("freeze", False)])
def test_parameters_outside_neurons_train_at_plain_rate_or_not_at_all(others: Any, moves: bool) -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 3))
    optimizer, before = NPC(model, other_parameters=others), weights(model[0])
    train(model, optimizer, [(torch.randint(7, (5, 2)), torch.randint(3, (5,)))])
    assert same(model[0], before) != moves


@pytest.mark.parametrize("others", ["train", "freeze"])
@pytest.mark.parametrize("kind", [NPC, CPC])
def test_a_layer_that_is_not_protected_trains_also_where_others_are_frozen(kind: Any, others: str) -> None:
    model = paper_cnn()
    optimizer = kind(model, delta=0.0, other_parameters=others, layers={"output": {"protect": False}})
    before = weights(model.output)
    train(model, optimizer, batches(3))
    assert set(optimizer.plasticity()) == {"conv1", "conv2", "hidden"}
    assert not same(model.output, before)


def test_layers_that_are_not_trained_have_no_state_until_they_are() -> None:
    model, data = paper_cnn(), batches(6)
    for name in ("conv1", "norm1", "conv2", "norm2"):
        getattr(model, name).requires_grad_(False)
    optimizer = NPC(model, delta=0.5)
    train(model, optimizer, data[:3])
    optimizer.plasticity()
    assert not optimizer.state[model.conv1.weight] and optimizer.state[model.hidden.weight]
    resumed = paper_cnn()
    resumed.load_state_dict(model.state_dict())
    for mine, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        theirs.requires_grad_(mine.requires_grad)
    other = NPC(resumed, delta=0.5)
    other.load_state_dict(optimizer.state_dict())
    for net, its_optimizer in ((model, optimizer), (resumed, other)):
        net.requires_grad_(True)
        train(net, its_optimizer, data[3:])
        assert its_optimizer.plasticity()["conv1"].importance.any()
    assert same(model, resumed)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 2))),
        nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 3)),
    ],
    ids=["container", "attention"],
)
def test_a_pattern_for_options_of_measuring_may_match_other_modules_too(model: nn.Module) -> None:
    optimizer = NPC(model, layers={"*": {"batch_dim": 1}})
    assert {point.batch_dim for layer in optimizer.neurons for point in layer.points} == {1}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (NPC, {"lr": -0.1}, "lr is -0.1; expected a finite number of at least 0"),
        (NPC, {"lr": float("nan")}, "lr is nan"),
        (NPC, {"alpha": 0}, "alpha is 0; expected a finite number above 0"),
        (NPC, {"beta": -1}, "beta is -1; expected a finite number above 0"),
        (NPC, {"delta": 1.0}, r"delta is 1.0; expected a number in \[0, 1\)"),
        (NPC, {"delta": -0.1}, "delta is -0.1"),
        (NPC, {"half_life": 0}, "half_life is 0; expected a finite number above 0"),
        (NPC, {"half_life": 1e20}, "half_life is 1e[+]20; expected a number of steps below 1e15"),
        (NPC, {"half_life": 10, "delta": 0.5}, "delta is 0.5 and half_life is 10; expected one of them"),
        (NPC, {"layers": {"conv1": {"half_life": 10, "delta": 0.5}}}, r"layers\['conv1'\]: delta is 0.5 and half_life"),
        (NPC, {"momentum": -0.9}, "momentum is -0.9"),
        (NPC, {"weight_decay": -1}, "weight_decay is -1"),
        (NPC, {"nesterov": True}, "nesterov is on, but momentum is 0.0"),
        (NPC, {"nesterov": "yes", "momentum": 0.9}, "nesterov is 'yes'; expected one of True, False"),
        (NPC, {"maximize": "no"}, "maximize is 'no'; expected one of True, False"),
        (NPC, {"sigma": "relu"}, "sigma is 'relu'; expected one of 'sigmoid', 'tanh', 'erf'"),
        (NPC, {"normalize": "some"}, "normalize is 'some'; expected one of 'all', 'active'"),
        (NPC, {"other_parameters": "drop"}, "other_parameters is 'drop'; expected one of 'train', 'freeze'"),
        (NPC, {"backend": "cuda"}, "backend is 'cuda'; expected one of 'auto', 'native', 'reference'"),
        (
            NPC,
            {"layers": {"conv7": {}}},
            "layers names 'conv7', but no layer with neurons has that name; close to it: 'conv1', 'conv2'",
        ),
        (
            NPC,
            {"layers": {"conv1": {"lr": 1}}},
            r"layers\['conv1'\] has the option 'lr'; there are 'alpha', 'beta', .*; give it",
        ),
        (NPC, {"layers": {"conv1": {"delta": 2}}}, r"layers\['conv1'\]: delta is 2"),
        (NPC, {"layers": {"conv1": {"protect": "no"}}}, r"layers\['conv1'\]: protect is 'no'; expected one of True, F"),
        (NPC, {"layers": {"conv1": {"momentum": 0.9}}}, r"the option 'momentum'; there are .*; give it to a group of"),
        (NPC, {"layers": {"conv1": {"proctect": False}}}, r"the option 'proctect'; close to it: 'protect'"),
        (NPC, {"layers": {"conv1": {"measure_at": "pool9"}}}, "measure_at names 'pool9', which is not in the model"),
        (NPCAdamW, {"lr": -1.0}, "lr is -1.0"),
        (NPCAdamW, {"alpha": 0.0}, "alpha is 0.0"),
        (NPCAdamW, {"delta": 1.0}, "delta is 1.0"),
        (NPCAdamW, {"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); expected two numbers in \[0, 1\)"),
        (NPCAdamW, {"betas": ("a", "b")}, r"betas is \('a', 'b'\); expected two numbers in \[0, 1\)"),
        (NPCAdamW, {"betas": 0.9}, r"betas is 0.9; expected two numbers in \[0, 1\)"),
        (NPCAdamW, {"eps": -1.0}, "eps is -1.0; expected a finite number of at least 0"),
        (NPCAdamW, {"maximize": "no"}, "maximize is 'no'; expected one of True, False"),
        (wrapped_sgd, {"bucket_bytes": 0}, "bucket_bytes is 0"),
        (wrapped_sgd, {"beta": -1}, "beta is -1"),
    ],
)
def test_arguments_out_of_range_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(paper_cnn(), **options)


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        (NPC, {"fused": True}, "NPC has no option 'fused': a step always is a fused call, so leave it out"),
        (EWC, {"foreach": True}, "EWC has no option 'foreach': a step always is a fused call"),
        (NPCAdamW, {"capturable": True}, "NPCAdamW has no option 'capturable': CUDA graphs can capture a step without"),
        (NPC, {"dampening": 0.1}, "NPC has no option 'dampening': momentum is not dampened"),
        (NPC, {"betas": (0.9, 0.99)}, r"NPC has no option 'betas': NPCAdamW has it \(beta is another thing"),
        (EWC, {"betas": (0.9, 0.99)}, "EWC has no option 'betas': NPCAdamW has it$"),
        (NPC, {"learning_rate": 0.1}, "NPC has no option 'learning_rate': it is called 'lr'"),
        (CPC, {"measure_at": "norm1"}, "CPC has no option 'measure_at': there are 'model'"),
        (NPCAdamW, {"momentum": 0.9}, "NPCAdamW has no option 'momentum': the first number of betas takes its place"),
        (NPCAdamW, {"amsgrad": True}, "there is no AMSGrad, so leave it out"),
        (NPC, {"skip_gradient": "rows"}, "NPC has no option 'skip_gradient': close to it: 'skip_gradients'"),
        (
            CPC,
            {"protect": False},
            r"it is an option of single layers: layers=\{'<name or pattern>': \{'protect': ...\}\}",
        ),
        (SSL, {"strenght": 1.0}, "SSL has no option 'strenght': close to it: 'strength'"),
        (
            wrapped_sgd,
            {"momentum": 0.9},
            "PlasticityWrapper has no option 'momentum': it is an option of the optimizer",
        ),
        (
            NPC,
            {"layers": {"conv1": {"measure_at": nn.ReLU()}}},
            r"measure_at of 'conv1' is ReLU\(\); expected the name of a",
        ),
        (NPC, {"lr": True}, "lr is True; expected a finite number"),
        (SSL, {"layers": ["0"]}, "SSL has no option 'layers': there are 'model', .*'inhibited'"),
        (wrapped_sgd, {"skip_gradients": "none"}, "no option 'skip_gradients': there are 'optimizer', 'model'"),
        (NPC, {"beta": (0.9, 0.999)}, r"beta is \(0.9, 0.999\); expected a number, .*are called betas"),
        (NPCAdamW, {"beta": [0.9, 0.999]}, r"beta is \[0.9, 0.999\]; expected a number, .*are called betas"),
    ],
)
def test_unknown_options_raise_a_type_error_that_explains(kind: Any, option: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        kind(paper_cnn(), **option)


def test_the_signature_of_a_constructor_shows_its_options() -> None:
    for kind in (NPC, NPCAdamW, CPC, EWC, SSL):
        parameters = inspect.signature(kind).parameters
        assert [*parameters][:2] == ["model", "lr"] and "params" in parameters


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ({"betta": 1.0}, "the key 'betta', which is no option: close to it: 'beta'"),
        ({"weight_decy": 0.1}, "the key 'weight_decy', .*: close to it: 'weight_decay'"),
        ({"weight_decays": 0.1}, "the key 'weight_decays', .*: close to it: 'weight_decay'"),
        ({"fused": True}, "the key 'fused', which is no option: a step always is a fused call"),
        ({"measure_at": "norm1"}, "the key 'measure_at', .*: it is an option of single layers"),
    ],
)
def test_misspelled_options_of_groups_are_refused_at_once_and_when_set_later(key: dict[str, Any], message: str) -> None:
    model = paper_cnn()
    with pytest.raises(ValueError, match=message):
        NPC(model, params=[{"params": [*model.parameters()], **key}])
    optimizer = NPC(model, params=model.conv1.parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": model.output.parameters(), **key})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, batches(1))
    optimizer.param_groups[0].update(key)
    with refused(model, optimizer, ValueError, message):
        train(model, optimizer, batches(1))


def test_keys_of_schedulers_and_of_users_are_kept_in_groups() -> None:
    model = paper_cnn()
    keys = {
        "name": "all",
        "lr_scale": 0.5,
        "min_weight_decay": 0.1,
        "beta1": 0.9,
        "foreach": None,
        "dampening": 0,
        7: 1,
    }
    optimizer = NPC(model, params=[{"params": [*model.parameters()], **keys}])
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    train(model, optimizer, batches(2))
    assert optimizer.param_groups[0]["name"] == "all" and "max_momentum" in optimizer.param_groups[0]


def test_a_group_that_is_no_dictionary_is_refused() -> None:
    model = paper_cnn()
    optimizer = NPC(model, params=model.conv1.parameters())
    with pytest.raises(TypeError, match="the parameter group is of type generator; expected a dictionary, as in"):
        optimizer.add_param_group(model.output.parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize("build", [NPC, NPCAdamW, CPC, EWC, lambda model, *more: wrapped_sgd(model, 0.1, *more)])
def test_options_are_named_because_a_third_argument_is_momentum_in_sgd(build: Any) -> None:
    with pytest.raises(TypeError, match=r"by position, got 3 arguments; name the others, as in|takes from 1 to 2 pos"):
        build(paper_cnn(), 0.1, 0.9)


def test_the_message_about_positions_names_an_option_that_there_is() -> None:
    model = paper_cnn()
    with pytest.raises(TypeError, match=r"as in weight_decay=0\.01"):
        NPCAdamW(model, 1e-3, (0.9, 0.99))  # type: ignore[misc]
    with pytest.raises(TypeError, match=r"as in beta=0\.5"):
        PlasticityWrapper(torch.optim.SGD(model.parameters(), lr=0.1), model, 0.5)  # type: ignore[misc]


@pytest.mark.parametrize("betas", [0.9, None, torch.tensor([0.9, 0.99])])
def test_betas_of_another_type_are_refused_also_when_set_later(betas: Any) -> None:
    model = paper_cnn()
    optimizer = NPCAdamW(model)
    train(model, optimizer, batches(1))
    optimizer.param_groups[0]["betas"] = betas
    with refused(model, optimizer, ValueError, "betas is .*; expected two numbers"):
        train(model, optimizer, batches(1))


@pytest.mark.parametrize(
    ("kind", "key", "message"),
    [
        (NPC, {"skip_gradients": "none"}, "the key 'skip_gradients', .*: it is an option of the whole optimizer"),
        (NPCAdamW, {"other_parameters": "freeze"}, "the key 'other_parameters', .*: it is an option of the whole opt"),
        (NPC, {"strength": 1.0}, "the key 'strength', which is no option: it is an option of another method"),
        (NPC, {"wd": 0.1}, "the key 'wd', which is no option: it is called 'weight_decay'"),
        (EWC, {"half_life": 3}, "the key 'half_life', which is no option: it is a constant of NPC"),
    ],
)
def test_options_that_a_group_cannot_have_are_refused(kind: Any, key: dict[str, Any], message: str) -> None:
    model = paper_cnn()
    with pytest.raises(ValueError, match=message):
        kind(model, params=[{"params": [*model.parameters()], **key}])


@pytest.mark.parametrize("kind", [NPC, NPCAdamW, CPC])
def test_constants_of_all_groups_can_be_set_at_once(kind: Any) -> None:
    model = paper_cnn()
    groups = [{"params": model.conv1.parameters()}, {"params": model.hidden.parameters(), "beta": 2.0}]
    optimizer = kind(model, params=groups, half_life=100, layers={"hidden": {"beta": 3.0}})
    train(model, optimizer, batches(1))
    optimizer.set_constants(beta=1e-12, delta=0.9)
    assert [(g["beta"], g["delta"], g["half_life"]) for g in optimizer.param_groups] == 2 * [(1e-12, 0.9, None)]
    before = weights(model.conv1)
    train(model, optimizer, batches(2))
    assert same(before, weights(model.conv1)) and optimizer.plasticity()["conv1"].frozen == 1
    assert optimizer.plasticity()["hidden"].frozen < 1
    optimizer.add_param_group({"params": model.output.parameters()})
    assert (optimizer.param_groups[2]["beta"], optimizer.param_groups[2]["delta"]) == (1e-12, 0.9)
    for wrong, error in (({"betta": 1.0}, TypeError), ({"beta": 1.0, "alpha": -1}, ValueError)):
        with pytest.raises(error):
            optimizer.set_constants(**wrong)
    assert optimizer.param_groups[0]["beta"] == 1e-12


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda model: model, "params is a module, Sequential; expected its parameters: module.parameters()"),
        (lambda model: [{"params": model.conv1}], "params is a module, Conv2d; expected its parameters"),
        (lambda model: {"params": [*model.parameters()]}, "params has an element of type str; expected parameters, or"),
    ],
)
def test_params_of_other_types_are_refused(params: Any, message: str) -> None:
    model = paper_cnn()
    with pytest.raises(TypeError, match=message):
        NPC(model, params=params(model))


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_a_learning_rate_out_of_range_is_refused_in_the_step_that_would_use_it(rate: float) -> None:
    model = paper_cnn()
    optimizer = NPC(model)
    train(model, optimizer, batches(1))
    optimizer.param_groups[0]["lr"] = rate
    for _ in range(2):
        with refused(model, optimizer, ValueError, f"lr is {rate}; expected a finite number of at least 0"):
            train(model, optimizer, batches(1))


@pytest.mark.parametrize("kind", [NPC, NPCAdamW, CPC, EWC])
def test_a_schedule_may_round_a_rate_of_0_to_a_tiny_negative_one(kind: Any) -> None:
    model = paper_cnn()
    optimizer = kind(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, end_factor=0.0, total_iters=10)
    for batch in batches(10):
        train(model, optimizer, [batch])
        scheduler.step()
    assert -1e-17 < optimizer.param_groups[0]["lr"] < 0
    train(model, optimizer, batches(1))


@pytest.mark.parametrize("kind", [NPC, NPCAdamW, CPC, EWC])
def test_parameters_of_another_model_alone_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"none of the parameters in params belongs to the model"):
        kind(paper_cnn(), params=paper_cnn().parameters())


@pytest.mark.parametrize("layers", [["0"], {"0": False}, {nn.ReLU(): {"beta": 1.0}}])
def test_options_of_layers_that_are_no_mapping_by_name_are_refused(layers: Any) -> None:
    with pytest.raises(TypeError, match=r"layers is .*; expected the options of layers by name or pattern"):
        NPC(nn.Linear(4, 3), layers=layers)


@pytest.mark.parametrize("name", ["alpha", "beta", "delta", "momentum", "weight_decay"])
def test_a_tensor_is_refused_where_a_change_in_place_would_not_be_noticed(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} is a tensor; expected .*, as {name}.item\(\)"):
        NPC(nn.Linear(6, 5), **{name: torch.tensor(0.5)})


def test_a_parameter_given_twice_or_a_bad_late_group_changes_nothing() -> None:
    model = paper_cnn()
    optimizer = NPC(model)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": model.conv1.parameters()})
    with pytest.raises(ValueError, match="alpha is -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "alpha": -1})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, batches(1))


def test_options_of_groups_that_were_set_out_of_range_are_refused_by_the_next_step() -> None:
    model, data = paper_cnn(), batches(2)
    optimizer = NPC(model)
    train(model, optimizer, data[:1])
    optimizer.param_groups[0]["beta"] = -1.0
    with refused(model, optimizer, ValueError, r"beta is -1.0; expected a finite number above 0"):
        train(model, optimizer, data[1:])


def test_options_of_a_group_that_was_replaced_take_effect_in_the_next_step() -> None:
    model, data = paper_cnn(), batches(2)
    optimizer = NPC(model)
    train(model, optimizer, data[:1])
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "beta": 100.0, "lr": 0.2}
    train(model, optimizer, data[1:])
    assert optimizer.constants("hidden")["beta"] == 100.0
    assert all(layer.frozen == 0 and layer.learning_rate.max() == 0.2 for layer in optimizer.plasticity().values())
