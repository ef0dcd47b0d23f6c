"""A CNN that knows the digits 0 to 4 is fine-tuned to 5 to 9.

This is done with NPC, and with SGD at several learning rates.

Run `python -m examples.fine_tuning` in the checkout.
It needs `pip install scikit-learn`.
"""

import argparse
import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.digits import Samples, accuracy, batches, digits
from npc_ext import NPC

OLD, NEW = range(5), range(5, 10)


class Network(nn.Module):
    """A convolutional body, a head for the old digits, and a head for the new ones."""

    def __init__(self) -> None:
        super().__init__()
        first = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        second = (nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        third = (nn.Flatten(), nn.Linear(128, 64), nn.ReLU())
        self.body = nn.Sequential(*first, *second, *third)
        self.heads = nn.ModuleDict({"old": nn.Linear(64, 5), "new": nn.Linear(64, 5)})

    def forward(self, images: Tensor, head: str) -> Tensor:
        """(B, 1, 8, 8) to (B, 5)."""
        outputs: Tensor = self.heads[head](self.body(images))
        return outputs


def train(
    model: Network, head: str, optimizer: torch.optim.Optimizer, data: Iterable[Samples]
) -> None:
    """The same training loop for all optimizers."""
    for images, labels in data:
        optimizer.zero_grad()
        cross_entropy(model(images, head), labels % 5).backward()
        optimizer.step()


def evaluate(model: Network) -> tuple[float, float]:
    """The accuracies on the old and on the new digits, each with its head."""
    (_, old), (_, new) = digits(OLD), digits(NEW)
    with torch.no_grad():
        of_old = accuracy(model(old.images, "old"), old.labels % 5)
        return of_old, accuracy(model(new.images, "new"), new.labels % 5)


def fine_tuned(model: Network, method: str, lr: float, steps: int = 400) -> Network:
    """A copy of the model, trained on the new digits."""
    model = copy.deepcopy(model)
    if method == "NPC":
        layers = {"heads.new": {"protect": False}}
        npc = NPC(model, lr=0.0, half_life=100, momentum=0.9, layers=layers)
        # This measures importance. With lr=0, no parameter moves.
        train(model, "old", npc, batches(digits(OLD)[0], 300))
        npc.set_constants(half_life=steps)
        npc.param_groups[0]["lr"] = lr
        optimizer: torch.optim.Optimizer = npc
    else:
        trained = model.heads["new"] if method == "SGD, new head only" else model
        optimizer = torch.optim.SGD(trained.parameters(), lr=lr, momentum=0.9)
    train(model, "new", optimizer, batches(digits(NEW)[0], steps))
    return model


RUNS = [
    ("NPC", 0.03),
    ("SGD", 0.03),
    ("SGD", 0.003),
    ("SGD", 0.0003),
    ("SGD, new head only", 0.03),
]


def compare(seed: int) -> dict[str, tuple[float, float]]:
    """Accuracies on old and new digits: before fine-tuning, and after each method."""
    torch.manual_seed(seed)
    model = Network()
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    train(model, "old", adam, batches(digits(OLD)[0], 300))
    results = {"before": evaluate(model)}
    for method, lr in RUNS:
        torch.manual_seed(seed)
        results[f"{method}, lr={lr}"] = evaluate(fine_tuned(model, method, lr))
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m examples.fine_tuning", description=__doc__
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="how many runs to average (default 3)"
    )
    runs = [compare(seed) for seed in range(parser.parse_args().seeds)]
    print("accuracy on                   old digits   new digits")
    for name in runs[0]:
        old, new = (sum(run[name][part] for run in runs) / len(runs) for part in (0, 1))
        print(f"{name:28}{old:12.1%}{new:13.1%}")
