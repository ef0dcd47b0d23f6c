"""NPC in Avalanche: five tasks of two digits each, with a head for every task.

Run `python -m examples.avalanche_strategy` in the checkout. It needs
`pip install avalanche-lib scikit-learn`, and a torchvision that matches torch.

>>> optimizer = NPC(model, lr=0.1)
>>> strategy = Naive(model=model, optimizer=optimizer, plugins=[PlasticityPlugin()])

The plugin keeps importance from experience to experience and registers new heads.
Without it, Avalanche changes the optimizer's groups and state in ways that NPC does not
notice.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from npc_ext import NPC

try:
    from avalanche.benchmarks import (
        CLScenario,
        benchmark_from_datasets,
        with_task_labels,
    )
    from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
    from avalanche.benchmarks.utils import _make_taskaware_classification_dataset
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.models import MultiHeadClassifier, MultiTaskModule
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive
    from sklearn.datasets import load_digits

    from npc_ext.avalanche import PlasticityPlugin
except ImportError as error:
    where = "in a separate environment, see docs/guides/avalanche.md"
    sys.exit(
        f"{error} ({where}); this example needs: pip install avalanche-lib scikit-learn"
    )

EXPERIENCES = 5


class Network(MultiTaskModule):
    """Two hidden layers, and a head of two outputs for each task, from Avalanche."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()
        )
        self.classifier = MultiHeadClassifier(128, masking=False)

    def forward(self, images: Tensor, task_labels: Any) -> Tensor:
        """(B, 64) to (B, 2), through the heads of the samples' tasks."""
        outputs: Tensor = self.classifier(self.features(images), task_labels)
        return outputs


def digits() -> CLScenario:
    """scikit-learn's digits: 0 or 1, 2 or 3, ...; every fourth image is for tests."""
    data = load_digits()
    images, labels = (
        torch.tensor(data.images, dtype=torch.float32).flatten(1) / 16,
        torch.tensor(data.target),
    )
    for_testing = torch.arange(len(images)) % 4 == 0
    streams = {}
    for name, chosen in (("train", ~for_testing), ("test", for_testing)):
        streams[name] = [
            _task(images, labels, chosen & (labels // 2 == task), task)
            for task in range(EXPERIENCES)
        ]
    return with_classes_timeline(with_task_labels(benchmark_from_datasets(**streams)))


def _task(images: Tensor, labels: Tensor, chosen: Tensor, task: int) -> Any:
    samples: Any = TensorDataset(images[chosen], labels[chosen] % 2)
    samples.targets = (labels[chosen] % 2).tolist()
    return _make_taskaware_classification_dataset(samples, task_labels=task)


def train(
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    plugins: Sequence[Any],
    epochs: int,
) -> Any:
    """Learns the tasks in turn; returns the final accuracies, and the strategy."""
    torch.manual_seed(0)
    model, benchmark = Network(), digits()
    strategy = Naive(
        model=model,
        optimizer=optimizer_of(model),
        train_mb_size=16,
        train_epochs=epochs,
        eval_mb_size=256,
        plugins=list(plugins),
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True)),
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    return list(strategy.eval(benchmark.test_stream).values()), strategy


def npc(model: nn.Module) -> NPC:
    """NPC that keeps more than half of the importance over a task (170 steps)."""
    return NPC(model, lr=0.1, half_life=230)


def main() -> None:
    """Trains with SGD and with NPC, and prints the accuracies."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.avalanche_strategy", description=__doc__
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=10,
        help="passes over the data of each task (default 10)",
    )
    epochs = parser.parse_args().epochs
    plain, _ = train(
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1), [], epochs
    )
    ours, strategy = train(npc, [PlasticityPlugin()], epochs)
    for name, accuracies in (("SGD", plain), ("NPC", ours)):
        each = ", ".join(f"{accuracy:.1%}" for accuracy in accuracies)
        print(
            f"{name}: accuracies of all tasks in the end: {each}; "
            f"average {sum(accuracies) / len(accuracies):.1%}"
        )
    print(strategy.optimizer.neurons)


if __name__ == "__main__":
    main()
