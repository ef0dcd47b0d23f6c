"""Training steps of networks in which a share of the neurons is certain not to move, so that NPC can skip work.

Ours skips single rows (`skip_gradients="rows"`). The default skips whole layers only: in these networks, whose
certified neurons are scattered over all layers, that is everything or nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from npc_ext import NPC

from .cases import SLOW, certify, freeze, share_skipped, training
from .figures import NETWORK, SHARE
from .networks import Transformer, cnn, mlp
from .rows import OURS
from .timing import Case, ignoring_the_set

LR = 1e-3
SGD, UNSKIPPED = "SGD fused", "skip_gradients='none'"
# By share: the goal for the ratio of SGD's time to ours.
_GOALS = {0.0: 1 / 1.03, 0.75: 1 / 0.85, 1.0: 1 / 0.75}


@dataclass(frozen=True)
class Network:
    """A network, the shape of its random input, and how often to repeat the measurement."""

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
    """One network in which a random share of each layer's neurons is certain not to move, the same for all peers.

    Args:
        network: the network to train.
        share: share of each layer's neurons that does not move.
        device: device to train on.
        peers: what to compare ours with: `SGD`, `UNSKIPPED` or both.

    Attributes:
        steps: the training step of each peer; ours comes first.
        models: the model of each peer.
        inputs: the batch that all of them train on.
        skipped: share of all neurons whose weight gradients ours skips.
    """

    def __init__(
        self, network: Network, share: float, device: str = "cpu", peers: Sequence[str] = (SGD, UNSKIPPED)
    ) -> None:
        self.network, self.share = network, share
        self.models = {OURS: network.make().to(device)}
        for name in peers:
            self.models[name] = copy.deepcopy(self.models[OURS])
        self.inputs = torch.randn(network.shape, device=device)
        labels = torch.randint(10, network.shape[:1], device=device)
        self.steps: dict[str, Callable[[], None]] = {}
        for name, model in self.models.items():
            ours = (
                NPC(model, lr=LR, delta=SLOW, skip_gradients="none" if name == UNSKIPPED else "rows")
                if name != SGD
                else None
            )
            optimizer = ours or torch.optim.SGD(model.parameters(), lr=LR, fused=True)
            self.steps[name] = step = training(model, optimizer, self.inputs, labels)
            if ours is not None:
                freeze(ours, share)
                certify(ours)
            step()
            if name == OURS:
                self.skipped = share_skipped(optimizer)

    def timed(self, **more: Any) -> Case:
        """The case to time. `more` sets further fields of it."""
        goal = _GOALS.get(self.share) if self.network.has_goals else None
        return Case(
            f"{self.network.name}, {self.share:.0%}",
            {name: ignoring_the_set(step) for name, step in self.steps.items()},
            turns=self.network.turns,
            goals={} if goal is None else {SGD: goal},
            **more,
        )

    def facts(self) -> dict[str, Any]:
        """Facts that the figure of certified neurons needs, and the share of gradients that were skipped."""
        return {NETWORK: self.network.name, SHARE: self.share, "gradients skipped": self.skipped}
