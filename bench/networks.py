"""The networks that the benchmarks train: the paper's, and common ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn


def cnn(
    in_channels: int, image_size: int, channels: Sequence[int], hidden: int, classes: int, dropout: float = 0.2
) -> nn.Sequential:
    """Blocks of convolution, instance norm, ReLU and 2x2 max-pooling; then a hidden layer, dropout and the outputs."""
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


def paper_cnn(classes: int = 100) -> nn.Sequential:
    """The paper's network for images of 32 x 32 pixels in 3 channels."""
    return cnn(3, 32, (128, 512, 256), 512, classes)


def mlp(inputs: int, width: int, classes: int = 10) -> nn.Module:
    """Three fully connected layers."""
    hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, classes))


class Transformer(nn.Module):
    """Two encoder layers and a classifier on the mean over positions."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, width) to (B, classes)."""
        return self.head(self.encoder(x).mean(1))


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18(width: int = 64, classes: int = 100) -> nn.Module:
    """ResNet-18 without the first pooling."""
    widths = [width, 2 * width, 4 * width, 8 * width]
    blocks: list[nn.Module] = []
    inputs = width
    for index, outputs in enumerate(widths):
        blocks += [Block(inputs, outputs, 1 if index == 0 else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
