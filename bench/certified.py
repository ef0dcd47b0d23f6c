"""Training steps by the share of neurons that are certain not to move: what NPC need not compute, SGD computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from npc_ext import NPC

from .figures import NETWORK, SHARE
from .networks import Transformer, cnn, mlp
from .rows import OURS
from .timing import Case, ignoring_the_set

LR = 1e-3
MEASURE_EVERY = 8
SGD, UNSKIPPED, LAZY = "SGD fused", "skip_frozen=False", f"measure_every={MEASURE_EVERY}"
# Steps that are timed together: lazy measuring measures in one of so many.
_STEPS = {OURS: 2, SGD: 2, UNSKIPPED: 2, LAZY: MEASURE_EVERY}
# By share: how many times longer SGD should at least take.
_GOALS = {0.0: 1 / 1.03, 0.75: 1 / 0.85, 1.0: 1 / 0.75}


@dataclass(frozen=True)
class Network:
    """A network to train on random input of a shape, and how often to repeat the measurement."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    turns: int
    has_goals: bool = False


SMALL_NETWORKS = [
    Network("digits CNN, batch 4", partial(cnn, 1, 8, (16, 32), 64, 10), (4, 1, 8, 8), 3),
    Network("transformer of width 16, batch 2 x 4", partial(Transformer, 16), (2, 4, 16), 3),
    Network("MLP 8-16-16-10, batch 4", partial(mlp, 8, 16), (4, 8), 3),
]


class Certified:
    """One network with a random share of neurons that are certain not to move, the same in all layers and peers.

    Args:
        network: what is trained.
        share: of each layer's neurons.
        device: where it is trained.
        peers: some of `SGD`, `UNSKIPPED` and `LAZY`, to be compared with ours.

    Attributes:
        cycles: what each peer does to take `steps` of its name; ours comes first.
        models: what they train.
        inputs: what they train it on.
        skipped: the share of all neurons whose gradients ours leaves out.
    """

    steps = _STEPS

    def __init__(
        self, network: Network, share: float, device: str = "cpu", peers: Sequence[str] = (SGD, UNSKIPPED, LAZY)
    ) -> None:
        self.network, self.share = network, share
        self.models = {OURS: network.make().to(device)}
        for name in peers:
            self.models[name] = copy.deepcopy(self.models[OURS])
        self.inputs = torch.randn(network.shape, device=device)
        labels = torch.randint(10, network.shape[:1], device=device)
        # So slow a decay that the share stays what it is, whatever is measured.
        options: dict[str, Any] = {"lr": LR, "delta": 1 - 1e-6}
        differences: dict[str, dict[str, Any]] = {
            OURS: {},
            UNSKIPPED: {"skip_frozen": False},
            LAZY: {"measure_every": MEASURE_EVERY},
        }
        optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, model in self.models.items():
            if name == SGD:
                optimizers[name] = torch.optim.SGD(model.parameters(), lr=LR, fused=True)
            else:
                optimizers[name] = _with_frozen(NPC(model, **options, **differences[name]), share)

        def take(name: str, steps: int) -> None:
            for _ in range(steps):
                optimizers[name].zero_grad()
                F.cross_entropy(self.models[name](self.inputs), labels).backward()
                optimizers[name].step()

        self.cycles = {name: partial(take, name, _STEPS[name]) for name in optimizers}
        for name, optimizer in optimizers.items():
            take(name, 1)
            if isinstance(optimizer, NPC):
                optimizer._certificates.issue()
                take(name, 1)
        layers = optimizers[OURS].plasticity().values()  # type: ignore[attr-defined]
        self.skipped = sum(float(layer.gradients_skipped) * len(layer.importance) for layer in layers)
        self.skipped /= sum(len(layer.importance) for layer in layers)

    def timed(self, **more: Any) -> Case:
        """What to time; `more` are fields of the case."""
        goal = _GOALS.get(self.share) if self.network.has_goals else None
        return Case(
            f"{self.network.name}, {self.share:.0%}",
            {name: ignoring_the_set(cycle) for name, cycle in self.cycles.items()},
            turns=self.network.turns,
            units=_STEPS,
            goals={} if goal is None else {SGD: goal},
            **more,
        )

    def facts(self) -> dict[str, Any]:
        """What the figure of certified neurons is drawn from, and the share of gradients that were left out."""
        return {NETWORK: self.network.name, SHARE: self.share, "gradients skipped": self.skipped}


def _with_frozen(optimizer: NPC, share: float) -> NPC:
    """The optimizer, with so great an importance for a random share of each layer's neurons that they stay."""
    generator = torch.Generator().manual_seed(1)
    for layer in optimizer.neurons:
        importance = optimizer.state[layer.parameters[0].parameter]["importance"]
        chosen = torch.randperm(layer.neurons, generator=generator)[: round(share * layer.neurons)]
        importance[chosen.to(importance.device)] = 10.0
    return optimizer
