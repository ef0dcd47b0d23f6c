"""No importance is lost silently when parameters, modules or the optimizer are replaced."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from npc_ext import CPC, EWC, MAS, NPC, SI, SSL, ImportanceWarning, NPCAdamW
from npc_ext.distributed.sinks import SharedSinks
from npc_ext.neurons.tap import TapHook
from npc_ext.optim.succession import first_block

from ..methods import consolidate, wrapped_adamw
from ..models import Conv1D
from ..training import everything, importances, refused, same, set_importance

pytestmark = pytest.mark.filterwarnings("error")


def network(outputs: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, outputs))


NEURONS: dict[str, Callable[..., Any]] = {"NPC": NPC, "NPCAdamW": NPCAdamW, "PlasticityWrapper": wrapped_adamw}
ANCHORED: dict[str, Callable[..., Any]] = {"EWC": EWC, "MAS": MAS, "SSL": SSL, "SI": SI}
METHODS = {**NEURONS, "CPC": CPC, **ANCHORED}


def data(seed: int) -> Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))


def learn(model: nn.Module, optimizer: Any, steps: int = 4, first: int = 0, set_to_none: bool = True) -> None:
    """Takes steps. It is in this file because warnings are attributed to the caller of `step`."""
    for seed in range(first, first + steps):
        optimizer.zero_grad(set_to_none)
        model(data(seed)).logsumexp(1).mean().backward()
        optimizer.step()


def task(model: nn.Module, optimizer: Any) -> None:
    learn(model, optimizer)
    consolidate(optimizer, (data(9), torch.zeros(16, dtype=torch.int64)))


def trained(make: Callable[..., Any], **options: Any) -> tuple[Any, Any]:
    """A network that has learned a task, and its optimizer."""
    model = network()
    optimizer = make(model, **options)
    task(model, optimizer)
    return model, optimizer


# ------------------------------------------------------------------------------------------------ replaced parameters


def new_weight(model: Any) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())


def new_module(model: Any) -> None:
    model[2] = nn.Linear(16, 12)


def new_container(model: Any) -> None:
    model[2] = nn.Sequential(nn.Linear(16, 12))


def assigned(model: Any) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def normalized(model: Any) -> None:
    weight_norm(model[2])


REPLACEMENTS = {
    new_weight: r"built: '2\.weight'\. .*not trained: '2\.weight'\.",
    new_module: r"built: '2\.weight', '2\.bias'\. .*not trained: '2\.weight', '2\.bias'\.",
    new_container: r"built: '2\.weight', '2\.bias'\. .*not trained: '2\.0\.weight', '2\.0\.bias'\.",
    assigned: r"built: '0\.weight'.*not trained: '0\.weight'",
    normalized: r"built: '2\.weight'\. .*not trained: '2\.parametrizations\.weight\.original",
}


@pytest.mark.parametrize("before_the_first_step", [False, True])
@pytest.mark.parametrize("replace", REPLACEMENTS)
@pytest.mark.parametrize("name", METHODS)
def test_replaced_parameters_are_warned_of_once_by_name(name: str, replace: Any, before_the_first_step: bool) -> None:
    model = network()
    optimizer = METHODS[name](model, lr=0.01)
    if not before_the_first_step:
        learn(model, optimizer)
    replace(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learn(model, optimizer, 12)
    messages = [str(warning.message) for warning in caught if "not trained" in str(warning.message)]
    assert len(messages) == 1 and {warning.filename for warning in caught} == {__file__}
    assert re.search(REPLACEMENTS[replace], messages[0])


@pytest.mark.parametrize("name", [*NEURONS, "CPC"])
def test_plasticity_can_be_looked_at_after_a_parameter_was_replaced(name: str) -> None:
    model, optimizer = trained(METHODS[name], lr=0.01)
    new_weight(model)
    assert optimizer.plasticity()["2"].frozen == 0


def test_a_replaced_parameter_is_noticed_also_where_gradients_are_kept_as_zeros() -> None:
    model, optimizer = trained(NPC)
    new_weight(model)
    with pytest.warns(UserWarning, match=r"'2\.weight'") as caught:
        learn(model, optimizer, 60, set_to_none=False)
    assert len(caught) == 1


def test_pruned_and_compiled_modules_and_removed_heads_are_no_replacements() -> None:
    model, optimizer = trained(NPC, skip_gradients="none")
    prune.l1_unstructured(model[2], "weight", 0.5)
    learn(model, optimizer)
    heads = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)})
    optimizer = NPC(heads)
    learn(heads["a"], optimizer)
    del heads["b"]
    learn(heads["a"], optimizer)
    block = nn.Sequential(network(), nn.ReLU(), nn.Linear(4, 4))
    optimizer = NPC(block)
    block[0] = nn.Sequential(block[0])  # as torch.compile wraps a module
    learn(block, optimizer)


@pytest.mark.parametrize("name", METHODS)
def test_groups_that_hold_the_new_parameter_continue_with_it(name: str) -> None:
    (model, optimizer), (twin, other) = (trained(METHODS[name], lr=0.01) for _ in range(2))
    assigned(model)
    for group in optimizer.param_groups:
        group["params"] = list(model.parameters())
    if name == "PlasticityWrapper":  # its moments start from zero
        optimizer.optimizer.state.clear()
        other.optimizer.state.clear()
    learn(model, optimizer, first=10)
    learn(twin, other, first=10)
    assert same(everything(model, optimizer), everything(twin, other))
    optimizer.state_dict()


@pytest.mark.parametrize("name", METHODS)
def test_a_weight_that_is_shared_no_longer_is_warned_of(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh())
    model[2].weight = model[0].weight
    optimizer = METHODS[name](model, lr=0.01)
    learn(model, optimizer)
    new_weight(model)
    with pytest.warns(UserWarning, match=r"built: '2\.weight'\. .*not trained: '2\.weight'\."):
        learn(model, optimizer, 60)


@pytest.mark.parametrize("name", NEURONS)
def test_a_new_parameter_in_the_groups_is_frozen_from_its_first_step_on(name: str) -> None:
    model, optimizer = trained(NEURONS[name], lr=0.1, beta=1e-6, delta=0.99)
    new_weight(model)
    optimizer.param_groups[0]["params"][2] = model[2].weight
    before = model[2].weight.detach().clone()
    learn(model, optimizer)
    assert torch.equal(model[2].weight, before)


def test_a_module_that_was_replaced_and_put_into_the_groups_is_measured_again() -> None:
    model, optimizer = trained(NPC, delta=0.5, beta=100.0)
    kept = optimizer.plasticity()["4"].importance
    model[4] = copy.deepcopy(model[4])
    optimizer.param_groups[0]["params"] = list(model.parameters())
    learn(model, optimizer, 1)
    assert torch.equal(optimizer.plasticity()["4"].importance, kept)  # its tap went with the old module
    before = model[4].weight.detach().clone()
    learn(model, optimizer, 1)
    assert not torch.equal(optimizer.plasticity()["4"].importance, kept)
    assert not torch.equal(model[4].weight, before)


@pytest.mark.parametrize(
    ("layer", "wider"),
    [
        (nn.Linear(4, 6), nn.Linear(5, 6)),
        (Conv1D(6, 4), Conv1D(6, 5)),
        (nn.ConvTranspose1d(4, 6, 1), nn.ConvTranspose1d(5, 6, 1)),
    ],
    ids=["linear", "conv1d", "transposed"],
)
def test_neurons_keep_their_importance_when_their_inputs_grow(layer: Any, wider: Any) -> None:
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(6, 3))
    optimizer = NPC(model, delta=0.5)

    def step(features: int) -> Tensor:
        x = torch.randn(8, features, generator=torch.Generator().manual_seed(features))
        optimizer.zero_grad()
        model(x.unsqueeze(2) if isinstance(layer, nn.ConvTranspose1d) else x).sin().sum().backward()
        optimizer.step()
        return optimizer.plasticity()["0"].importance

    before = step(4)
    weight = wider.weight.detach().clone()
    first_block(weight, layer.weight.shape).copy_(layer.weight.detach())
    layer.weight = nn.Parameter(weight)
    if hasattr(layer, "in_features"):
        layer.in_features = 5
    if hasattr(layer, "in_channels"):
        layer.in_channels = 5
    optimizer.param_groups[0]["params"] = list(model.parameters())
    after = step(5)
    torch.testing.assert_close(before.mean(), torch.tensor(0.5))  # each step brings (1 - delta) * 1 on average
    torch.testing.assert_close(after.mean(), torch.tensor(0.75))


NEW_HEADS: dict[str, Callable[[Any, Any], Any]] = {
    "in the groups": lambda model, optimizer: optimizer.param_groups[0].update(params=list(model.parameters())),
    "a new group": lambda model, optimizer: optimizer.add_param_group({"params": model[4].parameters()}),
}


def replace_and_learn(way: str, model: Any, optimizer: Any) -> None:
    NEW_HEADS[way](model, optimizer)
    learn(model, optimizer, 1)


@pytest.mark.parametrize("way", NEW_HEADS)
def test_a_new_layer_in_the_place_of_an_old_one_starts_without_importance_and_learns(way: str) -> None:
    model, optimizer = trained(NPC, delta=0.5, momentum=0.9)
    set_importance(optimizer, "4", 9.0)
    body = optimizer.plasticity()["0"].importance
    model[4] = nn.Linear(12, 4)
    with pytest.warns(
        ImportanceWarning, match=r"new parameters, .*: '4.weight', '4.bias'. So these start without the st"
    ):
        replace_and_learn(way, model, optimizer)
    assert optimizer.plasticity()["4"].importance.max() < 2  # of 9: it was measured in one step at most
    assert optimizer.plasticity()["0"].importance.ge(body / 2).all()
    before = model[4].weight.detach().clone()
    learn(model, optimizer, 1)
    assert not torch.equal(model[4].weight, before)


def test_a_new_layer_takes_over_no_importance_from_an_earlier_optimizer_of_the_model() -> None:
    model, optimizer = trained(NPC)
    set_importance(optimizer, "4", 9.0)
    held = optimizer.state_dict()
    model[4] = nn.Linear(12, 4)
    with pytest.warns(ImportanceWarning, match="new parameters, which do not begin with the old values: '4'"):
        later = NPC(model).load_importance(optimizer)
    assert not later.plasticity()["4"].importance.any() and later.plasticity()["0"].importance.any()
    assert later.load_importance(held).plasticity()["4"].importance.eq(9).all()


@pytest.mark.parametrize("way", NEW_HEADS)
@pytest.mark.parametrize("method", [NPC, NPCAdamW, CPC, EWC])
def test_a_layer_that_has_grown_keeps_the_state_of_its_first_neurons(way: str, method: Any) -> None:
    model, optimizer = trained(method)
    old = dict(optimizer.state[model[4].weight])
    head = nn.Linear(12, 6)
    with torch.no_grad():
        head.weight[:4], head.bias[:4] = model[4].weight, model[4].bias
    model[4] = head
    NEW_HEADS[way](model, optimizer)
    optimizer._compare_with_model()
    for name, value in optimizer.state[head.weight].items():
        if torch.is_tensor(value) and value.dim():
            assert torch.equal(value[:4], old[name])
            assert not value[4:].any() or name == "anchor"
    assert {"importance", "stiffness", "exp_avg"} & old.keys() and old.keys() == optimizer.state[head.weight].keys()


@pytest.mark.parametrize("way", ["in the groups", "load_importance"])
def test_neurons_of_a_grown_transposed_convolution_keep_their_importance_group_by_group(way: str) -> None:
    model = nn.Sequential(nn.ConvTranspose1d(4, 4, 3, groups=2), nn.ReLU())
    optimizer = NPC(model)
    set_importance(optimizer, "0", [1.0, 2.0, 3.0, 4.0])
    old, wider = model[0], nn.ConvTranspose1d(4, 6, 3, groups=2)
    with torch.no_grad():
        wider.weight[:, :2] = old.weight
        wider.bias.unflatten(0, (2, 3))[:, :2] = old.bias.unflatten(0, (2, 2))
    model[0] = wider
    if way == "load_importance":
        optimizer = NPC(model).load_importance(optimizer)
    else:
        optimizer.param_groups[0]["params"] = list(model.parameters())
        optimizer._compare_with_model()
    assert optimizer.plasticity()["0"].importance.tolist() == [1, 2, 0, 3, 4, 0]


def test_a_recurrent_layer_of_another_kind_is_a_new_layer() -> None:
    model = nn.ModuleDict({"rnn": nn.RNN(3, 5)})
    optimizer = EWC(model, momentum=0.9)
    model["rnn"](torch.ones(2, 3))[0].sum().backward()
    optimizer.step()
    model["rnn"] = nn.GRU(3, 6)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.warns(ImportanceWarning, match="'rnn.weight_ih_l0'"):
        optimizer.step()


@pytest.mark.parametrize("method", [NPC, NPCAdamW])
def test_a_layer_keeps_its_importance_when_other_parameters_of_it_are_trained(method: Any) -> None:
    model = network()
    weight, bias = model[0].weight, model[0].bias
    optimizer = method(model, params=[bias, *model[2].parameters()])
    task(model, optimizer)
    kept = optimizer.plasticity()["0"].importance
    assert kept.any()
    optimizer.add_param_group({"params": [weight]})
    assert torch.equal(optimizer.plasticity()["0"].importance, kept)
    optimizer.param_groups.pop()
    optimizer._compare_with_model()
    assert torch.equal(optimizer.plasticity()["0"].importance, kept)
    later = method(model).load_importance(optimizer)
    assert torch.equal(later.plasticity()["0"].importance, kept)


def test_each_parameter_that_replaces_a_shared_one_inherits_its_state() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False))
    model[2].weight = model[0].weight
    optimizer = NPC(model, momentum=0.9)
    model(torch.arange(7)).logsumexp(1).mean().backward()
    optimizer.step()
    kept = optimizer.plasticity()["2"].importance
    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert model[0].weight is not model[2].weight
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer._compare_with_model()
    assert kept.any() and torch.equal(optimizer.plasticity()["2"].importance, kept)
    buffers = [optimizer.state[model[at].weight]["momentum_buffer"] for at in (0, 2)]
    assert all(torch.equal(buffer, momentum) for buffer in buffers) and buffers[0] is not buffers[1]


def test_a_group_that_is_refused_leaves_importance_where_it_is() -> None:
    model, optimizer = trained(NPC)
    kept = optimizer.plasticity()["4"].importance
    head = nn.Linear(12, 6)
    with torch.no_grad():
        head.weight[:4], head.bias[:4] = model[4].weight, model[4].bias
    model[4] = head
    with pytest.raises(ValueError, match="stochastic_rounding"):
        optimizer.add_param_group({"params": head.parameters(), "stochastic_rounding": True})
    assert kept.any() and torch.equal(optimizer.plasticity()["4"].importance, kept)


def test_a_warning_of_a_new_layer_that_is_an_error_is_no_reason_to_leave_the_layer_unprotected() -> None:
    model, optimizer = trained(NPC)
    model[4] = nn.Linear(12, 4)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    model(data(0)).logsumexp(1).mean().backward()
    with pytest.raises(ImportanceWarning, match="new parameters"):
        optimizer.step()
    learn(model, optimizer, 2)
    assert optimizer.plasticity()["4"].importance.any()


@pytest.mark.parametrize("rebuilt", [False, True])
def test_weights_that_are_loaded_in_place_of_all_keep_their_importance(rebuilt: bool) -> None:
    model, optimizer = trained(NPC, momentum=0.9)
    kept = importances(optimizer)
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)
    if rebuilt:
        optimizer = NPC(model).load_importance(optimizer)
    else:
        optimizer.param_groups[0]["params"] = list(model.parameters())
        optimizer._compare_with_model()
        assert all("momentum_buffer" in optimizer.state[p] for p in model.parameters())
    assert same(kept, importances(optimizer))


def test_a_layer_that_is_no_longer_measured_is_warned_of() -> None:
    model, optimizer = trained(NPC)
    weight_norm(model[2])
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.warns(ImportanceWarning, match="can no longer be measured, and are not protected: '2'; print"):
        learn(model, optimizer, 1)
    assert [*optimizer.plasticity()] == ["0", "4"] and "a parametrization" in str(optimizer.neurons)


def test_copies_and_pickles_know_their_own_model() -> None:
    for twin_of in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        model, optimizer = trained(NPC)
        twin, other = twin_of((model, optimizer))
        learn(twin, other, 60)
        new_weight(twin)
        with pytest.warns(UserWarning, match=r"'2\.weight'"):
            learn(twin, other)


# ---------------------------------------------------------------------------------------- a new optimizer for a model


@pytest.mark.parametrize("earlier_is", ["alive", "garbage"])
@pytest.mark.parametrize("name", METHODS)
def test_a_new_optimizer_without_the_earlier_importance_is_warned_of(name: str, earlier_is: str) -> None:
    model, earlier = trained(METHODS[name], lr=0.01)
    if earlier_is == "garbage":
        del earlier
        gc.collect()
    optimizer = METHODS[name](model, lr=0.01)
    arguments = r"\(new_optimizer, model\)" if name == "PlasticityWrapper" else r"\(model, ...\)"
    message = rf"an earlier {name} of this model held.*: {name}{arguments}.load_importance"
    with pytest.warns(ImportanceWarning, match=message) as caught:
        learn(model, optimizer, 1)
    assert [warning.filename for warning in caught] == [__file__]
    learn(model, optimizer)


def test_two_optimizers_of_the_same_layers_that_were_both_built_before_training_are_warned_of() -> None:
    model = network()
    first, second = NPC(model), NPC(model)
    learn(model, first)
    with pytest.warns(ImportanceWarning, match="an earlier NPC of this model held"):
        learn(model, second, 1)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("way", ["load_importance", "its state", "state_dict", "on purpose"])
def test_a_new_optimizer_that_is_given_importance_or_none_on_purpose_is_not(name: str, way: str) -> None:
    model, earlier = trained(METHODS[name], lr=0.01)
    optimizer = METHODS[name](model, lr=0.01)
    if way == "state_dict":
        optimizer.load_state_dict(earlier.state_dict())
    else:
        given = {"load_importance": earlier, "its state": earlier.state_dict(), "on purpose": None}[way]
        assert optimizer.load_importance(given) is optimizer
    learn(model, optimizer)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", METHODS)
def test_the_own_state_of_a_new_optimizer_is_no_checkpoint(name: str, momentum: float) -> None:
    model, _ = trained(METHODS[name], lr=0.01)
    options = {} if name in ("NPCAdamW", "PlasticityWrapper") else {"momentum": momentum}
    optimizer = METHODS[name](model, lr=0.01, **options)
    optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate does
    with pytest.warns(ImportanceWarning, match=f"an earlier {name} of this model held"):
        learn(model, optimizer, 1)
    optimizer = METHODS[name](model, lr=0.01, **options).load_importance(None)
    optimizer.load_state_dict(optimizer.state_dict())
    learn(model, optimizer)


@pytest.mark.parametrize("name", NEURONS)
def test_a_checkpoint_from_before_the_first_step_holds_no_importance_on_purpose(name: str) -> None:
    model = network()
    first = METHODS[name](model, lr=0.01)
    checkpoint = copy.deepcopy((model.state_dict(), first.state_dict()))
    learn(model, first)
    model.load_state_dict(checkpoint[0])
    optimizer = METHODS[name](model, lr=0.01)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(checkpoint[1])
    learn(model, optimizer)


def test_a_state_that_does_not_fit_the_wrapped_optimizer_leaves_the_warning_on() -> None:
    model, earlier = trained(wrapped_adamw, lr=0.01)
    optimizer = wrapped_adamw(model, lr=0.01)
    saved = copy.deepcopy(earlier.state_dict())
    saved["param_groups"].append(saved["param_groups"][0])
    with pytest.raises(ValueError, match="parameter groups"):
        optimizer.load_state_dict(saved)
    with pytest.warns(ImportanceWarning, match="an earlier PlasticityWrapper of this model held"):
        learn(model, optimizer, 1)


def test_other_models_other_layers_and_unused_optimizers_raise_no_alarm() -> None:
    learn(model := network(), NPC(model))
    learn(twin := copy.deepcopy(model), NPC(twin))
    learn(another := network(), NPC(another))
    model = network()
    NPC(model)
    learn(model, NPC(model))
    model = network()
    first = NPC(model, params=model[0].parameters())
    second = NPC(model, params=model[2].parameters())
    for optimizer in (first, second):
        learn(model, optimizer)


def test_the_note_of_an_earlier_optimizer_keeps_neither_it_nor_the_model_alive() -> None:
    model, optimizer = trained(NPC)
    gone = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@pytest.mark.parametrize("later", NEURONS)
@pytest.mark.parametrize("earlier", NEURONS)
def test_optimizers_of_neurons_take_over_from_each_other(earlier: str, later: str) -> None:
    model, first = trained(NEURONS[earlier], delta=0.5)
    known = importances(first)
    for given in (first.state_dict(), first):
        second = NEURONS[later](model, delta=0.5).load_importance(given)
        assert same(importances(second), known)
    learn(model, second)


def test_one_optimizer_for_each_task_with_importance_handed_over_is_one_for_all() -> None:
    one, many = network(), network()
    only, latest = NPC(one, delta=0.9), NPC(many, delta=0.9)
    for number in range(3):
        learn(one, only, first=10 * number)
        learn(many, latest, first=10 * number)
        latest = NPC(many, delta=0.9).load_importance(latest)
    assert same(one, many)


@pytest.mark.parametrize("name", METHODS)
def test_layers_that_have_grown_keep_what_their_first_rows_had(name: str) -> None:
    model, earlier = trained(METHODS[name], lr=0.01)
    head = nn.Linear(12, 7)
    with torch.no_grad():
        head.weight[:4], head.bias[:4] = model[4].weight, model[4].bias
    old, model[4] = model[4], head
    later = METHODS[name](model, lr=0.01).load_importance(earlier)
    if name in ANCHORED or name == "CPC":
        names = ["importance"] if name == "CPC" else ["stiffness", "anchor"]
        known = {key: earlier.state[old.weight][key] for key in names}
        for key, value in known.items():
            assert torch.equal(later.state[head.weight][key][:4], value)
            expected = head.weight[4:] if key == "anchor" else torch.zeros(3, 12)
            assert torch.equal(later.state[head.weight][key][4:], expected)
    else:
        known = earlier.plasticity()["4"].importance
        assert torch.equal(later.plasticity()["4"].importance, torch.cat([known, torch.zeros(3)]))
    learn(model, later)


def test_queries_keys_values_and_gates_grow_each_by_itself() -> None:
    def grown(sizes: int, old: int, new: int) -> list[float]:
        return [float(part * old + row) if row < old else 0.0 for part in range(sizes) for row in range(new)]

    small, large = nn.MultiheadAttention(2, 1), nn.MultiheadAttention(3, 1)
    earlier = NPC(small)
    earlier.state[small.in_proj_weight]["importance"] = torch.arange(6.0)
    later = NPC(large).load_importance(earlier)
    assert later.plasticity()["in_proj"].importance.tolist() == grown(3, 2, 3)

    cpc = CPC(small)
    cpc.state[small.in_proj_bias]["importance"] = torch.arange(6.0)
    later = CPC(large).load_importance(cpc)
    assert later.state[large.in_proj_bias]["importance"].tolist() == grown(3, 2, 3)

    small_lstm, large_lstm = nn.LSTM(2, 2), nn.LSTM(2, 3)
    ewc = EWC(small_lstm)
    for weight in small_lstm.parameters():
        stiffness = torch.arange(8.0).view(-1, *[1] * (weight.ndim - 1)).expand_as(weight).contiguous()
        ewc.state[weight].update(stiffness=stiffness, anchor=stiffness.clone())
    larger = EWC(large_lstm).load_importance(ewc)
    assert larger.state[large_lstm.bias_ih_l0]["stiffness"].tolist() == grown(4, 2, 3)
    assert larger.state[large_lstm.weight_hh_l0]["stiffness"][:, 0].tolist() == grown(4, 2, 3)
    assert not larger.state[large_lstm.weight_hh_l0]["stiffness"][:, 2].any()


@pytest.mark.parametrize("name", ["NPC", "CPC", "EWC"])
def test_a_grown_weight_continues_with_a_new_optimizer(name: str) -> None:
    model, earlier = trained(METHODS[name], momentum=0.9)
    for parameter in model[4].parameters():
        parameter.data = torch.cat([parameter.data, torch.full((3, *parameter.shape[1:]), 0.1)])
        parameter.grad = None
    later = METHODS[name](model, momentum=0.9).load_importance(earlier)
    learn(model, later)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_importance_that_does_not_fit_is_refused_by_name_and_changes_nothing() -> None:
    model, earlier = trained(NPC)
    smaller = NPC(network(3))
    for optimizer, given, error, message in (
        (smaller, earlier, ValueError, r"layer '4' had importance of shape \(4,\).* shape \(3,\)"),
        (NPC(nn.ModuleDict({"head": nn.Linear(2, 2)})), earlier, ValueError, "'0', '2', '4', but here are 'head'"),
        (EWC(model), earlier, TypeError, "earlier is of type NPC"),
        (NPC(network()), torch.optim.SGD(model.parameters()), TypeError, "earlier is of type SGD"),
        (NPC(network()), NPC(nn.Linear(2, 2)).state_dict(), ValueError, "2 parameters, this optimizer 6"),
    ):
        with pytest.raises(error, match=message):
            optimizer.load_importance(given)
    assert not any(bool(layer.importance.any()) for layer in smaller.plasticity().values())


@pytest.mark.parametrize("name", NEURONS)
def test_the_state_of_an_optimizer_without_importance_is_refused(name: str) -> None:
    model = network()
    earlier = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    learn(model, earlier)
    with pytest.raises(ValueError, match="state dict without importance of neurons, so another optimizer saved it"):
        NEURONS[name](model).load_importance(earlier.state_dict())


def test_the_taps_of_an_earlier_optimizer_are_gone_when_importance_was_handed_over_or_it_is_garbage() -> None:
    model = network()

    def taps() -> int:
        hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
        return sum(isinstance(hook, TapHook) for hook in hooks)

    earlier = NPC(model)
    count = taps()
    learn(model, earlier)
    later = NPC(model)
    assert taps() == 2 * count  # both may continue, and each measures for itself
    later.load_importance(earlier)
    assert taps() == count
    learn(model, later)
    assert all(layer.sink.grad is None for layer in earlier.neurons)
    with pytest.raises(RuntimeError, match="no importance was measured"):
        learn(model, earlier, 1)
    del earlier
    later = NPC(model).load_importance(None)
    gc.collect()
    assert taps() == count
    learn(model, later)


def test_a_replaced_layer_that_does_not_fit_its_options_is_refused_in_every_step() -> None:
    model, optimizer = trained(NPC, layers={"4": {"alpha": 0.1}})
    model[4] = weight_norm(nn.Linear(12, 4))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    for _ in range(2):
        with refused(model, optimizer, ValueError, "'4'"):
            learn(model, optimizer, 1)


def test_processes_meet_once_in_the_step_that_finds_another_parameter_in_the_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that have no more batches (Join) add nothing once a step; meeting twice would hang."""
    meetings: list[int] = []
    monkeypatch.setattr(SharedSinks, "shared", True)
    monkeypatch.setattr(SharedSinks, "notify_join", lambda sinks, optimizer: None)
    monkeypatch.setattr(SharedSinks, "start", lambda sinks, layers: meetings.append(len(list(layers))))
    model = network()
    optimizer = NPC(model, lr=0.1)
    for replaced in (False, True):
        if replaced:
            new_weight(model)
            optimizer.param_groups[0]["params"] = list(model.parameters())
        before = model[2].weight.detach().clone()
        meetings.clear()
        learn(model, optimizer, 1)
        assert len(meetings) == 1
        assert not torch.equal(model[2].weight, before)
