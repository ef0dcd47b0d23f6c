"""NPCAdamW: AdamW where nothing is important, the wrapper's steps where something is, and frozen means frozen."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npc_ext import NPC, NPCAdamW, PlasticityWrapper
from npc_ext.kernels import launch, native
from npc_ext.skipping import certificate, forward

from .. import training
from ..models import normalized_cnn
from ..tolerances import TRAJECTORY
from ..training import images, set_importance, weights

PLASTIC = 1e9  # a beta that nothing reaches


def network() -> nn.Sequential:
    return normalized_cnn(16, 32)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    """Takes a step for each seed; images have the dtype of the model."""
    dtype = next(model.parameters()).dtype
    training.train(model, optimizer, ((x.to(dtype), y) for x, y in map(images, seeds)))


def everything(model: nn.Module, optimizer: Any) -> list[Tensor]:
    states = [value for p in model.parameters() for value in optimizer.state[p].values()]
    return [*weights(model), *(value.clone() for value in states)]


def close(got: nn.Module, want: nn.Module) -> bool:
    pairs = zip(got.parameters(), want.parameters(), strict=True)
    return all((p - q).norm() <= TRAJECTORY * q.norm() for p, q in pairs)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("maximize", [False, True])
def test_where_nothing_is_important_it_is_adamw(backend: str, maximize: bool) -> None:
    ours, theirs = network().double(), network().double()
    options: dict[str, Any] = {"lr": 2e-3, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1, "maximize": maximize}
    optimizers = [
        NPCAdamW(ours, **options, beta=PLASTIC, backend=backend),
        torch.optim.AdamW(theirs.parameters(), **options),
    ]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        train(model, optimizer, range(50))
    assert close(ours, theirs)


def test_it_takes_the_steps_of_a_wrapped_adamw() -> None:
    """With partly protected neurons, of which none is frozen: there the wrapper's moments follow gradients."""
    ours, theirs = network().double(), network().double()
    constants: dict[str, Any] = {"alpha": 0.5, "beta": 4.0, "delta": 0.99}
    optimizer = NPCAdamW(ours, lr=1e-3, **constants)
    wrapped = PlasticityWrapper(torch.optim.AdamW(theirs.parameters(), lr=1e-3), theirs, **constants)
    train(ours, optimizer, range(60))
    train(theirs, wrapped, range(60))
    rates = torch.cat([layer.learning_rate for layer in optimizer.plasticity().values()]) / 1e-3
    assert bool((rates < 0.9).any()) and bool((rates > 0).all()) and float(rates.max()) <= 1
    assert close(ours, theirs)


def test_frozen_neurons_and_their_moments_stay_bit_identical() -> None:
    model = network()
    optimizer = NPCAdamW(model, lr=1e-2, weight_decay=0.5, delta=0.9999, skip_frozen=False)
    train(model, optimizer, range(3))
    key = optimizer.neurons["5"].parameters[0].parameter
    set_importance(optimizer, "5", 3.0, neurons=slice(20))
    names = ("exp_avg", "exp_avg_sq")
    before = [model[5].weight.detach().clone(), *(optimizer.state[key][name].clone() for name in names)]
    train(model, optimizer, range(3, 10))
    after = [model[5].weight.detach(), *(optimizer.state[key][name] for name in names)]
    for was, now in zip(before, after, strict=True):
        assert torch.equal(was[:20], now[:20]) and not torch.equal(was[20:], now[20:])


def test_gradients_of_frozen_neurons_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "FEWEST_STEPS_BETWEEN_ISSUES", 2)
    monkeypatch.setattr(certificate, "MOST_STEPS_BETWEEN_ISSUES", 2)
    monkeypatch.setattr(forward, "skipping_pays", lambda *arguments: True)
    models = []
    for skip_frozen in (False, True):
        model = network().double()
        optimizer = NPCAdamW(model, lr=1e-3, delta=0.9999, skip_frozen=skip_frozen)
        for name, rows in (("0", 16), ("5", 20)):
            set_importance(optimizer, name, 3.0, neurons=slice(rows))
        train(model, optimizer, range(20))
        models.append(model)
    assert optimizer.plasticity()["0"].gradients_skipped == 1.0
    assert optimizer.plasticity()["5"].gradients_skipped > 0
    assert close(*models)


def test_a_resumed_run_has_forgotten_nothing() -> None:
    model = network()
    optimizer = NPCAdamW(model, lr=1e-3, delta=0.9)
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(5, 10))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network()
    resumed.load_state_dict(saved["model"])
    other = NPCAdamW(resumed)
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, range(5, 10))
    assert all(map(torch.equal, everything(model, optimizer), everything(resumed, other)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alike(copied: Any) -> None:
    model = network()
    optimizer = NPCAdamW(model, lr=1e-3, delta=0.9)
    train(model, optimizer, range(3))
    twin, other = copied((model, optimizer))
    train(model, optimizer, range(3, 6))
    train(twin, other, range(3, 6))
    assert all(map(torch.equal, everything(model, optimizer), everything(twin, other)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_moments_and_importance_in_float32(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    optimizer = NPCAdamW(model, lr=1e-3)
    train(model, optimizer, range(3))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter in model.parameters():
        assert {value.dtype for value in optimizer.state[parameter].values()} == {torch.float32}


def test_old_data_at_a_rate_of_zero_are_measured_and_move_nothing() -> None:
    model = network()
    before = weights(model)
    optimizer = NPCAdamW(model, lr=0.0, delta=0.9)
    train(model, optimizer, range(20))
    assert all(map(torch.equal, before, model.parameters()))
    assert all(layer.importance.mean() > 0.8 for layer in optimizer.plasticity().values())
    for group in optimizer.param_groups:
        group.update(lr=1e-3, delta=0.99)
    train(model, optimizer, range(20, 23))
    frozen = optimizer.plasticity()["5"].importance >= 0.5
    moved = (model[5].weight != before[4]).any(1)
    assert bool(frozen.any()) and not bool((moved & frozen).any()) and bool(moved.any())


def test_new_heads_begin_with_a_step_count_of_their_own() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
            self.heads = nn.ModuleList([nn.Linear(16, 3)])

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.heads[-1](self.body(x))
            return output

    model = Heads()
    optimizer = NPCAdamW(model, lr=1e-3)
    train(model, optimizer, range(3))
    model.heads.append(nn.Linear(16, 3))
    optimizer.add_param_group({"params": model.heads[1].parameters(), "lr": 1e-2})
    train(model, optimizer, range(3, 5))
    assert [
        int(optimizer.state[p]["step"]) for p in (model.body[1].weight, model.heads[0].weight, model.heads[1].weight)
    ] == [5, 3, 2]
    assert optimizer.neurons["heads.1"].neurons == 3


@pytest.mark.parametrize("kind", ["NPC", "NPCAdamW", "wrapped"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_schedule_changes_rates_and_plans_nothing_again(kind: str, as_tensor: bool) -> None:
    """The numbers are those of the plain PyTorch reference, whose steps plan nothing."""

    def make(model: nn.Module, backend: Any) -> Any:
        options: dict[str, Any] = {"delta": 0.9, "backend": backend}
        lr: Any = torch.tensor(1e-2) if as_tensor else 1e-2
        if kind == "wrapped":
            return PlasticityWrapper(torch.optim.SGD(model.parameters(), lr=lr), model, **options)
        return NPC(model, lr=lr, **options) if kind == "NPC" else NPCAdamW(model, lr=lr, **options)

    models, planned = [], []
    for backend in ("native", "reference"):
        model = network()
        optimizer = make(model, backend)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        for seed in range(10):
            train(model, optimizer, range(seed, seed + 1))
            scheduler.step()
            planned.append(getattr(optimizer, "_tracker", optimizer)._plans[0])
        model[0].bias = None  # before the norm its gradient is rounding alone, which Adam blows up
        models.append(model)
    assert all(plan is planned[1] for plan in planned[2:10])  # the first step makes state
    assert close(*models)


@pytest.mark.skipif(native.status().module is None, reason="the compiled kernels are missing")
def test_a_step_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = NPCAdamW(model)
    train(model, optimizer, range(2))
    launched, usual = list[str](), launch._launch

    def counted(kernel: str, *arguments: Any) -> None:
        launched.append(kernel)
        usual(kernel, *arguments)

    monkeypatch.setattr(launch, "_launch", counted)
    train(model, optimizer, range(2, 3))
    assert launched == ["importance"] * 3 + ["adam_update"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); expected two numbers in \[0, 1\)"),
        ({"betas": ("a", "b")}, r"betas is \('a', 'b'\); expected two numbers in \[0, 1\)"),
        ({"betas": 0.9}, r"betas is 0.9; expected two numbers in \[0, 1\)"),
        ({"eps": -1.0}, "eps is -1.0; expected a finite number of at least 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"delta": 1.0}, "delta is 1.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NPCAdamW(network(), **options)


def test_another_optimizers_state_is_refused_before_anything_changes() -> None:
    model = network()
    optimizer = NPCAdamW(model, lr=1e-3)
    train(model, optimizer, range(2))
    before = everything(model, optimizer)
    others: list[Any] = [NPC(network()), torch.optim.AdamW(network().parameters())]
    for other in others:
        with pytest.raises(ValueError, match=r"saved by another optimizer|saved for another architecture"):
            optimizer.load_state_dict(other.state_dict())
    assert all(map(torch.equal, before, everything(model, optimizer)))
