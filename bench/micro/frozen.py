"""Training steps by the share of neurons that are certain not to move: what NPC need not compute, SGD computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from npc_ext import NPC

from ..continual.figures import save
from ..continual.networks import cnn
from ..gpu.networks import resnet18
from .methods import LR, paper_cnn

SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
MEASURE_EVERY = 8
OURS, SGD, UNSKIPPED, LAZY = "npc_ext", "SGD fused", "skip_frozen=False", f"measure_every={MEASURE_EVERY}"
# Steps that are timed together: lazy measuring measures in one of so many.
STEPS = {OURS: 2, SGD: 2, UNSKIPPED: 2, LAZY: MEASURE_EVERY}
KEPT = (OURS, LAZY)  # the peers that keep less for their backward pass
# By share: how many times longer SGD should at least take.
GOALS = {OURS: {0.0: 1 / 1.03, 0.75: 1 / 0.85, 1.0: 1 / 0.75}, LAZY: {1.0: 1 / 0.5}}


@dataclass(frozen=True)
class Network:
    """A network to train on random input of a shape, and how often to repeat the measurement."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    turns: int
    has_goals: bool = False


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


def mlp(inputs: int, width: int, classes: int = 10) -> nn.Module:
    """Three fully connected layers."""
    hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, classes))


NETWORKS = [
    Network("paper's CNN, batch 64", paper_cnn, (64, 3, 32, 32), 9, has_goals=True),
    Network("ResNet-18, batch 16", resnet18, (16, 3, 32, 32), 9),
    Network("MLP 784-1024-1024-10, batch 256", partial(mlp, 784, 1024), (256, 784), 21),
    Network("transformer of width 128, batch 32 x 32", partial(Transformer, 128), (32, 32, 128), 21),
]
SMALL_NETWORKS = [
    Network("digits CNN, batch 4", partial(cnn, 1, 8, (16, 32), 64, 10), (4, 1, 8, 8), 3),
    Network("transformer of width 16, batch 2 x 4", partial(Transformer, 16), (2, 4, 16), 3),
]


class Case:
    """One network with a share of neurons that are certain not to move, the same in all layers and for all peers.

    Args:
        device: where it is trained.

    Attributes:
        cycles: what each peer does to take its `STEPS`; ours comes first.
        models: what they train.
        inputs: what they train it on.
        skipped: the share of all neurons whose gradients ours leaves out.
    """

    def __init__(self, network: Network, share: float, device: str = "cpu") -> None:
        self.models = {OURS: network.make().to(device)}
        for name in (SGD, UNSKIPPED, LAZY):
            self.models[name] = copy.deepcopy(self.models[OURS])
        self.inputs = torch.randn(network.shape, device=device)
        labels = torch.randint(10, network.shape[:1], device=device)
        # So slow a decay that the share stays what it is, whatever is measured.
        options: dict[str, Any] = {"lr": LR, "delta": 1 - 1e-6}
        optimizers: dict[str, torch.optim.Optimizer] = {
            OURS: _with_frozen(NPC(self.models[OURS], **options), share),
            SGD: torch.optim.SGD(self.models[SGD].parameters(), lr=LR, fused=True),
            UNSKIPPED: _with_frozen(NPC(self.models[UNSKIPPED], skip_frozen=False, **options), share),
            LAZY: _with_frozen(NPC(self.models[LAZY], measure_every=MEASURE_EVERY, **options), share),
        }

        def take(name: str, steps: int) -> None:
            for _ in range(steps):
                optimizers[name].zero_grad()
                F.cross_entropy(self.models[name](self.inputs), labels).backward()
                optimizers[name].step()

        self.cycles = {name: partial(take, name, STEPS[name]) for name in optimizers}
        for name, optimizer in optimizers.items():
            take(name, 1)
            if isinstance(optimizer, NPC):
                optimizer._certificates.issue()
                take(name, 1)
        layers = optimizers[OURS].plasticity().values()  # type: ignore[attr-defined]
        self.skipped = sum(float(layer.gradients_skipped) * len(layer.importance) for layer in layers)
        self.skipped /= sum(len(layer.importance) for layer in layers)


def _with_frozen(optimizer: NPC, share: float) -> NPC:
    """The optimizer, with so great an importance for a random share of each layer's neurons that they stay."""
    generator = torch.Generator().manual_seed(1)
    for layer in optimizer.neurons:
        importance = optimizer.state[layer.parameters[0].parameter]["importance"]
        chosen = torch.randperm(layer.neurons, generator=generator)[: round(share * layer.neurons)]
        importance[chosen.to(importance.device)] = 10.0
    return optimizer


def draw(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Draws frozen.svg and frozen.png: step time in units of SGD's over the share, an axis for each network."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(3.4 * len(networks), 3.2), layout="constrained")
    grid: Any = figure.subplots(1, len(networks), squeeze=False)[0]
    for axes, network in zip(grid, networks, strict=True):
        own = [row for row in rows if row["network"] == network]
        for name in own[0]["seconds"]:
            relative = [row["seconds"][name] / row["seconds"][SGD] for row in own]
            axes.plot([row["share"] for row in own], relative, marker="o", markersize=3, label=name)
        axes.set(title=network, xlabel="share of neurons certain not to move", ylim=(0, None))
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("step time / fused SGD's")
    figure.legend(*grid[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4, fontsize=9)
    save(figure, folder / "frozen")
