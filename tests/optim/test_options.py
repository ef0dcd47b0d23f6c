"""Options of optimizers, of their groups and of single layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from npc_ext import CPC, NPC, NPCAdamW

from ..methods import wrapped_sgd
from ..models import paper_cnn
from ..training import batches, refused, same, train, weights


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
def test_a_layer_that_is_not_consolidated_trains_also_where_others_are_frozen(kind: Any, others: str) -> None:
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
        (NPC, {"layers": {"conv1": {"lr": 1}}}, r"layers\['conv1'\] has the option 'lr'; expected alpha, beta"),
        (NPC, {"layers": {"conv1": {"delta": 2}}}, r"layers\['conv1'\]: delta is 2"),
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
