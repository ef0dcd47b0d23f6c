"""Plasticity in TensorBoard: scalars and histograms of each layer during five tasks.

Run `python -m examples.tensorboard` in the checkout. It needs
`pip install scikit-learn tensorboard`.
"""

import argparse
import sys
from collections import OrderedDict

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from examples.digits import accuracy, batches, digits
from npc_ext import NPC, log_plasticity

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    sys.exit(f"{error}; this example needs: pip install scikit-learn tensorboard")

TASKS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]


def learn(folder: str, steps: int = 300) -> None:
    """Learns the tasks in turn, and writes plasticity and accuracies every 50 steps."""
    torch.manual_seed(0)
    modules = OrderedDict(
        flatten=nn.Flatten(),
        first=nn.Linear(64, 100),
        relu_1=nn.ReLU(),
        second=nn.Linear(100, 100),
        relu_2=nn.ReLU(),
        output=nn.Linear(100, 10),
    )
    model = nn.Sequential(modules)
    layers = {"output": {"normalize": "active"}}
    optimizer = NPC(model, lr=0.1, half_life=steps, layers=layers)
    data = [digits(task) for task in TASKS]
    with SummaryWriter(folder) as writer:
        for task, (train, _) in enumerate(data):
            for step, (images, labels) in enumerate(
                batches(train, steps), start=task * steps
            ):
                optimizer.zero_grad()
                cross_entropy(model(images)[:, TASKS[task]], labels % 2).backward()
                optimizer.step()
                if step % 50 == 0:
                    log_plasticity(writer, optimizer, step)
                    for pair, (_, test) in zip(TASKS, data, strict=True):
                        share = accuracy(model(test.images)[:, pair], test.labels % 2)
                        name = f"accuracy/digits {pair[0]} and {pair[1]}"
                        writer.add_scalar(name, share, step)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m examples.tensorboard", description=__doc__
    )
    parser.add_argument(
        "--folder", default="runs/npc", help="where to write (default runs/npc)"
    )
    folder = parser.parse_args().folder
    learn(folder)
    print(f"look at it with: tensorboard --logdir {folder}")
