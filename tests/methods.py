"""Optimizers as tests build them, and the ends of tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from npc_ext import CPC, EWC, MAS, NPC, SI, SSL, NPCAdamW, PlasticityWrapper

# Options of NPC, each away from its default.
ALL_OPTIONS: dict[str, Any] = {
    "lr": 0.08,
    "alpha": 0.4,
    "beta": 0.45,
    "delta": 0.97,
    "momentum": 0.8,
    "nesterov": True,
    "weight_decay": 1e-3,
    "sigma": "erf",
    "normalize": "active",
}


def wrapped_sgd(model: nn.Module, lr: float = 0.1, **options: Any) -> PlasticityWrapper:
    return PlasticityWrapper(torch.optim.SGD(model.parameters(), lr=lr), model, **options)


def wrapped_adamw(model: nn.Module, lr: float = 0.01, **options: Any) -> PlasticityWrapper:
    return PlasticityWrapper(torch.optim.AdamW(model.parameters(), lr=lr), model, **options)


SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
METHODS: dict[str, Callable[..., Any]] = {
    "NPC": partial(NPC, lr=0.05, delta=0.9),
    "NPC, momentum": partial(NPC, delta=0.9, **SGD),
    "NPC, all options": partial(NPC, **ALL_OPTIONS),
    "NPCAdamW": partial(NPCAdamW, lr=0.01, delta=0.9),
    "PlasticityWrapper": partial(wrapped_adamw, delta=0.9),
    "CPC": partial(CPC, delta=0.9, **SGD),
    "EWC": partial(EWC, strength=1.0, **SGD),
    "MAS": partial(MAS, strength=0.05, **SGD),
    "SI": partial(SI, strength=0.05, **SGD),
    "SSL": partial(SSL, strength=0.05, sparsity=0.0, **SGD),
}


def consolidate(optimizer: Any, batch: tuple[Tensor, Tensor]) -> None:
    """Ends a task, for the methods that have to know where it ends."""
    if isinstance(optimizer, SI):
        optimizer.consolidate()
    elif isinstance(optimizer, (EWC, MAS)):
        optimizer.consolidate([batch], progress=False)
