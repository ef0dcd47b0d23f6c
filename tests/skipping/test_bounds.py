"""Where leaving gradients out ends: what others do with the model and the optimizer gets what it needs."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import npc_ext
from npc_ext import NPC
from npc_ext.skipping import certificate, forward
from npc_ext.skipping.gradients import operation_of


@pytest.fixture(autouse=True)
def often_and_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates are issued every second step, and rows are left out whether it pays or not."""
    monkeypatch.setattr(certificate, "FEWEST_STEPS_BETWEEN_ISSUES", 2)
    monkeypatch.setattr(certificate, "MOST_STEPS_BETWEEN_ISSUES", 2)
    monkeypatch.setattr(forward, "skipping_pays", lambda *arguments: True)


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)),
    )


def batch(seed: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)


def loss_of(model: Callable[[Tensor], Tensor], seed: int = 50) -> Tensor:
    x, y = batch(seed)
    return F.cross_entropy(model(x), y)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, start: int = 0) -> None:
    for seed in range(start, start + count):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()


def freeze(optimizer: NPC, *layers: str) -> None:
    for layer in layers:
        optimizer.state[optimizer.neurons[layer].parameters[0].parameter]["importance"].fill_(3.0)


def frozen(*layers: str, model: nn.Module | None = None, count: int = 6, **options: Any) -> tuple[Any, NPC]:
    """A model whose layers of these names are certified wholly."""
    torch.manual_seed(0)
    model = network() if model is None else model
    optimizer = NPC(model, lr=0.05, delta=0.9999, **options)
    freeze(optimizer, *layers)
    steps(model, optimizer, count)
    return model, optimizer


def rests(model: Any, layer: str = "0") -> bool:
    """Whether a layer rests in a call of the model: what it returns requires no gradient."""
    seen, module = [], model.get_submodule(layer)
    usual = module.forward

    def forward(x: Tensor) -> Tensor:
        output: Tensor = usual(x)
        seen.append(not output.requires_grad)
        return output

    module.forward = forward
    try:
        model(batch()[0])
    finally:
        module.forward = usual
    return seen == [True]


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    placed = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return placed + sum("forward" in module.__dict__ for module in model.modules())


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# ------------------------------------------------------------------------------------------- an optimizer for each task


def test_an_optimizer_that_is_gone_leaves_nothing_in_the_model() -> None:
    model, optimizer = frozen("0")
    gone = weakref.ref(optimizer)
    assert hooks(model) > 0
    del optimizer
    gc.collect()
    assert gone() is None and hooks(model) == 0


def test_the_next_tasks_optimizer_lets_layers_rest_again() -> None:
    model, optimizer = frozen("0")
    placed, saved = hooks(model), optimizer.state_dict()
    for task in range(3):
        optimizer = NPC(model, lr=0.05, delta=0.9999)
        optimizer.load_state_dict(saved)
        steps(model, optimizer, 6, 10 * task)
        assert hooks(model) == placed
        assert rests(model) and optimizer.plasticity()["0"].gradients_skipped == 1.0


def test_a_copied_models_own_optimizer_lets_layers_rest() -> None:
    model, _optimizer = frozen("0")
    twin = copy.deepcopy(model)
    own = NPC(twin, lr=0.05, delta=0.9999)
    freeze(own, "0")
    steps(twin, own, 6)
    assert rests(twin)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_that_is_gone_leaves_its_model_and_not_the_first_one(copied: Callable[[Any], Any]) -> None:
    model, optimizer = frozen("0")
    placed = hooks(model)
    twin, own = copied((model, optimizer))
    assert hooks(twin) == placed
    steps(twin, own, 6)
    assert rests(twin)
    del own
    gc.collect()
    assert hooks(twin) == 0 and hooks(model) == placed and rests(model)
    assert optimizer.plasticity()["0"].gradients_skipped == 1.0


def test_taps_that_are_placed_without_an_optimizer_stay() -> None:
    model = network()
    npc_ext.find_neurons(model).attach(model)
    gc.collect()
    assert hooks(model) > 0


# ---------------------------------------------------------------------------------------- models that are called by parts


@pytest.mark.parametrize("call", [lambda m, x: m[4:](m[:4](x)), lambda m, x: m.forward(x)], ids=["parts", "forward"])
def test_a_model_that_is_called_by_parts_is_measured_in_every_step(call: Callable[[Any, Tensor], Tensor]) -> None:
    model, optimizer = frozen("0", "4", "7", count=8)
    before = copy.deepcopy(model)
    for seed in range(8):
        optimizer.zero_grad()
        loss_of(lambda x: call(model, x), seed).backward()
        assert all(layer.sink.grad is not None for layer in optimizer.neurons)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_a_loss_and_hooks_before_the_tap_of_a_first_layer() -> None:
    model, _optimizer = frozen("0")
    twin = copy.deepcopy(model)
    x = batch()[0]
    for one in (model, twin):
        one.zero_grad()
        one[:2](x).var().backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(model[1].weight.grad, twin[1].weight.grad)
    model[0](x).retain_grad()


def test_hooks_of_others_are_called() -> None:
    model, optimizer = frozen("0", count=8)
    kept, called = [], []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handles = [
        model[0].register_forward_hook(keep),
        model[2].register_full_backward_hook(lambda *arguments: called.append(1)),
    ]
    optimizer.zero_grad()
    loss_of(model).backward()
    assert kept[0].grad.any() and called == [1]
    optimizer.step()
    for handle in handles:
        handle.remove()
    steps(model, optimizer, 8)
    assert rests(model)


def test_an_exception_in_a_call_ends_it() -> None:
    model, optimizer = frozen("0")
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
    steps(model, optimizer, 1)
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
        result: Tensor = self.last(self.relu(first)) + inner
        return result


def test_a_model_that_calls_itself() -> None:
    model, twin = Itself(), None
    options: dict[str, Any] = {"lr": 0.05, "delta": 0.9999, "layers": {"first": {"measure_at": "relu"}}}
    twin = copy.deepcopy(model)
    optimizer, plain = NPC(model, **options), NPC(twin, skip_frozen=False, **options)
    for own in (optimizer, plain):
        freeze(own, "first")
    steps(model, optimizer, 8)
    steps(twin, plain, 8)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert torch.equal(*(own.plasticity()["first"].importance for own in (optimizer, plain)))
    assert optimizer.plasticity()["first"].gradients_skipped == 1.0


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = network(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = checkpoint(self.body[:4], x, use_reentrant=False)
        if self.reentrant:
            output: Tensor = checkpoint(self.body[4:], head, use_reentrant=True)
            return output
        tail: Tensor = checkpoint(self.body[4:], head, use_reentrant=False)
        return tail


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_does_as_its_call_did(reentrant: bool) -> None:
    model = Checkpointed(reentrant)
    model, optimizer = frozen("body.0", "body.4", model=model, count=12)
    assert optimizer.plasticity()["body.0"].gradients_skipped == 1.0
    loss_of(model).backward()
    layer = optimizer.neurons["body.0"]
    assert not layer.resting  # that, too, is over
    model.eval()
    model.zero_grad()
    loss_of(model).backward()
    assert model.body[1].weight.grad.any()


# ----------------------------------------------------------------------------------------------- eval mode, functional


def test_in_eval_mode_all_gradients_are_there_after_a_call_in_training_mode() -> None:
    model, optimizer = frozen("0")
    model(batch()[0])
    model.eval()
    optimizer.zero_grad()
    loss_of(model).backward()
    assert all(gradient is not None and gradient.any() for gradient in gradients_of(model).values())


@pytest.mark.parametrize("names", [("0.weight", "1.weight"), ("1.weight",), ("1.bias", "4.weight"), ("0.bias",)])
@pytest.mark.parametrize("leaf", [True, False])
def test_functional_calls_with_other_parameters_get_their_gradients(names: tuple[str, ...], leaf: bool) -> None:
    model, _optimizer = frozen("0", "4")
    twin = copy.deepcopy(model)
    loss_of(model).backward()
    results = []
    for one in (model, twin):
        own = {name: one.get_parameter(name).detach().clone().requires_grad_() for name in names}
        used = own if leaf else {name: tensor * 1 for name, tensor in own.items()}
        loss = loss_of(lambda x, one=one, used=used: functional_call(one, used, (x,)))  # type: ignore[misc]
        results.append(torch.autograd.grad(loss, [*own.values()]))
    for got, want in zip(*results, strict=True):
        assert want.any() and torch.allclose(got, want, rtol=1e-4, atol=1e-7)


def test_a_functional_call_with_another_bias_of_a_layer_without_normalization() -> None:
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
    model, _optimizer = frozen("0", model=model)
    bias = torch.zeros(16, requires_grad=True)
    loss_of(lambda x: functional_call(model, {"0.bias": bias}, (x,))).backward()
    assert bias.grad is not None and bias.grad.any()


# ------------------------------------------------------------------------------ changes between forward pass and step()


@pytest.mark.parametrize("after", ["forward", "backward"])
def test_a_state_that_is_loaded_under_a_layers_feet_is_refused_if_it_matters(after: str) -> None:
    model, optimizer = frozen("0")
    low = NPC(network(), lr=0.05, delta=0.9999).state_dict()
    optimizer.zero_grad()
    loss = loss_of(model)
    if after == "forward":
        optimizer.load_state_dict(low)
    loss.backward()
    if after == "backward":
        optimizer.load_state_dict(low)
    with pytest.raises(RuntimeError, match=r"left out of neurons that could not move|no importance was measured"):
        optimizer.step()
    steps(model, optimizer, 2)


def test_a_change_while_a_layer_rests_is_refused_if_it_matters() -> None:
    model, optimizer = frozen("0", "4", count=8)
    loss = loss_of(model)
    optimizer.zero_grad()  # after the forward pass, as some write it
    loss.backward()
    optimizer.param_groups[0]["beta"] = 50.0
    with pytest.raises(RuntimeError, match="left out of neurons that could not move"):
        optimizer.step()
    optimizer.zero_grad()
    before = model[0].weight.detach().clone()
    steps(model, optimizer, 1)
    assert not torch.equal(before, model[0].weight)


def test_a_change_after_a_layer_rested_is_fine_where_its_gradients_were_dropped() -> None:
    model, optimizer = frozen("0", "4", count=8)
    loss_of(model).backward()
    optimizer.zero_grad()
    optimizer.param_groups[0]["beta"] = 50.0
    loss_of(model).backward()
    optimizer.step()


@pytest.mark.parametrize("after", ["forward", "backward"])
def test_a_group_that_is_added_under_a_layers_feet_changes_nothing(after: str) -> None:
    model, optimizer = frozen("0", "4", count=8)
    loss = loss_of(model)
    if after == "backward":
        loss.backward()
    model.append(nn.Linear(10, 10))
    optimizer.add_param_group({"params": model[8].parameters()})
    if after == "forward":
        loss.backward()
    optimizer.param_groups[0]["beta"] = 50.0
    with pytest.raises(RuntimeError, match="left out of neurons that could not move"):
        optimizer.step()


# ------------------------------------------------------------------------------------------------------- other optimizers


@pytest.mark.parametrize("names", [("0.bias",), ("1.weight",), ("1.weight", "1.bias"), ("4.bias",)])
def test_another_optimizer_of_biases_and_scales_gets_its_gradients(names: tuple[str, ...]) -> None:
    model, _optimizer = frozen("0", "4")
    other = torch.optim.SGD([model.get_parameter(name) for name in names], lr=0.1)
    steps(model, other, 1)  # its first gradients are zero
    before = [model.get_parameter(name).detach().clone() for name in names]
    steps(model, other, 1)
    moved = [not torch.equal(old, model.get_parameter(name)) for old, name in zip(before, names, strict=True)]
    assert all(moved) or names == ("0.bias",)  # which batch norm takes out again


def test_a_second_optimizer_measures_every_layer() -> None:
    model, optimizer = frozen("0", "4", "7", count=8)
    second = NPC(model, lr=0.05, delta=0.9999)
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


# -------------------------------------------------------------------------------------------- what cannot be left out


def test_sparse_input_of_a_layer_that_is_certified_in_part() -> None:
    model = nn.Sequential(nn.Linear(8, 48), nn.Tanh())
    optimizer = NPC(model, delta=0.9999)
    importance = optimizer.state[model[0].weight]["importance"]
    importance[16:] = 3.0
    x = torch.eye(8)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert 0 < optimizer.plasticity()["0"].gradients_skipped < 1
    output = model(x.to_sparse())
    output.sum().backward()
    assert torch.allclose(output, model(x)) and model[0].weight.grad.any(1).all()  # type: ignore[union-attr]


def test_a_state_that_was_replaced_by_another_dictionary_voids_certificates() -> None:
    model, optimizer = frozen("0", "4")
    assert optimizer.plasticity()["0"].gradients_skipped == 1.0
    optimizer.state = defaultdict(dict)
    before = model[0].weight.detach().clone()
    steps(model, optimizer, 4)
    assert model[0].weight.grad.any() and not torch.equal(before, model[0].weight)


def test_a_layer_that_was_replaced_by_a_larger_one_has_left_nothing_out() -> None:
    model, optimizer = frozen("0", "4")
    loss_of(model).backward()
    model[4], model[7] = nn.Conv2d(16, 48, 3), nn.Linear(192, 10)
    optimizer.add_param_group({"params": [*model[4].parameters(), *model[7].parameters()]})
    loss_of(model).backward()
    optimizer.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda neurons: pickle.loads(pickle.dumps(neurons))])
def test_copied_neurons_can_be_detached(copied: Callable[[Any], Any]) -> None:
    _, optimizer = frozen("0")
    copied(optimizer.neurons).detach()


def test_several_optimizers_of_a_model_get_all_gradients() -> None:
    model, optimizer = frozen("0", "4")
    second = NPC(model, lr=0.05, delta=0.9999).load_importance(None)
    for one in (optimizer, second):
        one.zero_grad()
    loss_of(model).backward()
    assert model[0].weight.grad.any() and model[4].weight.grad.any()
    second.step()
    del second, one
    gc.collect()
    steps(model, optimizer, 6)
    assert rests(model)
