"""Data sets cut into tasks of a few classes each, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .datasets import sklearn_digits


@dataclass(frozen=True)
class Task:
    """The samples of some classes, which are adjacent outputs of the network.

    Attributes:
        classes: the outputs of the network that compete with each other, ascending and without gaps.
        train_images, test_images: (B, C, H, W), uint8 or float.
        train_labels, test_labels: (B,) int64, among `classes`.
        mean, std: (1, C, 1, 1) float32, to standardize images; (B, C, 1, 1) if training images come from several data
            sets.
        rivals: (outputs, outputs) bool, true where an output competes with the label of the row; None: all `classes`.
        name: name of the task in tables and figures.
    """

    classes: tuple[int, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor = field(default_factory=lambda: torch.zeros(1, 1, 1, 1))
    std: Tensor = field(default_factory=lambda: torch.ones(1, 1, 1, 1))
    rivals: Tensor | None = None
    name: str = ""

    @property
    def outputs(self) -> slice:
        """The slice of the network's outputs that are `classes`."""
        return slice(self.classes[0], self.classes[-1] + 1)

    def to(self, device: torch.device) -> Task:
        """The same task with all tensors on a device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **moved)


def digits(classes_per_task: int = 2) -> list[Task]:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; four fifths of them are for training."""
    pixels, labels, train, test = sklearn_digits()
    images = pixels.float() / 16
    return split(images[train], labels[train], images[test], labels[test], classes_per_task)


def split(
    train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor, classes_per_task: int
) -> list[Task]:
    """Cuts a data set into tasks of consecutive classes."""
    tasks = []
    for classes in torch.unique(train_labels).split(classes_per_task):
        train, test = torch.isin(train_labels, classes), torch.isin(test_labels, classes)
        of_train, of_test = (train_images[train], train_labels[train]), (test_images[test], test_labels[test])
        tasks.append(Task(tuple(classes.tolist()), *of_train, *of_test))
    return tasks


def joint(tasks: Sequence[Task]) -> Task:
    """Joins the training samples of all tasks. A sample still competes only with the classes of its own task."""
    classes = tuple(label for task in tasks for label in task.classes)
    rivals = torch.zeros(len(classes), len(classes), dtype=torch.bool)
    for task in tasks:
        rivals[task.outputs, task.outputs] = True

    tensors: dict[str, Any] = {"rivals": rivals.to(tasks[0].train_labels.device)}
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        tensors[name] = torch.cat([getattr(task, name) for task in tasks])
    for name in ("mean", "std"):
        tensors[name] = torch.cat([getattr(task, name).expand(len(task.train_labels), -1, 1, 1) for task in tasks])
    return Task(classes, **tensors)
