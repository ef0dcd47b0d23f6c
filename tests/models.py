"""Small networks of the kinds that users train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """A residual block as torchvision writes it: one ReLU module used twice, in place, and `+=`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(BasicBlock(8), BasicBlock(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def vgg() -> nn.Sequential:
    """Convolutions with batch norm and in-place ReLU, pooling, and a classifier with dropout."""
    features: list[nn.Module] = []
    channels = 3
    for width in (8, 8, 0, 12, 0):
        if width == 0:
            features.append(nn.MaxPool2d(2))
            continue
        features += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    classifier = [nn.Linear(12 * 4, 20), nn.ReLU(True), nn.Dropout(0.0), nn.Linear(20, 5)]
    return nn.Sequential(nn.Sequential(*features), nn.Flatten(), nn.Sequential(*classifier))


def paper_cnn(
    channels: tuple[int, ...] = (8, 16), hidden: int = 32, classes: int = 10, dropout: float = 0.0
) -> nn.Sequential:
    """The paper's network for 8x8 images of one channel, narrow."""
    from bench.networks import cnn

    return cnn(1, 8, channels, hidden, classes, dropout)


def normalized_cnn(channels: int, hidden: int) -> nn.Sequential:
    """A convolution with a normalization and two linear layers, for 8x8 images; always the same weights."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3), nn.InstanceNorm2d(channels, affine=True), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(9 * channels, hidden), nn.ReLU(), nn.Linear(hidden, 3),
    )  # fmt: skip


class ManyHeads(nn.Module):
    """One head per task, chosen by an argument."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(16, 3) for _ in range(heads)])

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.heads[task](self.features(x))


class Conv1D(nn.Module):
    """The layer of GPT-2: y = x @ weight + bias."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def transposed_and_not() -> tuple[nn.Sequential, nn.Sequential]:
    """Two equal networks: the first has Conv1D layers, the second has Linear layers."""
    transposed = nn.Sequential(Conv1D(16, 6), nn.ReLU(), Conv1D(12, 16), nn.LayerNorm(12), nn.Tanh(), Conv1D(3, 12))
    usual = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3))
    values = {name: p.t() if p.ndim == 2 else p for name, p in transposed.state_dict().items()}
    usual.load_state_dict(values)
    return transposed, usual


class SetTask(nn.Module):
    """One head per task, chosen by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.task = 0
        self.hidden = nn.Linear(6, 16)
        self.heads = nn.ModuleList([nn.Linear(16, 3) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.task](F.relu(self.hidden(x)))


class DataDependent(nn.Module):
    """A model that cannot be traced, because its control flow depends on data."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = norm or nn.Identity()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        if x.sum() > 1e9:
            x = x * 2
        return self.fc(F.relu(x).mean((2, 3)) + 0.1)


class Model(nn.Module):
    """These modules, and a function of the model and its input as the forward pass."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Attending(nn.Module):
    """Attention between two halves of a sequence (samples first), and a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True, **options), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        key, value = (x[:, 3:, : self.attention.kdim], x[:, 3:, : self.attention.vdim])
        return self.head(self.attention(x[:, :3], key, value, need_weights=False)[0].mean(1))
