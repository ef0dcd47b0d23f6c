"""Data sets cut into tasks of a few classes each, in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """The samples of some classes: images (B, C, H, W) float32, labels (B,) int64 among `classes`."""

    classes: tuple[int, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(classes_per_task: int = 2) -> list[Task]:
    """The 1,797 handwritten digits of 8x8 pixels that ship inside scikit-learn, four fifths of them for training."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    targets = torch.tensor(labels, dtype=torch.int64)
    return split(pixels[train], targets[train], pixels[test], targets[test], classes_per_task)


def split(
    train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor, classes_per_task: int
) -> list[Task]:
    """Cuts a data set into tasks of consecutive classes."""
    tasks = []
    for classes in torch.unique(train_labels).split(classes_per_task):
        train, test = torch.isin(train_labels, classes), torch.isin(test_labels, classes)
        tasks.append(
            Task(
                tuple(classes.tolist()), train_images[train], train_labels[train], test_images[test], test_labels[test]
            )
        )
    return tasks
