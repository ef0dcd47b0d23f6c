"""Mixed precision: steps that a scaler skips change nothing, and autocast measures the importance of float32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from npc_ext import NPC

from ..methods import METHODS, consolidate
from ..models import normalized_cnn
from ..training import everything, images, importances, same, unchanged

CLEARINGS: dict[str, Any] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "model": lambda model, optimizer: model.zero_grad(),
    "model, in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
}


def network_and_optimizer(name: str) -> tuple[nn.Sequential, Any]:
    model = normalized_cnn(6, 12)
    torch.manual_seed(0)
    optimizer = METHODS[name](model)
    if name != "SI":  # which has measured nothing yet
        consolidate(optimizer, images(99))
    return model, optimizer


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize(
    ("bad", "what", "clearing"),
    [
        ((0,), "loss", "model"),
        ((3,), "loss", "optimizer"),
        ((3,), "loss", "model, in place"),
        ((2, 3, 4), "loss", "model"),
        ((1,), "gradient", "model"),
        ((1,), "gradient", "model, in place"),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_steps_that_a_scaler_skips_never_happened(
    name: str, bad: tuple[int, ...], what: str, clearing: str, unscaled: bool
) -> None:
    """A run with bad batches ends where a run without them ends, to the last bit, whatever clears the gradients.

    In a bad batch the loss is infinite, or a single gradient, so that all importance is finite.
    """
    ends = []
    for seeds in (range(7), [seed for seed in range(7) if seed not in bad]):
        model, optimizer = network_and_optimizer(name)
        scaler = torch.amp.GradScaler("cpu")
        for seed in seeds:
            x, y = images(seed)
            CLEARINGS[clearing](model, optimizer)
            before = everything(model, optimizer)
            infinite = math.inf if seed in bad and what == "loss" else 1.0
            scaler.scale(F.cross_entropy(model(x), y) * infinite).backward()
            if seed in bad and what == "gradient":
                model[0].weight.grad[0] = math.inf
            if unscaled:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update(2.0**10)
            assert unchanged(before, model, optimizer) is (seed in bad)
        ends.append(everything(model, optimizer))
    assert same(*ends)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_that_are_not_cleared_after_an_overflow_let_nothing_change(name: str) -> None:
    """They stay infinite, so every later step is skipped; cleared at last, they leave nothing behind."""
    ends = []
    for seeds in (range(5), (0, 4)):
        model, optimizer = network_and_optimizer(name)
        scaler = torch.amp.GradScaler("cpu")
        for seed in seeds:
            x, y = images(seed)
            if seed in (0, 1, 4):
                model.zero_grad()
            before = everything(model, optimizer)
            scaler.scale(F.cross_entropy(model(x), y) * (math.inf if seed == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update(2.0**10)
            assert unchanged(before, model, optimizer) is (seed in (1, 2, 3))
        ends.append(everything(model, optimizer))
    assert same(*ends)


@pytest.mark.parametrize("name", METHODS)
def test_a_scaler_and_lightning_treat_our_optimizers_as_any_other(name: str) -> None:
    """Lightning clips only for optimizers of which this is false, as its `_optimizer_handles_unscaling` asks it."""
    assert not getattr(network_and_optimizer(name)[1], "_step_supports_amp_scaling", False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_measures_what_float32_measures(dtype: torch.dtype) -> None:
    """Importance is float32, and off by a few units of the shorter mantissa of activations and gradients."""
    importance = []
    for enabled in (False, True):
        model = normalized_cnn(6, 12)
        optimizer = NPC(model, lr=0.0, delta=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=enabled)
        for seed in range(5):
            x, y = images(seed)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=enabled):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        importance.append(importances(optimizer))
    for want, got in zip(*importance, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 8 * torch.finfo(dtype).eps * want.norm()
        assert not torch.equal(got, want)
