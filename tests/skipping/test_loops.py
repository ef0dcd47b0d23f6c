"""Training loops as people write them, drawn at random: skipping gradients changes no bit in any of them."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import npc_ext
from npc_ext import NPC

from .frozen import Pair

LOOPS, STEPS = 10, 30
WAYS = ["plain"] * 3 + ["two branches", "checkpointed", "checkpointed reentrantly", "input with gradient", "by parts"]
NORMS: dict[str, Any] = {
    "batch norm": lambda: nn.BatchNorm2d(8),
    "group norm": lambda: nn.GroupNorm(2, 8),
    "instance norm": lambda: nn.InstanceNorm2d(8, affine=True),
    "no norm": nn.Identity,
}


class Network(nn.Module):
    """Two convolutions, the first one with a normalization, and an output layer."""

    def __init__(self, relu: type[nn.Module], norm: str, dropout: float) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), NORMS[norm]()
        self.relu, self.pool = relu(), nn.MaxPool2d(2)
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Dropout(dropout), nn.Flatten())
        self.output = nn.Linear(8, 4)
        self.rested = False

    def convolve(self, x: Tensor) -> Tensor:
        convolved = self.first(x)
        self.rested |= self.training and torch.is_grad_enabled() and not convolved.requires_grad
        return convolved

    def block(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.norm(self.convolve(x))))

    def forward(self, x: Tensor, way: str) -> Tensor:
        if way == "two branches":
            convolved = [self.convolve(x), self.convolve(x.flip(3))]  # both before either is measured
            features = sum(self.pool(self.relu(self.norm(part))) for part in convolved)
        elif way == "checkpointed":
            features = checkpoint(self.block, x, use_reentrant=False)
        elif way == "checkpointed reentrantly":
            features = checkpoint(self.block, x.clone().requires_grad_(), use_reentrant=True)
        else:
            features = self.block(x.clone().requires_grad_() if way == "input with gradient" else x)
        return self.output(self.second(features))


def loss_of(model: nn.Module, x: Tensor, way: str) -> Tensor:
    output = model.forward(x, "plain") if way == "by parts" else model(x, way)
    return F.cross_entropy(output, torch.arange(len(x)) % 4)


def step(model: Network, optimizer: NPC, number: int, draw: random.Random) -> None:
    """Takes one step in one of many manners. `model.rested` tells whether the first layer rested."""
    x = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(draw.randrange(99)))
    torch.manual_seed(number)  # for dropout
    way, manner, disturbance = draw.choice(WAYS), draw.randrange(5), draw.randrange(30)
    hook, model.rested = None, False
    if disturbance == 0:
        model.eval()
        model(x, "plain").sum().backward()
        model.train()
        model.zero_grad()
    elif disturbance == 1:
        with torch.no_grad():
            model(x, "plain")
    elif disturbance == 2:
        model(x, "plain")  # and no backward pass
    elif disturbance == 3:
        optimizer.param_groups[0]["lr"] *= 0.9
    elif disturbance == 4:
        optimizer.param_groups[0]["beta"] *= 1.05
    elif disturbance == 5:
        with torch.no_grad():
            model.first.weight.mul_(1.01)
    elif disturbance == 6:
        for parameter in model.norm.parameters():
            parameter.requires_grad_(not parameter.requires_grad)
    elif disturbance == 7:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif disturbance == 8:
        hook = model.relu.register_full_backward_hook(lambda *arguments: None)
    if manner == 0:
        loss = loss_of(model, x, way)
        optimizer.zero_grad()
        loss.backward()
    elif manner == 1:
        optimizer.zero_grad()
        loss_of(model, x, way).backward()
        loss_of(model, x.flip(2), "plain").backward()
    elif manner == 2:
        optimizer.zero_grad()
        (loss_of(model, x, way) + loss_of(model, x.flip(2), "plain")).backward()
    else:
        model.zero_grad(set_to_none=manner == 3)
        loss_of(model, x, way).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    optimizer.step()
    if hook is not None:
        hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("skip_gradients", ["layers", "rows"])
def test_no_loop_notices_that_gradients_are_skipped(
    skip_gradients: str, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if skip_gradients == "rows":  # parts of layers may differ in their last bits
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    rested = 0
    for loop in range(LOOPS):
        draw = random.Random(loop)
        torch.manual_seed(loop)
        model = Network(draw.choice([nn.ReLU, npc_ext.nn.ReLU]), draw.choice(list(NORMS)), draw.choice([0.0, 0.3]))
        pair = Pair(
            model,
            {"first": 1.0},
            lr=0.05,
            delta=draw.choice([0.9, 0.99, 0.9999]),
            momentum=draw.choice([0.0, 0.9]),
            weight_decay=0.01,
            # What a forward pass with ways to choose from does cannot be found by tracing it.
            layers={"first": {"measure_at": draw.choice(["pool", "relu"])}},
            skip_gradients=skip_gradients,
        )
        for number in range(STEPS):
            for network, optimizer in pair:
                step(network, optimizer, number, random.Random(100 * loop + number))
            rested += model.rested
            assert pair.same(), f"loop {loop}, step {number}"
    assert rested > LOOPS * STEPS / 10
