"""Networks of the paper's style."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn


def cnn(
    in_channels: int, image_size: int, channels: Sequence[int], hidden: int, classes: int, dropout: float = 0.2
) -> nn.Sequential:
    """Blocks of convolution, instance norm, ReLU and 2x2 max-pooling; then a hidden layer, dropout and the outputs.

    The paper's network is cnn(3, 32, (128, 512, 256), 512, classes).
    """
    layers: list[tuple[str, nn.Module]] = []
    size = image_size
    for index, width in enumerate(channels, start=1):
        layers += [
            (f"conv{index}", nn.Conv2d(in_channels, width, 3, padding=1)),
            (f"norm{index}", nn.InstanceNorm2d(width)),
            (f"relu{index}", nn.ReLU()),
            (f"pool{index}", nn.MaxPool2d(2)),
        ]
        in_channels, size = width, size // 2
    layers += [
        ("flatten", nn.Flatten()),
        ("hidden", nn.Linear(in_channels * size * size, hidden)),
        ("relu", nn.ReLU()),
        ("dropout", nn.Dropout(dropout)),
        ("output", nn.Linear(hidden, classes)),
    ]
    return nn.Sequential(OrderedDict(layers))
