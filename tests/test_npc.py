"""What the optimizer owes its user."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import npc_ext
from bench.networks import cnn
from npc_ext import CPC, NPC, ImportanceWarning, PlasticityWrapper, _native, reference
from npc_ext.tap import TapHook

from .models import ManyHeads, ResNet, paper_cnn
from .tolerances import TRAJECTORY

ALL_OPTIONS: dict[str, Any] = {
    "lr": 0.08,
    "alpha": 0.04,
    "beta": 0.45,
    "delta": 0.97,
    "momentum": 0.8,
    "nesterov": True,
    "weight_decay": 1e-3,
    "sigma": "erf",
    "normalize": "active",
}


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator))
        for _ in range(count)
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> nn.Module:
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(a: nn.Module | list[Tensor], b: nn.Module | list[Tensor]) -> bool:
    pairs = zip(*(weights(m) if isinstance(m, nn.Module) else m for m in (a, b)), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def importances(optimizer: NPC) -> list[Tensor]:
    return [layer.importance for layer in optimizer.plasticity().values()]


# --------------------------------------------------------------------------------------------------------- trajectory


class Exact:
    """NPC in float64 from the equations of reference.py, for the paper's networks, written out here."""

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
            normalized = reference.normalize(measured, o.get("normalize") == "active")
            self.average[index] = reference.moving_average(self.average[index], normalized, o["delta"])
            constants = (o["alpha"], o["beta"], o.get("sigma", "sigmoid"))
            eta = reference.learning_rate(self.average[index], o["lr"], *constants)
            for k in (2 * index, 2 * index + 1):  # weight and bias
                shaped = eta.view(-1, *[1] * (self.weights[k].ndim - 1))
                gradient = gradients[k].double()
                reference.descend_(self.weights[k], gradient, self.velocity[k], shaped, shaped == 0, *sgd)


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


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    "options", [{"lr": 0.1, "alpha": 0.05, "beta": 0.5, "delta": 0.98}, ALL_OPTIONS], ids=["paper's", "all options"]
)
def test_100_steps_stay_with_the_equations_in_float64(options: dict[str, Any], backend: str) -> None:
    model, data = paper_cnn(), batches(100)
    want = exact_trajectory(copy.deepcopy(model), data, options)
    optimizer = NPC(model, **options, backend=backend)  # type: ignore[arg-type]
    before = weights(model)
    train(model, optimizer, data)
    assert any(layer.frozen > 0.1 for layer in optimizer.plasticity().values())
    for got, exact, start in zip(weights(model), want, before, strict=True):
        difference = (got.double() - exact).norm() / exact.norm()
        assert difference < TRAJECTORY
        # It did go somewhere, apart from biases that a normalization cancels.
        assert got.ndim == 1 or (got - start).norm() / exact.norm() > 100 * TRAJECTORY


def test_100_steps_on_the_papers_own_network_stay_with_the_equations_in_float64() -> None:
    """Both see the same activations and gradients, those of the float32 network.

    Forward and backward passes of their own would measure something else: in so large a network rounding decides some
    maxima and signs, and plain SGD in float32 is 1e-2 away from plain SGD in float64 after 20 steps.
    """
    model = cnn(3, 32, (128, 512, 256), 512, 100, dropout=0.0)
    options = {"lr": 0.1, "alpha": 0.05, "beta": 0.5, "delta": 0.98}
    exact, optimizer = Exact(model, options), NPC(model, backend="native", **options)
    before = weights(model)
    for _ in range(100):
        activations = exact.backward(model, torch.randn(2, 3, 32, 32), torch.randint(100, (2,)))
        exact.step(activations, [p.grad for p in model.parameters()])
        optimizer.step()
    for got, want, start in zip(weights(model), exact.weights, before, strict=True):
        assert (got.double() - want).norm() / want.norm() < TRAJECTORY
        assert got.ndim == 1 or (got - start).norm() / want.norm() > 100 * TRAJECTORY
    assert any(layer.frozen > 0.5 for layer in optimizer.plasticity().values())


def test_same_seed_same_bits() -> None:
    def run() -> nn.Module:
        torch.manual_seed(3)
        model = paper_cnn(dropout=0.2)
        return train(model, NPC(model, **ALL_OPTIONS), batches(20))

    assert same(run(), run())


@pytest.mark.parametrize("options", [{"delta": 0.9}, ALL_OPTIONS], ids=["plain", "all options"])
def test_a_run_resumed_from_a_checkpoint_is_bit_identical(options: dict[str, Any]) -> None:
    model, data = paper_cnn(), batches(20)
    twin = copy.deepcopy(model)
    optimizer = NPC(model, **options)
    train(model, optimizer, data)
    half = NPC(twin, **options)
    train(twin, half, data[:10])
    file = io.BytesIO()
    torch.save({"model": twin.state_dict(), "optimizer": half.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(99)
    resumed = paper_cnn()
    resumed.load_state_dict(saved["model"])
    late = NPC(resumed)
    late.load_state_dict(saved["optimizer"])
    train(resumed, late, data[10:])
    assert same(resumed, model)
    assert all(map(torch.equal, importances(late), importances(optimizer)))


# -------------------------------------------------------------------------------------------------- as torch.optim.SGD


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, {"weight_decay": 0.1, "maximize": True}], ids=str)  # fmt: skip
def test_with_nothing_frozen_it_is_sgd(options: dict[str, Any]) -> None:
    model, data = paper_cnn(), batches(10)
    twin = copy.deepcopy(model)
    train(model, NPC(model, lr=0.01, beta=1e9, **options), data)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.01, **options), data)
    for mine, theirs in zip(weights(model), weights(twin), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_frozen_neurons_stay_bit_identical_under_momentum_nesterov_and_weight_decay() -> None:
    model, data = paper_cnn(), batches(40)
    optimizer = NPC(model, delta=0.8, momentum=0.9, nesterov=True, weight_decay=0.01)
    train(model, optimizer, data[:20])
    for x, y in data[20:]:
        before = {
            name: (m.weight.clone(), m.bias.clone())
            for name, m in model.named_children()
            if hasattr(m, "weight") and m.weight is not None
        }
        train(model, optimizer, [(x, y)])
        for name, layer in optimizer.plasticity().items():
            frozen = layer.learning_rate == 0
            assert torch.equal(getattr(model, name).weight[frozen], before[name][0][frozen])
            assert torch.equal(getattr(model, name).bias[frozen], before[name][1][frozen])
    assert max(layer.frozen for layer in optimizer.plasticity().values()) > 0.3


def test_param_groups_give_parameters_rates_and_options_of_their_own() -> None:
    model, data = paper_cnn(), batches(1)
    groups = [
        {"params": [p for n, p in model.named_parameters() if not n.startswith("output")], "lr": 0.0},
        {"params": model.output.parameters(), "weight_decay": 0.1},
    ]
    before = weights(model)
    train(model, NPC(model, lr=0.05, params=groups), data)
    changed = [not torch.equal(a, b) for a, b in zip(weights(model), before, strict=True)]
    assert changed == [False] * 6 + [True] * 2


def test_named_parameters_can_be_given_as_to_any_torch_optimizer() -> None:
    model = paper_cnn()
    optimizer = NPC(model, params=model.named_parameters())
    assert optimizer.param_groups[0]["param_names"][0] == "conv1.weight"
    train(model, optimizer, batches(1))


def test_learning_rate_schedulers_move_the_largest_rate() -> None:
    model, data = paper_cnn(), batches(3)
    optimizer = NPC(model, lr=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    for x, y in data:
        train(model, optimizer, [(x, y)])
        assert optimizer.plasticity()["conv1"].learning_rate.max() == pytest.approx(scheduler.get_last_lr()[0])
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


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


def test_step_hooks_are_called() -> None:
    model, called = paper_cnn(), []
    optimizer = NPC(model)
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    train(model, optimizer, batches(1))
    assert called == ["before", "after"]


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_of_model_and_optimizer_go_on_like_the_originals(twin_of: Any) -> None:
    model, data = paper_cnn(), batches(6)
    optimizer = NPC(model, **ALL_OPTIONS)
    train(model, optimizer, data[:3])
    model_2, optimizer_2 = twin_of((model, optimizer))
    train(model, optimizer, data[3:])
    train(model_2, optimizer_2, data[3:])
    assert same(model, model_2)
    assert all(map(torch.equal, importances(optimizer), importances(optimizer_2)))


# ------------------------------------------------------------------------------------- gradients that are not there


def test_parameters_without_gradient_and_their_neurons_are_untouched() -> None:
    model = ManyHeads()
    optimizer = NPC(model, lr=0.1, delta=0.5)
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    F.cross_entropy(model(x, 0), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    before, kept = weights(model.heads[0]), optimizer.plasticity()["heads.0"].importance
    F.cross_entropy(model(x, 1), y).backward()
    optimizer.step()
    assert same(model.heads[0], before)
    assert torch.equal(optimizer.plasticity()["heads.0"].importance, kept)
    assert optimizer.plasticity()["heads.1"].importance.any()


def test_a_head_added_after_two_tasks_is_found_and_what_was_learned_is_kept() -> None:
    model = ManyHeads(heads=2)
    optimizer = NPC(model, delta=0.9)
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    for task in (0, 1):
        optimizer.zero_grad()
        F.cross_entropy(model(x, task), y).backward()
        optimizer.step()
    kept = importances(optimizer)
    model.heads.append(nn.Linear(16, 3))
    optimizer.add_param_group({"params": model.heads[2].parameters(), "lr": 0.02})
    assert all(map(torch.equal, importances(optimizer)[:3], kept))
    assert not optimizer.plasticity()["heads.2"].importance.any()
    before = weights(model.heads[2])
    optimizer.zero_grad()
    F.cross_entropy(model(x, 2), y).backward()
    optimizer.step()
    assert not same(model.heads[2], before)
    assert optimizer.plasticity()["heads.2"].importance.any()
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert sum(isinstance(hook, TapHook) for hook in hooks) == len(optimizer.neurons)


def test_gradient_accumulation_moves_the_average_once() -> None:
    model, (x, y) = paper_cnn(), batches(1)[0]
    twin = copy.deepcopy(model)
    whole, parts = NPC(model, delta=0.5), NPC(twin, delta=0.5)
    F.cross_entropy(model(x), y, reduction="sum").backward()
    for half in (slice(0, 4), slice(4, 8)):
        F.cross_entropy(twin(x[half]), y[half], reduction="sum").backward()
    whole.step()
    parts.step()
    for one, other in zip(importances(whole), importances(parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_importance_does_not_outlive_its_step_even_if_only_the_model_clears_gradients() -> None:
    model, data = paper_cnn(), batches(5)
    twin = copy.deepcopy(model)
    optimizer = NPC(twin, **ALL_OPTIONS)
    for x, y in data:
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()
    assert same(train(model, NPC(model, **ALL_OPTIONS), data), twin)


def test_frozen_layers_neither_change_nor_disturb() -> None:
    model = paper_cnn()
    model.conv1.requires_grad_(False)
    optimizer, before = NPC(model, weight_decay=0.1, momentum=0.9), weights(model.conv1)
    train(model, optimizer, batches(3))
    assert same(model.conv1, before)
    assert not optimizer.plasticity()["conv1"].importance.any()


# -------------------------------------------------------------------------------------------- precision, clipping, memory


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_skips_a_step_with_overflow_and_leaves_nothing_behind(unscale: bool) -> None:
    model, data = paper_cnn(), batches(4)
    twin = copy.deepcopy(model)
    optimizer, plain = NPC(model, **ALL_OPTIONS), NPC(twin, **ALL_OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for index, (x, y) in enumerate(data):
        model.zero_grad()  # not the optimizer's, so that stale importance would show
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if index == 1:
            model.conv1.weight.grad[0] = torch.inf
            before, kept = weights(model), importances(optimizer)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if index == 1:
            assert same(model, before)
            assert all(map(torch.equal, importances(optimizer), kept))
            assert all(layer.sink.grad is None for layer in optimizer.neurons)
    train(twin, plain, [data[0], *data[2:]])
    for mine, theirs in zip(weights(model), weights(twin), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_importance_is_float32_for_bfloat16_models_also_through_a_state_dict() -> None:
    model = paper_cnn().bfloat16()
    optimizer = NPC(model, momentum=0.9)
    train(model, optimizer, [(x.bfloat16(), y) for x, y in batches(3)])
    state = optimizer.state_dict()
    twin = NPC(copy.deepcopy(model), momentum=0.9)
    twin.load_state_dict(state)
    for mine, theirs in zip(importances(optimizer), importances(twin), strict=True):
        assert theirs.dtype == torch.float32
        assert torch.equal(mine, theirs)
    assert importances(optimizer)[0].bfloat16().float().ne(importances(optimizer)[0]).any()


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
    x = torch.randn(2, 3, 6, 6)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values()]
    assert sum(value.numel() * value.element_size() for value in held) == 4 * sum(
        layer.neurons for layer in optimizer.neurons
    )


def test_a_cleared_state_starts_anew() -> None:
    model, data = paper_cnn(), batches(4)
    optimizer = NPC(model, delta=0.5, momentum=0.9)
    train(model, optimizer, data[:2])
    optimizer.state.clear()
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._forward_hooks.clear()
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
    for mine, theirs in zip(weights(model), weights(twin), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_memory_format_may_change_after_the_optimizer_was_built() -> None:
    model = paper_cnn()
    optimizer = NPC(model, momentum=0.9)
    train(model, optimizer, batches(2))
    model.to(memory_format=torch.channels_last)
    train(model, optimizer, batches(2))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# ---------------------------------------------------------------------------------------------- options of the method


def test_options_of_single_layers_by_name_and_pattern() -> None:
    model = paper_cnn()
    optimizer = NPC(
        model, layers={"conv*": {"delta": 0.5}, "output": {"normalize": "active", "beta": 0.7, "sigma": "erf"}}
    )
    assert optimizer.constants("conv2")["delta"] == 0.5
    assert optimizer.constants("hidden")["delta"] == 1 - 2e-4
    assert (optimizer.constants("output")["normalize"], optimizer.constants("output")["beta"]) == ("active", 0.7)
    assert (
        str(NPC(paper_cnn(), layers={"conv1": {"measure_at": "norm1"}}).neurons["conv1"].points[0]) == "output of norm1"
    )


def test_active_normalization_leaves_inactive_outputs_out_of_the_mean() -> None:
    model, (x, y) = paper_cnn(), batches(1)[0]
    optimizer = NPC(model, delta=0.0, layers={"output": {"normalize": "active"}})
    F.cross_entropy(model(x)[:, :2], y % 2).backward()
    optimizer.step()
    importance = optimizer.plasticity()["output"].importance
    assert importance[2:].tolist() == [0] * 8
    assert importance.sum().item() == pytest.approx(2)


def test_a_layer_can_be_left_unconsolidated() -> None:
    model = paper_cnn()
    optimizer = NPC(model, delta=0.0, layers={"output": {"consolidate": False}})
    before = weights(model.output)
    train(model, optimizer, batches(3))
    assert set(optimizer.plasticity()) == {"conv1", "conv2", "hidden"}
    assert not same(model.output, before)


@pytest.mark.parametrize(("others", "moves"), [("train", True), ("freeze", False)])
def test_parameters_outside_neurons_train_at_plain_rate_or_not_at_all(others: Any, moves: bool) -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 3))
    optimizer, before = NPC(model, others=others), weights(model[0])
    F.cross_entropy(model(torch.randint(7, (5, 2))), torch.randint(3, (5,))).backward()
    optimizer.step()
    assert same(model[0], before) != moves


def test_training_on_a_second_task_leaves_important_neurons_alone() -> None:
    model = paper_cnn()
    optimizer = NPC(model, delta=0.98)
    train(model, optimizer, batches(100, seed=1))
    before, rates = model.hidden.weight.clone(), optimizer.plasticity()["hidden"].learning_rate
    train(model, optimizer, batches(20, seed=2))
    moved = (model.hidden.weight - before).norm(dim=1)
    assert moved[rates == 0].mean() < 0.1 * moved[rates == rates.max()].mean()


# ----------------------------------------------------------------------------------------------------- what goes wrong


def raising(error: type[Exception], message: str, model: Any = None, **options: Any) -> None:
    with pytest.raises(error, match=message):
        NPC(paper_cnn() if model is None else model, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr is -0.1; expected a finite number of at least 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"alpha": 0}, "alpha is 0; expected a finite number above 0"),
        ({"beta": -1}, "beta is -1; expected a finite number above 0"),
        ({"delta": 1.0}, r"delta is 1.0; expected a number in \[0, 1\)"),
        ({"delta": -0.1}, "delta is -0.1"),
        ({"momentum": -0.9}, "momentum is -0.9"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"nesterov": True}, "nesterov is on, but momentum is 0.0"),
        ({"sigma": "relu"}, "sigma is 'relu'; expected one of 'sigmoid', 'tanh', 'erf'"),
        ({"normalize": "some"}, "normalize is 'some'; expected one of 'all', 'active'"),
        ({"others": "drop"}, "others is 'drop'; expected one of 'train', 'freeze'"),
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of 'auto', 'native', 'reference'"),
        ({"layers": {"conv7": {}}}, "layers names 'conv7', but the model's layers are conv1, conv2, hidden, output"),
        ({"layers": {"conv1": {"lr": 1}}}, r"layers\['conv1'\] has the option 'lr'; expected alpha, beta"),
        ({"layers": {"conv1": {"delta": 2}}}, r"layers\['conv1'\]: delta is 2"),
        ({"layers": {"conv1": {"measure_at": "pool9"}}}, "measure_at names 'pool9', which is not in the model"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    raising(ValueError, message, **options)


def test_parameters_instead_of_a_model_are_refused_with_the_right_call() -> None:
    raising(
        TypeError, r"NPC takes the model itself, got generator; write NPC\(model, lr=...\)", paper_cnn().parameters()
    )


def test_a_model_without_neurons_is_refused() -> None:
    raising(ValueError, r"the model \(Embedding\) has no neurons", nn.Embedding(3, 4))


def test_complex_parameters_are_refused() -> None:
    raising(ValueError, "complex", nn.Linear(2, 2, dtype=torch.cfloat))


def test_sparse_gradients_are_refused_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    optimizer = NPC(model)
    F.cross_entropy(model(torch.randint(7, (5, 2))), torch.randint(3, (5,))).backward()
    before = weights(model)
    with pytest.raises(ValueError, match=r"the gradient of '0.weight' is sparse; expected a dense one.*sparse=False"):
        optimizer.step()
    assert same(model, before)
    assert not any(layer.importance.any() for layer in optimizer.plasticity().values())


def test_a_step_without_any_measured_importance_raises_and_says_how_to_fix_it() -> None:
    model, (x, y) = paper_cnn(), batches(1)[0]
    optimizer = NPC(model)
    model.eval()
    F.cross_entropy(model(x), y).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"no importance was measured.*call model.train\(\)"):
        optimizer.step()
    assert same(model, before)
    model.train()
    for module in model.modules():
        module._forward_hooks.clear()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="keep its hooks"):
        optimizer.step()


def test_a_single_layer_that_was_not_measured_is_reported_once() -> None:
    model, data = paper_cnn(), batches(2)
    optimizer = NPC(model)
    model.pool1._forward_hooks.clear()
    with pytest.warns(ImportanceWarning, match="layer 'conv1' received gradients, but its importance was not measured"):
        train(model, optimizer, data[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, data[1:])


def test_importance_that_is_not_finite_is_left_out_counted_and_reported_once() -> None:
    model, (x, y) = paper_cnn(), batches(1)[0]
    optimizer = NPC(model, lr=0.0)
    for expectation in (
        pytest.warns(ImportanceWarning, match="layer 'conv1' was measured with an importance that is not finite"),
        warnings.catch_warnings(),
    ):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.neurons["conv1"].sink.grad[0] = torch.nan
        with expectation:
            optimizer.step()
    assert optimizer.plasticity()["conv1"].skipped == 2
    assert not optimizer.plasticity()["conv1"].importance.any()
    assert optimizer.plasticity()["conv2"].importance.any()


def test_state_dicts_of_other_architectures_are_refused_before_any_change() -> None:
    optimizer = NPC(paper_cnn(), lr=0.3)
    wide, deep = NPC(paper_cnn(channels=(9, 16))), NPC(paper_cnn(channels=(8, 16, 4)))
    with pytest.raises(ValueError, match=r"importance for layer 'conv1' has shape \(9,\), expected \(8,\)"):
        optimizer.load_state_dict(wide.state_dict())
    with pytest.raises(ValueError, match=r"parameter groups of \[10\] parameters, this optimizer has \[8\]"):
        optimizer.load_state_dict(deep.state_dict())
    with pytest.raises(
        ValueError, match="the state dict has no importance; it was saved by another optimizer than NPC"
    ):
        optimizer.load_state_dict(torch.optim.SGD(paper_cnn().parameters(), lr=0.1).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_a_parameter_given_twice_or_a_bad_late_group_changes_nothing() -> None:
    model = paper_cnn()
    optimizer = NPC(model)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": model.conv1.parameters()})
    with pytest.raises(ValueError, match="alpha is -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "alpha": -1})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, batches(1))


def test_native_backend_is_refused_with_the_fix_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = _native.Native(None, "none", "no C++ compiler; install one")
    monkeypatch.setattr(_native, "status", lambda: missing)
    _native.module.cache_clear()
    try:
        with pytest.raises(
            _native.NativeUnavailableError,
            match=r"no C\+\+ compiler; install one\nFix that, or pass backend='reference'",
        ):
            NPC(paper_cnn(), backend="native")
        model = paper_cnn()
        optimizer = NPC(model)
        with pytest.warns(RuntimeWarning, match="plain PyTorch is used instead"):
            train(model, optimizer, batches(1))
    finally:
        _native.module.cache_clear()


def test_what_is_printed_names_every_layer() -> None:
    optimizer = NPC(paper_cnn())
    assert "consolidated: 66 neurons in 4 layers" in repr(optimizer)
    for text in ("conv1", "output of pool1", "weight, bias", "fan-in"):
        assert text in str(optimizer.neurons)


def test_plasticity_can_be_drawn(tmp_path: Any) -> None:
    from npc_ext import plot_plasticity

    model = paper_cnn()
    optimizer = NPC(model, delta=0.5)
    train(model, optimizer, batches(3))
    figure = plot_plasticity(optimizer)
    assert [axes.get_title().split("\n")[0] for axes in figure.axes[:4]] == ["conv1", "conv2", "hidden", "output"]
    figure.savefig(tmp_path / "plasticity.png")
    wrapped = PlasticityWrapper(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert len(plot_plasticity(wrapped).axes) == len(figure.axes)


def test_steps_that_train_another_model_are_warned_of() -> None:
    model = paper_cnn()
    optimizer = NPC(model)
    for _ in range(9):
        optimizer.step()
    train(model, optimizer, batches(1))  # one that learns: the count begins anew
    optimizer.zero_grad()
    for _ in range(9):
        optimizer.step()
    with pytest.warns(
        ImportanceWarning, match=r"no parameter had a gradient in 10 steps in a row.*build the optimizer"
    ):
        optimizer.step()


@pytest.mark.gpu
def test_training_on_a_gpu_follows_the_cpu() -> None:
    model, data = paper_cnn(), batches(20)
    twin = copy.deepcopy(model).cuda()
    train(model, NPC(model, **ALL_OPTIONS), data)
    train(twin, NPC(twin, **ALL_OPTIONS), [(x.cuda(), y.cuda()) for x, y in data])
    for mine, theirs in zip(weights(model), weights(twin), strict=True):
        torch.testing.assert_close(mine, theirs.cpu(), rtol=1e-2, atol=1e-3)


def test_a_star_import_brings_classes_and_functions_and_hides_nothing_of_torch() -> None:
    names: dict[str, Any] = {}
    exec("from torch import nn, optim\nfrom npc_ext import *", names)
    assert names["nn"] is nn
    assert names["NPC"] is NPC
    public = [name for name in names if not name.startswith("_") and name not in ("nn", "optim")]
    assert sorted(public) == sorted(npc_ext.__all__)
    assert all(callable(names[name]) for name in public)
    assert npc_ext.nn.ReLU is not nn.ReLU
    assert {"consolidation", "nn", "ops", "reference"} <= set(dir(npc_ext))


@pytest.mark.parametrize(("kind", "units"), [(NPC, "300 neurons"), (CPC, "4200 connections")])
def test_plasticity_prints_a_line_for_each_layer(kind: Any, units: str) -> None:
    model = nn.Sequential(nn.Linear(13, 300), nn.ReLU(), nn.Linear(300, 5))
    plasticity = kind(model).plasticity()
    assert len(repr(plasticity["0"])) < 160
    assert f"({units}, 0% frozen, importance 0 to 0 (mean 0), learning rate 0.1 to 0.1" in repr(plasticity["0"])
    lines = repr(plasticity).splitlines()
    assert len(lines) == 4 and lines[1] == f"  '0': {plasticity['0']!r},"
    assert plasticity == dict(plasticity)
