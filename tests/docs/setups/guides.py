"""Setups of the guides to the package itself."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from npc_ext import NPC, NPCAdamW

from ..names import Setup, Writer, batches, installed, network, train


def of_guide(stack: ExitStack) -> dict[str, Any]:
    """What most guides use: a network with ten outputs, and two tasks with two of them each."""
    torch.manual_seed(0)
    names = {"torch": torch, "nn": nn, "cross_entropy": cross_entropy, "NPC": NPC, "NPCAdamW": NPCAdamW}
    data = {"tasks": [[0, 1], [2, 3]], "loaders": [batches(2), batches(2)], "images": torch.rand(8, 64)}
    model = network()
    return {
        **names,
        **data,
        "train": train,
        "network": network,
        "model": model,
        "device": "cpu",
        "installed": installed,
    }


def of_tasks(stack: ExitStack) -> dict[str, Any]:
    names = of_guide(stack)
    return {**names, "optimizer": NPC(names["model"]), "loader": batches(10), "labels": torch.arange(8)}


def of_fine_tuning(stack: ExitStack) -> dict[str, Any]:
    return {**of_guide(stack), "old_data": batches(10), "new_data": batches(10)}


def of_monitoring(stack: ExitStack) -> dict[str, Any]:
    names = of_guide(stack)
    optimizer = NPC(names["model"], half_life=300)
    for index, most in (("0", 2.4), ("2", 3.1), ("4", 3.9), ("6", 1.2)):  # the same on all processors
        importance = optimizer.state[names["model"][int(index)].weight]["importance"]
        importance.copy_(most * torch.linspace(0, 1, len(importance)) ** 2)
    return {**names, "optimizer": optimizer, "writer": Writer(), "step": 0}


def of_gpu(stack: ExitStack) -> dict[str, Any]:
    return {"torch": torch, "model": network(), "device": "cpu"}


SETUPS: dict[str, Setup] = {
    "docs/guides/any-optimizer.md": of_guide,
    "docs/guides/baselines.md": of_guide,
    "docs/guides/compile.md": of_guide,
    "docs/guides/constants.md": of_guide,
    "docs/guides/fine-tuning.md": of_fine_tuning,
    "docs/guides/gpu.md": of_gpu,
    "docs/guides/heads.md": of_guide,
    "docs/guides/mixed-precision.md": of_tasks,
    "docs/guides/monitoring.md": of_monitoring,
    "docs/guides/tasks.md": of_tasks,
}
