"""Five tasks in a row, each with its own head, learned with NPC or SGD.

Run it from the checkout's folder: `python -m examples.five_tasks`. It needs `pip install scikit-learn`.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.digits import accuracy, batches, digits
from npc_ext import NPC

TASKS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]


class Network(nn.Module):
    """A body that all tasks share, and a head of two outputs for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(100, 2) for _ in TASKS)

    def forward(self, images: Tensor, task: int) -> Tensor:
        """(B, 1, 8, 8) to (B, 2)."""
        outputs: Tensor = self.heads[task](self.body(images))
        return outputs


def learn(optimizer_name: str, lr: float = 0.1, steps: int = 300, seed: int = 0) -> list[list[float]]:
    """Learns the tasks in turn. Returns a row for each: the accuracies of all tasks so far."""
    torch.manual_seed(seed)
    model = Network()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    if optimizer_name == "npc":  # heads have no gradients in later tasks, so they need no protection
        optimizer = NPC(model, lr=lr, half_life=steps, layers={"heads.*": {"protect": False}})
    data = [digits(task) for task in TASKS]
    accuracies = []
    for task, (train, _) in enumerate(data):
        for images, labels in batches(train, steps):
            optimizer.zero_grad()
            cross_entropy(model(images, task), labels % 2).backward()
            optimizer.step()
        tests = [test for _, test in data[: task + 1]]
        accuracies.append([accuracy(model(test.images, t), test.labels % 2) for t, test in enumerate(tests)])
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.five_tasks", description=__doc__)
    parser.add_argument("--optimizer", choices=("npc", "sgd"), default="npc", dest="optimizer_name")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    rows = learn(**vars(parser.parse_args()))
    print("after learning       0, 1   2, 3   4, 5   6, 7   8, 9")
    for task, row in zip(TASKS, rows, strict=True):
        print(f"digits {task[0]} and {task[1]}    " + "".join(f"{share:7.1%}" for share in row))
    print(f"average in the end: {sum(rows[-1]) / len(TASKS):.1%}")
