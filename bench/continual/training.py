"""Learning tasks in a row: the protocol of the paper, and what is measured on the way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .tasks import Task


@dataclass
class Run:
    """What learning a sequence of tasks came to.

    `accuracy[t][k]` is the accuracy on task k after task t; `seconds_per_step` the mean of training steps alone.
    """

    accuracy: list[list[float]]
    steps: int
    seconds_per_step: float


def learn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tasks: Sequence[Task],
    *,
    epochs: int,
    batch_size: int,
    label: str,
    generator: torch.Generator,
) -> Run:
    """Trains on one task after the other, `epochs` passes each, and tests on all tasks after each of them.

    The loss is the cross-entropy over the outputs of the task's own classes (task-incremental learning).
    """
    accuracy: list[list[float]] = []
    steps, seconds = 0, 0.0
    with tqdm(total=len(tasks) * epochs, desc=label, unit="epoch", leave=False, dynamic_ncols=True) as bar:
        for number, task in enumerate(tasks, start=1):
            for _ in range(epochs):
                started = time.perf_counter()
                batches = torch.randperm(len(task.train_labels), generator=generator).split(batch_size)
                loss = sum(_step(model, optimizer, task, batch) for batch in batches) / len(batches)
                seconds += time.perf_counter() - started
                steps += len(batches)
                so_far = _average([test(model, task)])
                bar.set_postfix_str(f"task {number}/{len(tasks)}, loss {loss:.3f}, accuracy {so_far:.1%}")
                bar.update()
            accuracy.append([test(model, other) for other in tasks])
            bar.write(
                f"{label}: after task {number} of {len(tasks)}, average accuracy of the tasks so far "
                f"{_average(accuracy[-1][:number]):.1%}"
            )
    return Run(accuracy, steps, seconds / steps)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, batch: Tensor) -> float:
    """One training step; returns the loss."""
    optimizer.zero_grad()
    loss = F.cross_entropy(
        _task_outputs(model, task.train_images[batch], task), _task_labels(task.train_labels[batch], task)
    )
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def test(model: nn.Module, task: Task) -> float:
    """The share of test images that are classified right among their own task's classes."""
    training = model.training
    model.eval()
    right = _task_outputs(model, task.test_images, task).argmax(1) == _task_labels(task.test_labels, task)
    model.train(training)
    return right.double().mean().item()


def _task_outputs(model: nn.Module, images: Tensor, task: Task) -> Tensor:
    return model(images)[:, list(task.classes)]


def _task_labels(labels: Tensor, task: Task) -> Tensor:
    return torch.searchsorted(torch.tensor(task.classes), labels)


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
