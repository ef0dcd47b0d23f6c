"""NPC as an optimizer: its equations, torch.optim.SGD's behavior, and neurons that freeze."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import npc_ext
from bench.networks import cnn
from npc_ext import CPC, NPC, NPCAdamW, PlasticityWrapper, reference
from npc_ext.neurons.tap import TapHook

from ..methods import ALL_OPTIONS, METHODS, wrapped_adamw
from ..models import ManyHeads, ResNet, paper_cnn, transposed_and_not
from ..tolerances import TRAJECTORY
from ..training import batches, importances, refused, same, set_importance, train, weights

# --------------------------------------------------------------------------------------------------------- trajectory


class Exact:
    """NPC in float64 from the equations of reference.py, for the paper's networks."""

    def __init__(self, model: nn.Module, o: dict[str, Any]) -> None:
        convolutions = [name for name, _ in model.named_children() if name.startswith("conv")]
        self.measured_behind = [name.replace("conv", "pool") for name in convolutions] + ["relu", "output"]
        self.layers = [getattr(model, name) for name in [*convolutions, "hidden", "output"]]
        self.average = [torch.zeros(layer.weight.shape[0], dtype=torch.double) for layer in self.layers]
        self.weights = [p.detach().double().clone() for p in model.parameters()]
        self.velocity = [torch.zeros_like(p) for p in self.weights]
        self.options = o

    def backward(self, model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
        """Runs the model forward and backward, and returns the activations with their gradients, layer by layer."""
        model.zero_grad()
        kept: dict[str, Tensor] = {}
        for name, module in model.named_children():
            x = module(x)
            if name in self.measured_behind:
                x.retain_grad()
                kept[name] = x
        F.cross_entropy(x, y).backward()
        return [kept[name] for name in self.measured_behind]

    def step(self, activations: list[Tensor], gradients: list[Tensor]) -> None:
        o = self.options
        sgd = (o.get("momentum", 0.0), o.get("nesterov", False), o.get("weight_decay", 0.0))
        for index, n in enumerate(activations):
            measured = reference.importance(n.detach().double(), n.grad.double())
            active = ~reference.received_no_gradient(measured) if o.get("normalize") == "active" else measured >= 0
            normalized = reference.normalize(measured, o.get("normalize") == "active")
            before = self.average[index]
            average = reference.moving_average(before, normalized, o["delta"])
            self.average[index] = average = torch.where(active, average, before)
            constants = (o["alpha"], o["beta"], o.get("sigma", "sigmoid"))
            eta = torch.where(active, reference.learning_rate(average, o["lr"], *constants), 0)
            froze = active & (eta == 0) & (reference.plasticity(before, *constants) > 0)
            for k in (2 * index, 2 * index + 1):  # weight and bias
                shaped = eta.view(-1, *[1] * (self.weights[k].ndim - 1))
                gradient = gradients[k].double()
                velocity = self.velocity[k] if o.get("momentum") else None
                reference.descend_(self.weights[k], gradient, velocity, shaped, shaped == 0, *sgd)
                if velocity is not None:
                    velocity[froze] = 0


def exact_trajectory(model: nn.Module, data: list[tuple[Tensor, Tensor]], o: dict[str, Any]) -> list[Tensor]:
    """Forward, backward and step in float64."""
    exact = Exact(model.double(), o)
    for x, y in data:
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), exact.weights, strict=True):
                parameter.copy_(weight)
        activations = exact.backward(model, x.double(), y)
        exact.step(activations, [p.grad for p in model.parameters()])
    return exact.weights


def assert_followed(model: nn.Module, exact: list[Tensor], before: list[Tensor]) -> None:
    for got, want, start in zip(weights(model), exact, before, strict=True):
        assert (got.double() - want).norm() / want.norm() < TRAJECTORY
        # It did go somewhere, apart from biases that a normalization cancels.
        assert got.ndim == 1 or (got - start).norm() / want.norm() > 100 * TRAJECTORY


THE_PAPERS = {"lr": 0.1, "alpha": 0.5, "beta": 0.5, "delta": 0.98}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("options", [THE_PAPERS, ALL_OPTIONS], ids=["paper's", "all options"])
def test_100_steps_stay_with_the_equations_in_float64(options: dict[str, Any], backend: str) -> None:
    model, data = paper_cnn(), batches(100)
    want = exact_trajectory(copy.deepcopy(model), data, options)
    optimizer = NPC(model, **options, backend=backend)
    before = weights(model)
    train(model, optimizer, data)
    assert any(layer.frozen > 0.1 for layer in optimizer.plasticity().values())
    assert_followed(model, want, before)


@pytest.mark.slow
def test_100_steps_on_the_papers_network_stay_with_the_equations_in_float64() -> None:
    """Both see the same activations and gradients, those of the float32 network.

    Separate forward and backward passes would measure something else: in so large a network rounding decides some
    maxima and signs, and plain SGD in float32 is 1e-2 away from plain SGD in float64 after 20 steps.
    """
    model = cnn(3, 32, (128, 512, 256), 512, 100, dropout=0.0)
    exact, optimizer = Exact(model, THE_PAPERS), NPC(model, backend="native", **THE_PAPERS)
    before = weights(model)
    for _ in range(100):
        activations = exact.backward(model, torch.randn(2, 3, 32, 32), torch.randint(100, (2,)))
        exact.step(activations, [p.grad for p in model.parameters()])
        optimizer.step()
    assert_followed(model, exact.weights, before)
    assert any(layer.frozen > 0.5 for layer in optimizer.plasticity().values())


def test_same_seed_same_bits() -> None:
    def run() -> nn.Module:
        torch.manual_seed(3)
        model = paper_cnn(dropout=0.2)
        return train(model, NPC(model, **ALL_OPTIONS), batches(20))

    assert same(run(), run())


# -------------------------------------------------------------------------------------------------- as torch.optim.SGD


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, {"weight_decay": 0.1, "maximize": True}], ids=str)  # fmt: skip
def test_with_nothing_frozen_it_is_sgd(options: dict[str, Any]) -> None:
    model, data = paper_cnn(), batches(10)
    twin = copy.deepcopy(model)
    train(model, NPC(model, lr=0.01, beta=1e9, **options), data)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.01, **options), data)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-4, atol=1e-6)


def test_frozen_neurons_stay_bit_identical_under_momentum_nesterov_and_weight_decay() -> None:
    model, data = paper_cnn(), batches(40)
    optimizer = NPC(model, delta=0.8, momentum=0.9, nesterov=True, weight_decay=0.01)
    train(model, optimizer, data[:20])
    for batch in data[20:]:
        before = copy.deepcopy(model.state_dict())
        train(model, optimizer, [batch])
        for name, layer in optimizer.plasticity().items():
            frozen = layer.learning_rate == 0
            for tensor in (f"{name}.weight", f"{name}.bias"):
                assert torch.equal(model.state_dict()[tensor][frozen], before[tensor][frozen])
    assert max(layer.frozen for layer in optimizer.plasticity().values()) > 0.3


def test_closures_are_evaluated_and_their_loss_returned() -> None:
    model, (x, y) = paper_cnn(), batches(1)[0]
    optimizer, before = NPC(model), weights(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert not same(model, before)


# -------------------------------------------------------------------------------------- gradients that are not there


def test_parameters_without_gradient_and_their_neurons_are_untouched() -> None:
    model, data = ManyHeads(), [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))]
    optimizer = NPC(model, lr=0.1, delta=0.5)
    train(partial(model, task=0), optimizer, data)
    before, kept = weights(model.heads[0]), optimizer.plasticity()["heads.0"].importance
    train(partial(model, task=1), optimizer, data)
    assert same(model.heads[0], before)
    assert torch.equal(optimizer.plasticity()["heads.0"].importance, kept)
    assert optimizer.plasticity()["heads.1"].importance.any()


def test_a_head_added_after_two_tasks_is_found_and_what_was_learned_is_kept() -> None:
    model, data = ManyHeads(), [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))]
    optimizer = NPC(model, delta=0.9)
    for task in (0, 1):
        train(partial(model, task=task), optimizer, data)
    kept = importances(optimizer)
    model.heads.append(nn.Linear(16, 3))
    optimizer.add_param_group({"params": model.heads[2].parameters(), "lr": 0.02})
    assert same(importances(optimizer)[:3], kept)
    assert not optimizer.plasticity()["heads.2"].importance.any()
    before = weights(model.heads[2])
    train(partial(model, task=2), optimizer, data)
    assert not same(model.heads[2], before)
    assert optimizer.plasticity()["heads.2"].importance.any()
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert sum(isinstance(hook, TapHook) for hook in hooks) == len(optimizer.neurons)


def test_frozen_layers_neither_change_nor_disturb() -> None:
    model = paper_cnn()
    model.conv1.requires_grad_(False)
    optimizer, before = NPC(model, weight_decay=0.1, momentum=0.9), weights(model.conv1)
    train(model, optimizer, batches(3))
    assert same(model.conv1, before)
    assert not optimizer.plasticity()["conv1"].importance.any()


# -------------------------------------------------------------------------------------- precision, clipping, memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [partial(NPC, momentum=0.9), NPCAdamW], ids=["NPC", "NPCAdamW"])
def test_half_precision_has_importance_and_adams_moments_in_float32_also_through_a_state_dict(
    make: Any, dtype: torch.dtype
) -> None:
    model = paper_cnn().to(dtype)
    optimizer = make(model)
    train(model, optimizer, [(x.to(dtype), y) for x, y in batches(3)])
    other = make(copy.deepcopy(model))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for state, loaded in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert same(state, loaded)
        assert {value.dtype for name, value in loaded.items() if name != "momentum_buffer"} <= {torch.float32}
    assert not torch.equal(importances(other)[0].to(dtype).float(), importances(other)[0])


def test_loading_copies_importance() -> None:
    model = paper_cnn()
    optimizer = NPC(model, delta=0.5)
    train(model, optimizer, batches(1))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    kept = state["state"][0]["importance"].clone()
    train(model, optimizer, batches(2))
    assert torch.equal(state["state"][0]["importance"], kept)


def test_gradient_clipping_does_not_see_importance() -> None:
    model, (x, y) = paper_cnn(), batches(1)[0]
    plain = copy.deepcopy(model)
    NPC(model)
    for network in (model, plain):
        F.cross_entropy(network(x), y).backward()
    norms = [nn.utils.clip_grad_norm_(network.parameters(), 0.1) for network in (model, plain)]
    assert torch.equal(*norms)


def test_state_is_four_bytes_per_neuron() -> None:
    model = ResNet()
    optimizer = NPC(model)
    train(model, optimizer, 2 * [(torch.randn(2, 3, 6, 6), torch.tensor([0, 1]))])
    held = [value for state in optimizer.state.values() for value in state.values()]
    neurons = sum(layer.neurons for layer in optimizer.neurons)
    assert sum(value.numel() * value.element_size() for value in held) == 4 * neurons


def test_a_cleared_state_starts_from_zero() -> None:
    model, data, twin = paper_cnn(), batches(4), paper_cnn()
    optimizer = NPC(model, delta=0.5, momentum=0.9)
    train(model, optimizer, data[:2])
    optimizer.state.clear()
    twin.load_state_dict(model.state_dict())
    fresh = NPC(twin, delta=0.5, momentum=0.9)
    assert same(train(model, optimizer, data[2:]), train(twin, fresh, data[2:]))


def test_a_learning_rate_tensor_may_be_changed_in_place() -> None:
    model, data = paper_cnn(), batches(2)
    optimizer = NPC(model, lr=torch.tensor(0.1))
    train(model, optimizer, data[:1])
    optimizer.param_groups[0]["lr"].zero_()
    before = weights(model)
    train(model, optimizer, data[1:])
    assert same(model, before)


def test_channels_last_models_train_alike() -> None:
    model, data = paper_cnn(), batches(10)
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    train(model, NPC(model, **ALL_OPTIONS), data)
    train(twin, NPC(twin, **ALL_OPTIONS), data)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------- neurons that freeze


def head_of_two_tasks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))


def learn(model: nn.Sequential, optimizer: Any, task: int, steps: int = 60, device: str = "cpu") -> None:
    """Trains the two outputs of a task, with the loss on them alone."""
    for seed in range(steps):
        x = torch.randn(32, 12, generator=torch.Generator().manual_seed(100 * task + seed)) + task
        y = (x.sum(1) > 12 * task).long()
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(device))[:, 2 * task : 2 * task + 2], y.to(device)).backward()
        optimizer.step()


IN_TURN: dict[str, Any] = {
    "NPC": partial(NPC, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, delta=0.98),
    "NPCAdamW": partial(NPCAdamW, lr=0.01, weight_decay=0.1, delta=0.98),
    "PlasticityWrapper": partial(wrapped_adamw, delta=0.98),
}


@pytest.mark.parametrize(
    ("backend", "device"),
    [("native", "cpu"), ("reference", "cpu"), pytest.param("native", "cuda", marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("kind", IN_TURN)
def test_rows_of_an_old_task_do_not_move_while_another_is_learned(kind: str, backend: str, device: str) -> None:
    model = head_of_two_tasks().to(device)
    optimizer = IN_TURN[kind](model, layers={"2": {"normalize": "active"}}, backend=backend)
    learn(model, optimizer, 0, device=device)
    rows, bias = model[2].weight[:2].detach().clone(), model[2].bias[:2].detach().clone()
    importance = optimizer.plasticity()["2"].importance
    assert importance[:2].min() > 0 and not importance[2:].any()
    learn(model, optimizer, 1, device=device)
    assert torch.equal(model[2].weight[:2], rows) and torch.equal(model[2].bias[:2], bias)
    after = optimizer.plasticity()["2"].importance
    assert torch.equal(after[:2], importance[:2]) and after[2:].min() > 0
    learn(model, optimizer, 0, steps=1, device=device)
    assert not torch.equal(model[2].weight[:2], rows) or bool((after[:2] >= 0.5).all())


@pytest.mark.parametrize("kind", IN_TURN)
def test_an_output_layer_that_begins_at_zero_trains_among_the_active(kind: str) -> None:
    model = head_of_two_tasks()
    for parameter in model[2].parameters():
        nn.init.zeros_(parameter)
    optimizer = IN_TURN[kind](model, layers={"2": {"normalize": "active"}})
    learn(model, optimizer, 0, steps=1)  # its importance is 0, because its outputs are
    assert model[2].weight[:2].any() and not model[2].weight[2:].any()


MOMENTS: dict[str, Any] = {
    "NPC": partial(NPC, lr=0.1, momentum=0.9),
    "NPCAdamW": partial(NPCAdamW, lr=0.01, weight_decay=0.0),
    "CPC": partial(CPC, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("kind", ["NPC", "NPCAdamW"])
def test_a_neuron_that_froze_is_not_moved_by_old_moments_when_it_thaws(kind: str) -> None:
    model = head_of_two_tasks()
    optimizer = MOMENTS[kind](model, delta=0.8)
    learn(model, optimizer, 0)
    assert optimizer.plasticity()["2"].importance[:2].min() > 0.5, "frozen"
    rows = model[2].weight[:2].detach().clone()
    learn(model, optimizer, 1)
    assert optimizer.plasticity()["2"].importance[:2].max() < 0.05, "thawed: the mean is over all neurons here"
    assert torch.equal(model[2].weight[:2], rows)


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("by", ["beta", "loading", "momentum", "replaced importance", "replaced moment"])
def test_first_moments_are_cleared_also_where_no_step_saw_a_neuron_freeze(kind: str, by: str) -> None:
    model, moment = head_of_two_tasks(), "exp_avg" if kind == "NPCAdamW" else "momentum_buffer"
    optimizer = MOMENTS[kind](model, delta=0.8, beta=1e3)
    learn(model, optimizer, 0, steps=20)
    if by == "loading":
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["beta"] = 1.0
        optimizer.load_state_dict(saved)
    else:
        optimizer.param_groups[0]["beta"] = 1.0
    state = optimizer.state[model[0].weight]
    if by.startswith("replaced"):  # after the moments were cleared for that beta
        learn(model, optimizer, 0, steps=1)
        name = "importance" if by == "replaced importance" else moment
        state[name] = state[name].flip(0).contiguous()
    if by == "momentum" and kind != "NPCAdamW":  # with its buffers out of sight
        optimizer.param_groups[0]["momentum"] = 0.0
        learn(model, optimizer, 0, steps=20)
        optimizer.param_groups[0]["momentum"] = 0.9
    learn(model, optimizer, 0, steps=1)
    state = optimizer.state[model[0].weight]
    frozen = state["importance"] >= 1
    assert frozen.any()
    assert not state[moment][frozen].any()
    assert state[moment][~frozen].any()


@pytest.mark.parametrize("kind", ["NPC", "NPCAdamW"])
def test_a_step_that_raises_clears_no_first_moments(kind: str) -> None:
    model = head_of_two_tasks()
    optimizer = MOMENTS[kind](model, beta=1e3)
    learn(model, optimizer, 0, steps=3)
    optimizer.param_groups[0]["beta"] = 1e-6
    optimizer.zero_grad()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with refused(model, optimizer, RuntimeError, "no importance was measured"):
        optimizer.step()


def test_a_schedule_of_rates_or_momentum_clears_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = head_of_two_tasks()
    optimizer = NPC(model, lr=0.1, momentum=0.9, delta=0.9)
    learn(model, optimizer, 0, steps=3)
    monkeypatch.setattr(Tensor, "masked_fill_", lambda *_: pytest.fail("moments were cleared again"))
    for step in range(3):
        optimizer.param_groups[0].update(lr=0.1 / (step + 1), momentum=0.9 - 0.1 * step)
        learn(model, optimizer, 0, steps=2)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("method", ["NPC, all options", "NPCAdamW", "PlasticityWrapper"])
def test_transposed_linear_layers_train_as_linear_ones_and_frozen_columns_stay(method: str, backend: str) -> None:
    ours, usual = transposed_and_not()
    optimizer, other = (METHODS[method](model, backend=backend) for model in (ours, usual))
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(30)]
    for model, its_optimizer in ((ours, optimizer), (usual, other)):
        train(model, its_optimizer, data[:10])
        for layer in its_optimizer.neurons:
            set_importance(its_optimizer, layer.name, 9.0, neurons=slice(layer.neurons // 2))
        train(model, its_optimizer, data[10:11])  # the step in which they freeze still moves them
    columns = {layer.name: half(layer) for layer in optimizer.neurons}
    for model, its_optimizer in ((ours, optimizer), (usual, other)):
        train(model, its_optimizer, data[11:])
    for p, q in zip(ours.parameters(), usual.parameters(), strict=True):
        torch.testing.assert_close(p if p.ndim == 1 else p.t(), q, rtol=1e-4, atol=1e-5)
    for layer in optimizer.neurons:
        assert same(half(layer), columns[layer.name])
        if layer.name in ("0", "2") and not isinstance(optimizer, PlasticityWrapper):
            assert "it is of type Conv1D" in layer.note


def half(layer: Any) -> list[Tensor]:
    """What belongs to the first half of a layer's neurons."""
    return [p.parameter.detach().narrow(p.dim, 0, layer.neurons // 2).clone() for p in layer.parameters]


def test_training_on_a_second_task_leaves_important_neurons_alone() -> None:
    model = paper_cnn()
    optimizer = NPC(model, delta=0.98)
    train(model, optimizer, batches(100, seed=1))
    before, rates = model.hidden.weight.clone(), optimizer.plasticity()["hidden"].learning_rate
    train(model, optimizer, batches(20, seed=2))
    moved = (model.hidden.weight - before).norm(dim=1)
    assert moved[rates == 0].mean() < 0.1 * moved[rates == rates.max()].mean()


@pytest.mark.gpu
def test_training_on_a_gpu_follows_the_cpu() -> None:
    model, data = paper_cnn(), batches(20)
    twin = copy.deepcopy(model).cuda()
    train(model, NPC(model, **ALL_OPTIONS), data)
    train(twin, NPC(twin, **ALL_OPTIONS), [(x.cuda(), y.cuda()) for x, y in data])
    torch.testing.assert_close(weights(model), weights(twin.cpu()), rtol=1e-2, atol=1e-3)


def test_a_star_import_brings_classes_and_functions_and_hides_nothing_of_torch() -> None:
    names: dict[str, Any] = {}
    exec("from torch import nn, optim\nfrom npc_ext import *", names)
    assert names["nn"] is nn
    assert names["NPC"] is NPC
    public = [name for name in names if not name.startswith("_") and name not in ("nn", "optim")]
    assert sorted(public) == sorted(npc_ext.__all__)
    assert all(callable(names[name]) for name in public)
    assert npc_ext.nn.ReLU is not nn.ReLU
    assert {"baselines", "nn", "ops", "reference"} <= set(dir(npc_ext))
