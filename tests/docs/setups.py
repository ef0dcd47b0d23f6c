"""The names that the documentation's blocks use without defining them, page by page."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.distributed
from torch import nn
from torch.nn.functional import cross_entropy

from npc_ext import NPC, NPCAdamW

from ..distributed.processes import HAS_SHARDS_ON_CPU
from .names import Writer, batches, installed, network, train

Setup = Callable[[ExitStack], dict[str, Any]]

# What torchrun tells a process. Port 0 is any free port.
_OF_ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def of_readme(stack: ExitStack) -> dict[str, Any]:
    return {"network": network}


def of_home(stack: ExitStack) -> dict[str, Any]:
    return {"model": network(), "steps_per_task": 300}


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


def of_processes(stack: ExitStack) -> dict[str, Any]:
    """For pages that start torch.distributed, as if torchrun had started one process."""
    of_page = stack.enter_context(ExitStack())
    of_page.enter_context(mock.patch.dict(os.environ, {**_OF_ONE_PROCESS, "GLOO_SOCKET_IFNAME": "lo"}))
    of_page.callback(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())
    return {"shards_on_cpu": HAS_SHARDS_ON_CPU, "end_process": of_page.close}


def of_trainers(stack: ExitStack) -> dict[str, Any]:
    return {"installed": installed}


SETUPS: dict[str, Setup] = {
    "README.md": of_readme,
    "docs/index.md": of_home,
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
    "docs/guides/ddp.md": of_processes,
    "docs/guides/fsdp2.md": of_processes,
    "docs/guides/hugging-face.md": of_trainers,
    "docs/guides/accelerate.md": of_trainers,
    "docs/guides/lightning.md": of_trainers,
    "docs/guides/avalanche.md": of_trainers,
    "docs/guides/lora.md": of_trainers,
}
