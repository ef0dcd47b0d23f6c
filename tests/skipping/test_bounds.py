"""Where skipping ends: other code that uses the model or the optimizer gets the gradients that it needs."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import npc_ext
from npc_ext import NPC, ImportanceWarning
from npc_ext.skipping.gradients import operation_of

from ..models import Model
from ..training import same
from .frozen import Pair, batch, frozen, loss_of, set_importances, skipped, steps

pytestmark = pytest.mark.usefixtures("always", "often")


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)),
    )


def rests(model: Any) -> bool:
    """Whether the first layer rests in a call of the model: its output requires no gradient."""
    usual, outputs = model[0].forward, []

    def forward(x: Tensor) -> Tensor:
        outputs.append(usual(x))
        return outputs[-1]

    model[0].forward = forward
    model(batch()[0])
    model[0].forward = usual
    return not outputs[0].requires_grad


def hooks(model: nn.Module) -> int:
    """How many hooks and replaced forwards a model has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    placed = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return placed + sum("forward" in module.__dict__ for module in model.modules())


# ------------------------------------------------------------------------------------------- an optimizer for each task


def test_an_optimizer_that_is_gone_leaves_nothing_in_the_model() -> None:
    model, optimizer = frozen(network(), "0")
    gone = weakref.ref(optimizer)
    assert hooks(model) > 0
    del optimizer
    assert gone() is None and hooks(model) == 0


def test_the_next_tasks_optimizer_lets_layers_rest_again() -> None:
    model, optimizer = frozen(network(), "0")
    placed, saved = hooks(model), optimizer.state_dict()
    for task in range(3):
        optimizer = NPC(model, lr=0.05, delta=0.9999, skip_gradients="rows")
        optimizer.load_state_dict(saved)
        steps(model, optimizer, range(10 * task, 10 * task + 6))
        assert hooks(model) == placed
        assert rests(model) and skipped(optimizer)["0"] == 1.0


def test_a_copied_models_own_optimizer_lets_layers_rest() -> None:
    model, _optimizer = frozen(network(), "0")
    twin = copy.deepcopy(model)
    own = NPC(twin, lr=0.05, delta=0.9999, skip_gradients="rows")
    set_importances(own, {"0": 3.0})
    steps(twin, own, range(6))
    assert rests(twin)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_that_is_gone_leaves_its_model_and_not_the_first_one(copied: Callable[[Any], Any]) -> None:
    model, optimizer = frozen(network(), "0")
    placed = hooks(model)
    twin, own = copied((model, optimizer))
    assert hooks(twin) == placed
    steps(twin, own, range(6))
    assert rests(twin)
    del own
    gc.collect()
    assert hooks(twin) == 0 and hooks(model) == placed and rests(model)
    assert skipped(optimizer)["0"] == 1.0


def test_taps_that_are_placed_without_an_optimizer_stay() -> None:
    model = network()
    npc_ext.find_neurons(model).attach(model)
    gc.collect()
    assert hooks(model) > 0


# ---------------------------------------------------------------------------------------- models that are called by parts


@pytest.mark.parametrize("call", [lambda m, x: m[4:](m[:4](x)), lambda m, x: m.forward(x)], ids=["parts", "forward"])
def test_a_model_that_is_called_by_parts_is_measured_in_every_step(call: Callable[[Any, Tensor], Tensor]) -> None:
    model, optimizer = frozen(network(), "0", "4", "7", count=8)
    before = copy.deepcopy(model)
    for seed in range(8):
        optimizer.zero_grad()
        loss_of(lambda x: call(model, x), seed).backward()
        assert all(layer.sink.grad is not None for layer in optimizer.neurons)
        optimizer.step()
    assert same(model, before)


def test_a_loss_and_hooks_before_the_tap_of_a_first_layer() -> None:
    model, _optimizer = frozen(network(), "0")
    twin = copy.deepcopy(model)
    x = batch()[0]
    for trained in (model, twin):
        trained.zero_grad()
        trained[:2](x).var().backward()
    assert torch.allclose(model[1].weight.grad, twin[1].weight.grad)
    model[0](x).retain_grad()


def test_hooks_of_others_are_called() -> None:
    model, optimizer = frozen(network(), "0", count=8)
    kept, called = [], []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = model[0].register_forward_hook(keep)
    other = model[2].register_full_backward_hook(lambda *arguments: called.append(1))
    optimizer.zero_grad()
    loss_of(model).backward()
    assert kept[0].grad.any() and called == [1]
    optimizer.step()
    handle.remove()
    other.remove()
    steps(model, optimizer, range(8))
    assert rests(model)


def test_an_exception_in_a_call_ends_it() -> None:
    model, optimizer = frozen(network(), "0")
    with pytest.raises(RuntimeError):
        model(torch.randn(8, 1, 5, 5))
    model[0](batch()[0]).retain_grad()
    usual = model[4].forward

    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model[4].forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        model(batch()[0])
    model[4].forward = usual
    steps(model, optimizer, range(1))
    model[0](batch()[0]).retain_grad()


class Itself(nn.Module):
    """Calls itself while its first layer has run and is not measured yet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        x = x.flatten(1)
        first = self.first(x)
        inner = self(x.flip(1), depth - 1) if depth else 0
        return self.last(self.relu(first)) + inner


def test_a_model_that_calls_itself() -> None:
    pair = Pair(Itself(), {"first": 3.0}, lr=0.05, delta=0.9999, layers={"first": {"measure_at": "relu"}})
    pair.steps(range(8))
    assert pair.same() and pair.skipped()["first"] == 1.0


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_does_as_its_call_did(reentrant: bool) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        head = checkpoint(model.body[:4], x, use_reentrant=False)
        return checkpoint(model.body[4:], head, use_reentrant=reentrant)

    model, optimizer = frozen(Model(forward, body=network()), "body.0", "body.4", count=12)
    loss_of(model).backward()
    assert not optimizer.neurons["body.0"].resting  # the checkpoint's call is over
    model.eval()
    model.zero_grad()
    loss_of(model).backward()
    assert model.body[1].weight.grad.any()


# ----------------------------------------------------------------------------------------------- eval mode, functional


def test_in_eval_mode_all_gradients_are_there_after_a_call_in_training_mode() -> None:
    model, optimizer = frozen(network(), "0", "4")
    model(batch()[0])
    model.eval()
    optimizer.zero_grad()
    loss_of(model).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("names", [("0.weight", "1.weight"), ("1.weight",), ("1.bias", "4.weight"), ("0.bias",)])
@pytest.mark.parametrize("leaf", [True, False])
def test_functional_calls_with_other_parameters_get_their_gradients(names: tuple[str, ...], leaf: bool) -> None:
    model, _optimizer = frozen(network(), "0", "4")
    twin = copy.deepcopy(model)
    loss_of(model).backward()
    results = []
    for trained in (model, twin):
        own = {name: trained.get_parameter(name).detach().clone().requires_grad_() for name in names}
        used = own if leaf else {name: tensor * 1 for name, tensor in own.items()}
        loss = loss_of(lambda x, trained=trained, used=used: functional_call(trained, used, (x,)))
        results.append(torch.autograd.grad(loss, [*own.values()]))
    for got, want in zip(*results, strict=True):
        assert want.any() and torch.allclose(got, want, rtol=1e-4, atol=1e-7)


def test_a_functional_call_with_another_bias_of_a_layer_without_normalization() -> None:
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
    model, _optimizer = frozen(model, "0")
    bias = torch.zeros(16, requires_grad=True)
    loss_of(lambda x: functional_call(model, {"0.bias": bias}, (x,))).backward()
    assert bias.grad is not None and bias.grad.any()


# ------------------------------------------------------------------------------ changes between forward pass and step()


@pytest.mark.parametrize("after", ["forward", "backward"])
def test_a_state_that_is_loaded_before_the_step_is_refused_if_it_matters(after: str) -> None:
    model, optimizer = frozen(network(), "0")
    low = NPC(network(), lr=0.05, delta=0.9999, skip_gradients="rows").state_dict()
    optimizer.zero_grad()
    loss = loss_of(model)
    if after == "forward":
        optimizer.load_state_dict(low)
    loss.backward()
    if after == "backward":
        optimizer.load_state_dict(low)
    with pytest.raises(RuntimeError, match=r"skipped for neurons that could not move|no importance was measured"):
        optimizer.step()
    steps(model, optimizer, range(2))


@pytest.mark.parametrize(
    "change",
    [
        lambda optimizer: optimizer.param_groups[0].update(beta=50.0),
        lambda optimizer: set_importances(optimizer, {"0": 0.0}),
    ],
    ids=["beta", "importance"],
)
def test_a_change_while_a_layer_rests_is_refused_if_it_matters(change: Callable[[NPC], None]) -> None:
    model, optimizer = frozen(network(), "0", "4", count=8)
    loss = loss_of(model)
    optimizer.zero_grad()  # after the forward pass, as some write it
    loss.backward()
    change(optimizer)
    with pytest.raises(RuntimeError, match=r"layer '0': gradients were skipped for neurons that could not move"):
        optimizer.step()
    optimizer.zero_grad()
    before = model[0].weight.detach().clone()
    steps(model, optimizer, range(1))
    assert not torch.equal(before, model[0].weight)


def test_a_change_after_a_layer_rested_is_fine_where_its_gradients_were_dropped() -> None:
    model, optimizer = frozen(network(), "0", "4", count=8)
    loss_of(model).backward()
    optimizer.zero_grad()
    optimizer.param_groups[0]["beta"] = 50.0
    loss_of(model).backward()
    optimizer.step()


@pytest.mark.parametrize("after", ["forward", "backward"])
def test_a_group_that_is_added_before_the_step_changes_nothing(after: str) -> None:
    model, optimizer = frozen(network(), "0", "4", count=8)
    loss = loss_of(model)
    if after == "backward":
        loss.backward()
    model.append(nn.Linear(10, 10))
    optimizer.add_param_group({"params": model[8].parameters()})
    if after == "forward":
        loss.backward()
    optimizer.param_groups[0]["beta"] = 50.0
    with pytest.raises(RuntimeError, match="skipped for neurons that could not move"):
        optimizer.step()


def test_a_group_that_was_replaced_by_another_dictionary_before_the_forward_pass_skips_nothing() -> None:
    model, optimizer = frozen(network(), "0")
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "beta": 50.0}
    optimizer.zero_grad()
    loss_of(model).backward()
    assert model[0].weight.grad is not None and model[0].weight.grad.any()
    optimizer.step()


# ------------------------------------------------------------------------------------------------------- other optimizers


@pytest.mark.parametrize(
    "names",
    [("0.bias",), ("1.weight",), ("1.weight", "1.bias"), ("4.bias",), ("0.weight", "4.weight", "4.bias")],
)
def test_another_optimizer_gets_its_gradients(names: tuple[str, ...]) -> None:
    model, _optimizer = frozen(network(), "0", "4")
    other = torch.optim.SGD([model.get_parameter(name) for name in names], lr=0.1)
    steps(model, other, range(1))  # its first gradients are zero
    before = [model.get_parameter(name).detach().clone() for name in names]
    steps(model, other, range(1))
    moved = [not torch.equal(old, model.get_parameter(name)) for old, name in zip(before, names, strict=True)]
    assert all(moved) or names == ("0.bias",)  # which batch norm takes out again


def test_a_second_optimizer_measures_every_layer() -> None:
    model, optimizer = frozen(network(), "0", "4", "7", count=8)
    second = NPC(model, lr=0.05, delta=0.9999, skip_gradients="rows")
    for seed in range(8):
        optimizer.zero_grad()
        second.zero_grad()
        loss_of(model, seed).backward()
        assert all(layer.sink.grad is not None for layer in second.neurons)
        optimizer.step()


# ----------------------------------------------------------------------------------------------------------- extra passes


def test_the_input_gradient_of_a_convolution_copies_nothing() -> None:
    layer, gradient = nn.Conv2d(4, 32, 3, padding=1), torch.randn(2, 32, 8, 8)
    operation = operation_of(layer)
    assert not isinstance(operation, str)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.no_grad():
        operation.input_gradient(gradient, layer.weight, torch.Size((2, 4, 8, 8)), False)
    names = {event.key for event in profiler.key_averages()}
    assert "aten::convolution_backward" in names and "aten::copy_" not in names


# -------------------------------------------------------------------------------------------- what cannot be skipped


def test_sparse_input_of_a_layer_that_is_certified_in_part() -> None:
    model, x = nn.Sequential(nn.Linear(8, 48), nn.Tanh()), torch.eye(8)
    optimizer = NPC(model, delta=0.9999, skip_gradients="rows")
    set_importances(optimizer, {"0": (torch.arange(48) >= 16) * 3.0})
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert 0 < skipped(optimizer)["0"] < 1
    output = model(x.to_sparse())
    output.sum().backward()
    assert torch.allclose(output, model(x)) and model[0].weight.grad.any(1).all()


def test_a_layer_that_was_replaced_by_a_larger_one_has_left_nothing_out() -> None:
    model, optimizer = frozen(network(), "0", "4")
    loss_of(model).backward()
    model[4], model[7] = nn.Conv2d(16, 48, 3), nn.Linear(192, 10)
    with pytest.warns(ImportanceWarning, match="new parameters"):
        optimizer.add_param_group({"params": [*model[4].parameters(), *model[7].parameters()]})
    loss_of(model).backward()
    optimizer.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda neurons: pickle.loads(pickle.dumps(neurons))])
def test_copied_neurons_can_be_detached(copied: Callable[[Any], Any]) -> None:
    _, optimizer = frozen(network(), "0")
    copied(optimizer.neurons).detach()


@pytest.mark.parametrize("detached", [True, False])
def test_several_optimizers_of_a_model_get_all_gradients(detached: bool) -> None:
    model, optimizer = frozen(network(), "0", "4")
    second = NPC(model, lr=0.05, delta=0.9999, skip_gradients="rows").load_importance(None)
    model.zero_grad()
    loss_of(model).backward()
    assert model[0].weight.grad.any() and model[4].weight.grad.any()
    steps(model, second, range(6))
    assert skipped(second)["0"] == 0.0 and model[0].weight.grad.any()
    if detached:
        second.neurons.detach()
    else:
        del second
    steps(model, optimizer, range(6))
    assert rests(model) and skipped(optimizer)["0"] == 1.0
    optimizer.neurons.detach()
    assert hooks(model) == 0
