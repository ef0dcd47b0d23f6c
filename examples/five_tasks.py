"""Five tasks in a row, each with its own head, learned with NPC or SGD.

Run `python -m examples.five_tasks` in a checkout. It needs `pip install scikit-learn`.
"""

import argparse

import torch
from torch import Tensor, nn

from examples.digits import accuracy, batches, digits
from npc_ext import NPC

TASKS, STEPS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)], 300


class Network(nn.Module):
    """A body that all tasks share, and a head of two outputs for each task."""

    def __init__(self) -> None:
        super().__init__()
        hidden = nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU()
        self.body = nn.Sequential(nn.Flatten(), *hidden)
        self.heads = nn.ModuleList(nn.Linear(100, 2) for _ in TASKS)

    def forward(self, images: Tensor, task: int) -> Tensor:
        outputs: Tensor = self.heads[task](self.body(images))  # (B, 1, 8, 8) to (B, 2)
        return outputs


def learn(method: str, lr: float, seed: int) -> list[list[float]]:
    """Learns the tasks in turn. Returns the accuracies of all tasks so far."""
    torch.manual_seed(seed)
    model = Network()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    if method == "npc":
        layers = {"heads.*": {"protect": False}}  # later tasks give heads no gradients
        optimizer = NPC(model, lr=lr, half_life=STEPS, layers=layers)
    accuracies = []
    for task, pair in enumerate(TASKS):
        for images, labels in batches(digits(pair)[0], STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images, task), labels % 2).backward()
            optimizer.step()
        tests = enumerate(digits(pair)[1] for pair in TASKS[: task + 1])
        accuracies.append([accuracy(model(x, t), y % 2) for t, (x, y) in tests])
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.five_tasks")
    parser.add_argument("--optimizer", choices=("npc", "sgd"), default="npc")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = learn(options.optimizer, options.lr, options.seed)
    print("after learning       0, 1   2, 3   4, 5   6, 7   8, 9")
    for (a, b), row in zip(TASKS, rows, strict=True):
        print(f"digits {a} and {b}    " + "".join(f"{share:7.1%}" for share in row))
    print(f"average in the end: {sum(rows[-1]) / len(TASKS):.1%}")
