"""NPCAdamW: AdamW where nothing is important, the wrapper's steps where something is, and frozen means frozen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from npc_ext import NPC, NPCAdamW
from npc_ext.kernels import launch, native
from npc_ext.skipping import certificate, forward

from ..methods import wrapped_adamw
from ..models import ManyHeads, normalized_cnn
from ..training import close, everything, images, refused, same, set_importance, train, weights

PLASTIC = 1e9  # a beta that nothing reaches


def network() -> nn.Sequential:
    return normalized_cnn(16, 32)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    """Takes a step for each seed; images have the dtype of the model."""
    dtype = next(model.parameters()).dtype
    train(model, optimizer, ((x.to(dtype), y) for x, y in map(images, seeds)))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("maximize", [False, True])
def test_where_nothing_is_important_it_is_adamw(backend: str, maximize: bool) -> None:
    ours, theirs = network().double(), network().double()
    options = {"lr": 2e-3, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1, "maximize": maximize}
    learn(ours, NPCAdamW(ours, **options, beta=PLASTIC, backend=backend), range(50))
    learn(theirs, torch.optim.AdamW(theirs.parameters(), **options), range(50))
    assert close(ours, theirs)


def test_it_takes_the_steps_of_a_wrapped_adamw() -> None:
    """With partly protected neurons, of which none is frozen: there the wrapper's moments follow gradients."""
    ours, theirs = network().double(), network().double()
    constants = {"lr": 1e-3, "alpha": 0.5, "beta": 4.0, "delta": 0.99}
    optimizer, wrapped = NPCAdamW(ours, **constants), wrapped_adamw(theirs, **constants)
    learn(ours, optimizer, range(60))
    learn(theirs, wrapped, range(60))
    rates = torch.cat([layer.learning_rate for layer in optimizer.plasticity().values()]) / 1e-3
    assert bool((rates < 0.9).any()) and bool((rates > 0).all()) and float(rates.max()) <= 1
    assert close(ours, theirs)


def test_frozen_neurons_and_their_moments_stay_bit_identical() -> None:
    model = network()
    optimizer = NPCAdamW(model, lr=1e-2, weight_decay=0.5, delta=0.9999, skip_gradients="none")
    learn(model, optimizer, range(3))
    set_importance(optimizer, "5", 3.0, neurons=slice(20))
    before = everything(model, optimizer)
    learn(model, optimizer, range(3, 10))
    after = everything(model, optimizer)
    for name in ("5.weight ", "5.weight exp_avg", "5.weight exp_avg_sq"):
        assert torch.equal(before[name][:20], after[name][:20])
        assert not torch.equal(before[name][20:], after[name][20:])


def test_gradients_of_frozen_neurons_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "FEWEST_STEPS_BETWEEN_ISSUES", 2)
    monkeypatch.setattr(certificate, "MOST_STEPS_BETWEEN_ISSUES", 2)
    monkeypatch.setattr(forward, "skipping_pays", lambda *arguments: True)
    models = []
    for skip_gradients in ("none", "rows"):
        model = network().double()
        optimizer = NPCAdamW(model, lr=1e-3, delta=0.9999, skip_gradients=skip_gradients)
        for name, rows in (("0", 16), ("5", 20)):
            set_importance(optimizer, name, 3.0, neurons=slice(rows))
        learn(model, optimizer, range(20))
        models.append(model)
    assert optimizer.plasticity()["0"].gradients_skipped == 1.0
    assert optimizer.plasticity()["5"].gradients_skipped > 0
    assert close(*models)


def test_old_data_at_a_rate_of_zero_are_measured_and_move_nothing() -> None:
    model = network()
    before = weights(model)
    optimizer = NPCAdamW(model, lr=0.0, delta=0.9)
    learn(model, optimizer, range(20))
    assert same(before, model)
    assert all(layer.importance.mean() > 0.8 for layer in optimizer.plasticity().values())
    for group in optimizer.param_groups:
        group.update(lr=1e-3, delta=0.99)
    learn(model, optimizer, range(20, 23))
    frozen = optimizer.plasticity()["5"].importance >= 0.5
    moved = (model[5].weight != before[4]).any(1)
    assert bool(frozen.any()) and not bool((moved & frozen).any()) and bool(moved.any())


def test_new_heads_begin_with_a_step_count_of_their_own() -> None:
    model, data = ManyHeads(heads=1), [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))]
    optimizer = NPCAdamW(model, lr=1e-3)
    train(partial(model, task=0), optimizer, 3 * data)
    model.heads.append(nn.Linear(16, 3))
    optimizer.add_param_group({"params": model.heads[1].parameters(), "lr": 1e-2})
    train(partial(model, task=1), optimizer, 2 * data)
    layers = model.features[0], *model.heads
    assert [int(optimizer.state[layer.weight]["step"]) for layer in layers] == [5, 3, 2]
    assert optimizer.neurons["heads.1"].neurons == 3


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "one cycle, with momentum or betas": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-2, total_steps=11
    ),
}


@pytest.mark.parametrize("kind", [NPC, NPCAdamW, wrapped_adamw])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_changes_numbers_and_plans_nothing_again(kind: Any, as_tensor: bool, schedule: str) -> None:
    """The weights are those of the plain PyTorch reference, which plans every step again here."""
    models, planned = [], []
    for backend in ("native", "reference"):
        model = network()
        optimizer = kind(model, lr=torch.tensor(1e-2) if as_tensor else 1e-2, delta=0.9, backend=backend)
        scheduler = SCHEDULES[schedule](optimizer)
        for seed in range(10):
            plans = getattr(optimizer, "_tracker", optimizer)
            if backend == "reference":
                plans._forget_plans()
            learn(model, optimizer, range(seed, seed + 1))
            scheduler.step()
            optimizer.param_groups[0]["weight_decay"] += 0.01
            planned.append(plans._plans[0])
        model[0].bias = None  # before the norm its gradient is rounding alone, which Adam blows up
        models.append(model)
    assert all(plan is planned[1] for plan in planned[2:10])  # the first step makes state
    assert close(*models)


@pytest.mark.skipif(native.status().module is None, reason="the compiled kernels are missing")
def test_a_step_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = NPCAdamW(model)
    learn(model, optimizer, range(2))
    launched, usual = list[str](), launch._launch

    def counted(kernel: str, *arguments: Any) -> None:
        launched.append(kernel)
        usual(kernel, *arguments)

    monkeypatch.setattr(launch, "_launch", counted)
    learn(model, optimizer, range(2, 3))
    assert launched == ["importance"] * 3 + ["adam_update"]


def test_another_optimizers_state_is_refused_before_anything_changes() -> None:
    model = network()
    optimizer = NPCAdamW(model, lr=1e-3)
    learn(model, optimizer, range(2))
    for other in (NPC(network()), torch.optim.AdamW(network().parameters())):
        with refused(
            model,
            optimizer,
            ValueError,
            r"another optimizer than NPCAdamW(, or another version,)? saved it|saved for another architecture",
        ):
            optimizer.load_state_dict(other.state_dict())


def test_a_momentum_in_a_group_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"has the key 'momentum', .*: the first number of betas takes its place"):
        NPCAdamW(model, params=[{"params": [*model.parameters()], "momentum": 0.9}])
