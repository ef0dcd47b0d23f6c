"""NPC with Accelerate: trains on digits with a plain training loop.

Run `python -m examples.accelerated` in the checkout.
It needs `pip install accelerate scikit-learn`.

>>> model, loader = accelerator.prepare(model, loader)
>>> optimizer = accelerator.prepare(NPC(model, lr=0.1))

Prepare the model first. With several processes this wraps it, and the optimizer needs
the wrapped model.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from npc_ext import NPC

try:
    from accelerate import Accelerator
    from sklearn.datasets import load_digits
except ImportError as error:
    sys.exit(f"{error}; this example needs: pip install accelerate scikit-learn")


def digits() -> TensorDataset:
    """scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels."""
    data = load_digits()
    return TensorDataset(
        torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16,
        torch.tensor(data.target),
    )


def network() -> nn.Sequential:
    """A small convolutional network."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.InstanceNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(epochs: int) -> tuple[float, NPC]:
    """Trains with accumulation and clipping; returns accuracy and optimizer."""
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    loader = DataLoader(
        digits(),
        batch_size=16,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
    )
    model, loader = accelerator.prepare(network(), loader)
    npc = NPC(model, lr=0.1, half_life=500)
    optimizer = accelerator.prepare(npc)
    right = 0
    for _ in range(epochs):
        right = 0
        for images, labels in loader:
            with accelerator.accumulate(model):
                outputs = model(images)
                accelerator.backward(F.cross_entropy(outputs, labels))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()
            right += int((outputs.argmax(1) == labels).sum())
    return right / len(loader.dataset), npc


def main() -> None:
    """Trains and prints the accuracy."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.accelerated", description=__doc__
    )
    parser.add_argument(
        "--epochs", type=int, default=5, help="passes over the data (default 5)"
    )
    accuracy, optimizer = train(parser.parse_args().epochs)
    print(f"accuracy on the training samples: {accuracy:.1%}")
    for name, layer in optimizer.plasticity().items():
        print(
            f"{name}: mean importance {layer.importance.mean():.2f}, "
            f"{layer.frozen:.0%} frozen"
        )


if __name__ == "__main__":
    main()
