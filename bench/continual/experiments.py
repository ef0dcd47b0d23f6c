"""The experiments: their data sets and tasks, and the network and protocol that learn them.

The paper leaves batch size and class order open; they are fields of `Protocol`, so that every run records them. Size
"paper" has the paper's network and length. Size "small" takes about a minute on one processor core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..networks import cnn
from . import datasets
from .tasks import Task
from .training import Augmentation

SIZES = ("small", "paper")
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Protocol:
    """How an experiment is run.

    Attributes:
        channels, hidden: widths of the convolutions and of the hidden layer.
        epochs: number of epochs per task.
        epoch_samples: samples in an epoch; 0: as many as the training set of the task's data set has.
        batch_size: samples in every step.
        tasks: number of tasks to learn; 0: all.
        train_samples, test_samples: maximum number of samples of a task; 0: all.
        shrink: images are averaged over squares of this many pixels.
        class_order: seed of the permutation of classes; -1: no permutation.
        datasets: names of the data sets that are available.
        validation: test on samples held out of the training set, never on test samples.
        batches: "whole": samples left over in an epoch begin the next one. In older records "cut": the last batch of
            each epoch was smaller. Runs cannot choose it.
    """

    channels: tuple[int, ...] = (128, 512, 256)
    hidden: int = 512
    epochs: int = 30
    epoch_samples: int = 0
    batch_size: int = 256
    tasks: int = 0
    train_samples: int = 0
    test_samples: int = 0
    shrink: int = 1
    class_order: int = -1
    datasets: tuple[str, ...] = ()
    validation: bool = False
    batches: str = "whole"

    def __post_init__(self) -> None:
        """Raises ValueError if a field is invalid; the message is one sentence."""
        for name in ("hidden", "epochs", "batch_size", "shrink"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("epoch_samples", "tasks", "train_samples", "test_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1, or 0 for all")
        if self.batches != "whole":
            raise ValueError(f"batches is {self.batches!r}; runs train in whole batches only")
        if not all(isinstance(width, int) and width > 0 for width in self.channels):
            raise ValueError(f"channels is {list(self.channels)}; expected widths of at least 1")


@dataclass(frozen=True)
class Experiment:
    """A sequence of tasks: all classes of the data sets, one data set after the other, `classes_per_task` at a time.

    Attributes:
        title: title in the report.
        datasets: names for `datasets.load`.
        classes_per_task: number of classes in a task; 0: all classes of a data set are one task.
        side: width and height in pixels to which images are padded.
        augmentation: augmentation of images of that size.
        small: protocol of size "small".
        paper: protocol of size "paper".
        published: average accuracy after the last task in the paper, by method.
    """

    title: str
    datasets: tuple[str, ...]
    classes_per_task: int
    small: Protocol
    paper: Protocol = field(default_factory=Protocol)
    side: int = 32
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(padding=4))
    published: dict[str, float] = field(default_factory=dict)


_SMALL = Protocol(
    channels=(32, 64, 64), hidden=256, epochs=4, epoch_samples=2500, batch_size=32, train_samples=6000, shrink=2
)
# Trained only as long as on iFashion-MNIST, even a fresh network per task stays at 99.0 %.
_MNIST = replace(_SMALL, epochs=8, batch_size=16)
_CIFAR = replace(_SMALL, epochs=8, tasks=5)
_WITH_FLIPS = Augmentation(padding=4, flip=True)
EXPERIMENTS = {
    "idigits": Experiment(
        "Digits (8x8), 5 tasks of 2 classes",
        ("digits",),
        2,
        Protocol(channels=(16, 32), hidden=64, epochs=30, epoch_samples=280, batch_size=16),
        Protocol(channels=(16, 32), hidden=64, batch_size=16),
        side=8,
        augmentation=Augmentation(),
    ),
    "imnist": Experiment("iMNIST, 5 tasks of 2 classes", ("mnist",), 2, _MNIST, published={"npc": 0.9963}),
    "ifashion": Experiment("iFashion-MNIST, 5 tasks of 2 classes", ("fashion",), 2, _SMALL),
    "icifar100": Experiment(
        "iCIFAR100, tasks of 10 classes", ("cifar100",), 10, _CIFAR, augmentation=_WITH_FLIPS, published={"npc": 0.7243}
    ),
    "hetero": Experiment(
        "Heterogeneous sequence: MNIST, Fashion-MNIST, EMNIST, smallNORB",
        ("mnist", "fashion", "emnist", "smallnorb"),
        0,
        replace(_SMALL, train_samples=10000, test_samples=5000),
    ),
    "activation": Experiment(
        "Change of the hidden layer's activations over task 2 of iCIFAR100",
        ("cifar100",),
        10,
        replace(_CIFAR, tasks=2),
        Protocol(tasks=2),
        augmentation=_WITH_FLIPS,
    ),
}


def available(experiment: Experiment, folder: str | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """The experiment's data sets that are there or can be fetched, and the error for each of the others."""
    missing = {}
    for name in experiment.datasets:
        try:
            load(name, folder)
        except datasets.DatasetError as error:
            missing[name] = str(error)
    return tuple(name for name in experiment.datasets if name not in missing), missing


def tasks_of(experiment: Experiment, protocol: Protocol, folder: str | None) -> list[Task]:
    """The tasks. Labels are indices of the network's outputs: the first task has the first ones, and so on.

    Raises:
        DatasetError: a data set that the protocol names is missing or damaged.
    """
    tasks: list[Task] = []
    outputs = 0
    for name in protocol.datasets:
        data = load(name, folder)
        train_images, train_labels = _resized(data.train_images, experiment.side, protocol.shrink), data.train_labels
        if protocol.validation:
            held_out = torch.rand(len(train_labels), generator=torch.Generator().manual_seed(0)) < VALIDATION_SHARE
            test_images, test_labels = train_images[held_out], train_labels[held_out]
            train_images, train_labels = train_images[~held_out], train_labels[~held_out]
        else:
            test_images, test_labels = _resized(data.test_images, experiment.side, protocol.shrink), data.test_labels
        pixels = train_images.float().transpose(0, 1).flatten(1)
        mean, std = (value.view(1, -1, 1, 1) for value in (pixels.mean(1), pixels.std(1)))
        order = torch.unique(train_labels)
        if protocol.class_order >= 0:
            order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(protocol.class_order))]
        for classes in order.split(experiment.classes_per_task or len(order)):
            numbers = range(outputs, outputs + len(classes))
            position = torch.empty(int(order.max()) + 1, dtype=torch.int64)
            position[classes] = torch.tensor(numbers)
            train = _some_of(train_labels, classes, protocol.train_samples)
            test = _some_of(test_labels, classes, protocol.test_samples)
            of_train = train_images[train], position[train_labels[train]]
            of_test = test_images[test], position[test_labels[test]]
            title = _name(classes) if experiment.classes_per_task else data.name
            tasks.append(Task(tuple(numbers), *of_train, *of_test, mean, std, name=title))
            outputs += len(classes)
    return tasks[: protocol.tasks or None]


def epoch_samples(protocol: Protocol, experiment: Experiment, task: Task, folder: str | None) -> int:
    """Samples in an epoch of a task: the protocol's, or as many as the training set of the task's data set has."""
    if protocol.epoch_samples:
        return protocol.epoch_samples
    whole = load(protocol.datasets[0], folder) if experiment.classes_per_task else task
    return len(whole.train_labels)


def network(experiment: Experiment, protocol: Protocol, tasks: Sequence[Task]) -> nn.Sequential:
    """The network of the experiment, with one output for each class of all tasks."""
    channels, side = tasks[0].train_images.shape[1:3]
    return cnn(channels, side, protocol.channels, protocol.hidden, tasks[-1].classes[-1] + 1)


def augmentation(experiment: Experiment, protocol: Protocol) -> Augmentation:
    """The experiment's augmentation for images of the protocol's size."""
    return replace(experiment.augmentation, padding=experiment.augmentation.padding // protocol.shrink)


@cache
def load(name: str, folder: str | None) -> datasets.Dataset:
    """A data set, read once per process."""
    return datasets.load(name, Path(folder) if folder else None)


def _name(classes: Tensor) -> str:
    labels = classes.tolist()
    if len(labels) <= 3 or labels != list(range(labels[0], labels[0] + len(labels))):
        return ", ".join(map(str, labels))
    return f"{labels[0]} to {labels[-1]}"


def _resized(images: Tensor, side: int, shrink: int) -> Tensor:
    """Images (B, C, H, W) uint8, padded with black to (side, side) and then shrunk."""
    before = (side - images.shape[2]) // 2
    after = side - images.shape[2] - before
    padded = F.pad(images, (before, after, before, after))
    return padded if shrink == 1 else datasets.averaged(padded, shrink)


def _some_of(labels: Tensor, classes: Tensor, most: int) -> Tensor:
    """Indices of the samples of some classes: all, or a random subset of `most`, which is always the same."""
    indices = torch.isin(labels, classes).nonzero().flatten()
    if not most or most >= len(indices):
        return indices
    return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:most]]
