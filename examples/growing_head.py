"""An output layer that grows from 2 to 10 outputs as classes arrive.

It is learned with NPC or SGD.

Run `python -m examples.growing_head` in the checkout.
It needs `pip install scikit-learn`.
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from examples.digits import accuracy, batches, digits
from npc_ext import NPC

TASKS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]


def grown(layer: nn.Linear) -> nn.Linear:
    """A layer with two more outputs. The first ones have the old layer's weights."""
    wider = nn.Linear(layer.in_features, layer.out_features + 2)
    with torch.no_grad():
        wider.weight[: layer.out_features] = layer.weight
        wider.bias[: layer.out_features] = layer.bias
    return wider


def evaluate(model: nn.Module, tasks: int) -> tuple[float, float]:
    """Accuracies on the first tasks: among an image's two digits, and among all."""
    with torch.no_grad():
        tests = [(digits(task)[1], task) for task in TASKS[:tasks]]
        of_two = [
            accuracy(model(test.images)[:, task], test.labels % 2)
            for test, task in tests
        ]
        of_all = [accuracy(model(test.images), test.labels) for test, _ in tests]
    return sum(of_two) / tasks, sum(of_all) / tasks


def learn(
    optimizer_name: str, lr: float = 0.1, steps: int = 300, seed: int = 0
) -> list[tuple[float, float]]:
    """Learns the digits two by two. Returns the accuracies after each pair."""
    torch.manual_seed(seed)
    body = nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU()
    head = nn.Linear(100, 2)
    model = nn.Sequential(nn.Flatten(), *body, head)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    if optimizer_name == "npc":
        # "active": outputs of earlier digits have no gradients, and take no part.
        layers = {"5": {"normalize": "active"}}
        optimizer = NPC(model, lr=lr, half_life=steps, layers=layers)
    accuracies = []
    for task, pair in enumerate(TASKS):
        if task > 0:
            head = model[5] = grown(head)
            # The new parameters begin with the old values, so NPC keeps importance.
            optimizer.param_groups[0]["params"] = list(model.parameters())
        for images, labels in batches(digits(pair)[0], steps):
            optimizer.zero_grad()
            cross_entropy(model(images)[:, pair], labels % 2).backward()
            optimizer.step()
        accuracies.append(evaluate(model, task + 1))
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m examples.growing_head", description=__doc__
    )
    parser.add_argument(
        "--optimizer", choices=("npc", "sgd"), default="npc", dest="optimizer_name"
    )
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    print("digits    which of the pair    which of all digits so far")
    for task, (of_two, of_all) in enumerate(learn(**vars(parser.parse_args()))):
        print(f"0 to {TASKS[task][1]}    {of_two:17.1%}    {of_all:26.1%}")
