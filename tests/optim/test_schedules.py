"""Learning rate schedules need no care: alpha is in units of lr, so every schedule protects as a constant rate does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedulers

from npc_ext import NPC, NPCAdamW, PlasticityWrapper, reference

from ..methods import wrapped_sgd
from ..models import paper_cnn
from ..training import batches, importances, same, set_importance, train, weights

# Makes a scheduler for a number of steps.
Schedule = Callable[[Any, int], Any]


def warm_up(optimizer: Any, steps: int) -> Any:
    """From a rate of 0."""
    return schedulers.LambdaLR(optimizer, lambda step: min(1.0, step / (steps // 4)))


def warm_up_and_cosine(optimizer: Any, steps: int) -> Any:
    """From a rate of 0 and back to it."""
    rise = schedulers.LambdaLR(optimizer, lambda step: step / (steps // 5))
    fall = schedulers.CosineAnnealingLR(optimizer, steps - steps // 5)
    return schedulers.SequentialLR(optimizer, [rise, fall], [steps // 5])


SCHEDULES: dict[str, Schedule] = {
    "constant": lambda optimizer, steps: schedulers.ConstantLR(optimizer, 1.0),
    "warm-up from 0": warm_up,
    "linear warm-up": lambda optimizer, steps: schedulers.LinearLR(optimizer, 1e-3, total_iters=steps // 4),
    "one cycle": lambda optimizer, steps: schedulers.OneCycleLR(
        optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=steps
    ),
    "cosine": lambda optimizer, steps: schedulers.CosineAnnealingLR(optimizer, steps),
    "plateau": lambda optimizer, steps: schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=steps // 20),
    "warm-up and cosine": warm_up_and_cosine,
}


def advance(scheduler: Any, loss: float = 1.0) -> None:
    """Takes a step of a scheduler. With equal losses, ReduceLROnPlateau finds a plateau."""
    scheduler.step(*([loss] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))


# Each optimizer, and the torch optimizer that moves a neuron without importance in the same way.
METHODS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "NPC": (partial(NPC, lr=0.1), partial(SGD, lr=0.1)),
    "NPC, momentum": (
        partial(NPC, lr=0.1, momentum=0.9, weight_decay=0.01),
        partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    ),
    "NPCAdamW": (partial(NPCAdamW, lr=0.01), partial(AdamW, lr=0.01)),
    "PlasticityWrapper": (wrapped_sgd, partial(SGD, lr=0.1)),
}
# Twelve neurons from no importance to twice beta: some keep the whole rate, some a part, some are frozen.
IMPORTANCE = torch.linspace(0.0, 1.0, 12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", METHODS)
def test_a_neurons_share_of_the_rate_depends_on_its_importance_only(method: str, schedule: str) -> None:
    """At each step, neuron i moves by s_i times what the plain optimizer does, whatever the schedule does to lr."""
    make, plain = METHODS[method]
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    twin = copy.deepcopy(model)
    optimizer, twins = make(model, delta=1 - 1e-9), plain(twin.parameters())  # this delta changes no importance
    set_importance(optimizer, "0", IMPORTANCE)
    shares = reference.plasticity(IMPORTANCE, alpha=0.5, beta=0.5)
    assert (shares == 1).any() and (shares == 0).any() and ((shares > 0) & (shares < 1)).any()
    scheduler, its = (SCHEDULES[schedule](each, 20) for each in (optimizer, twins))
    rates = []
    for _ in range(20):
        before = weights(model)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 6).double()), torch.randint(3, (8,))).backward()
        for mine, its_own in zip(model.parameters(), twin.parameters(), strict=True):
            its_own.data.copy_(mine.data)
            its_own.grad = mine.grad.clone()
        optimizer.step()
        twins.step()
        for after, old, free in zip(weights(model)[:2], before[:2], weights(twin)[:2], strict=True):
            share = shares.view(-1, *[1] * (old.ndim - 1))
            torch.testing.assert_close(after - old, share * (free - old), rtol=1e-5, atol=1e-12)
            assert torch.equal(after[shares == 0], old[shares == 0])
        reported = 1.0 if isinstance(optimizer, PlasticityWrapper) else rates[-1]
        assert torch.equal(optimizer.plasticity()["0"].learning_rate, reported * shares)
        advance(scheduler)
        advance(its)
    assert (len(set(rates)) > 1) == (schedule != "constant")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", METHODS)
def test_frozen_neurons_stay_bit_identical_under_every_schedule(method: str, schedule: str) -> None:
    model, data = paper_cnn(), batches(40)
    optimizer = METHODS[method][0](model, delta=0.8)
    train(model, optimizer, data[:20])
    scheduler = SCHEDULES[schedule](optimizer, 20)
    frozen = 0
    for batch in data[20:]:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train(model, optimizer, [batch])
        for name, layer in optimizer.plasticity().items():
            rows = layer.importance >= 0.5
            frozen += int(rows.sum())
            for tensor in (f"{name}.weight", f"{name}.bias"):
                assert torch.equal(model.state_dict()[tensor][rows], before[tensor][rows])
        advance(scheduler)
    assert frozen > 20 * 10


@pytest.mark.parametrize("method", METHODS)
def test_a_rate_of_0_moves_nothing_and_measures_the_same_importance(method: str) -> None:
    model, batch = paper_cnn(), batches(1)
    twin, before = copy.deepcopy(model), weights(model)
    optimizer, constant = (METHODS[method][0](each, delta=0.9) for each in (model, twin))
    scheduler = schedulers.LambdaLR(optimizer, lambda step: 0.0 if step < 5 else 1.0)
    train(twin, constant, batch)
    first = importances(constant)
    for step in range(1, 6):
        train(model, optimizer, batch)
        assert same(weights(model), before)
        for measured, once in zip(importances(optimizer), first, strict=True):
            torch.testing.assert_close(measured, once * (1 - 0.9**step) / (1 - 0.9))
        advance(scheduler)
    train(model, optimizer, batch)
    assert not same(weights(model), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_an_optimizer_with_a_scheduler_takes_its_own_steps(method: str, copied: Callable[[Any], Any]) -> None:
    model = paper_cnn()
    optimizer = METHODS[method][0](model)
    schedulers.StepLR(optimizer, 1)  # it replaces optimizer.step
    train(model, optimizer, batches(1))
    before = weights(model)
    twin, twins = copied((model, optimizer))
    train(twin, twins, batches(1, seed=1))
    assert same(weights(model), before) and not same(weights(twin), before)


# ----------------------------------------------------------------------------------------------------------- two tasks

STEPS = 200  # per task
DELTA = 0.997  # a task of these steps leaves a half of the importance of the one before
MOMENTUM: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
LEARNERS: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": lambda model: SGD(model.parameters(), **MOMENTUM),
    "NPC": lambda model: NPC(model, **MOMENTUM, beta=0.3, delta=DELTA),
    "AdamW": lambda model: AdamW(model.parameters(), lr=3e-3),
    "NPCAdamW": lambda model: NPCAdamW(model, lr=3e-3, delta=DELTA),
    "PlasticityWrapper": lambda model: PlasticityWrapper(
        SGD(model.parameters(), **MOMENTUM), model, beta=0.3, delta=DELTA
    ),
}


@cache
def two_tasks() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The handwritten digits 0 to 4, and the same with shuffled pixels: images and labels to train and to test."""
    pytest.importorskip("sklearn", reason="scikit-learn, which holds the digits, is not installed")
    from bench.continual.tasks import digits

    task, shuffled = digits(classes_per_task=5)[0], torch.randperm(64, generator=torch.Generator().manual_seed(5))
    train, test = task.train_images.flatten(1), task.test_images.flatten(1)
    return [(train[:, o], task.train_labels, test[:, o], task.test_labels) for o in (torch.arange(64), shuffled)]


@cache
def accuracies(learner: str, schedule: str, seeds: tuple[int, ...] = (0, 1)) -> tuple[float, float]:
    """Learns both tasks, with a schedule for each. The mean accuracy on the first and on the second."""
    accuracy = torch.zeros(len(seeds), 2)
    for row, seed in zip(accuracy, seeds, strict=True):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
        optimizer = LEARNERS[learner](model)
        lr = optimizer.param_groups[0]["lr"]
        for images, labels, _, _ in two_tasks():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = lr
            scheduler = SCHEDULES[schedule](optimizer, STEPS)
            for _ in range(STEPS):
                chosen = torch.randint(len(labels), (32,))
                loss = F.cross_entropy(model(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                advance(scheduler, loss.item())
        for task, (_, _, images, labels) in enumerate(two_tasks()):
            row[task] = (model(images).argmax(1) == labels).float().mean()
    first, second = accuracy.mean(0).tolist()
    return first, second


# The bounds leave room beyond what other pairs of seeds give (`accuracies(..., seeds=(2, 3))` and so on): at most 0.44 of
# the plain optimizer's errors on the first task, 0.03 less of it than with a constant rate, and 0.66 on the second task,
# where chance is 0.2. Accuracies are too coarse to show a wrong unit of alpha; the tests above show it.
@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("learner", "plain"), [("NPC", "SGD"), ("NPCAdamW", "AdamW"), ("PlasticityWrapper", "SGD")])
def test_every_schedule_keeps_the_first_task_as_well_as_a_constant_rate(
    learner: str, plain: str, schedule: str
) -> None:
    (first, second), (forgetful, _) = accuracies(learner, schedule), accuracies(plain, schedule)
    assert 1 - first < 0.6 * (1 - forgetful)
    assert first > accuracies(learner, "constant")[0] - 0.06
    assert second > 0.5
