"""Setups of the guides to other libraries."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed

from npc_ext import NPC

from ...distributed.processes import HAS_SHARDS_ON_CPU
from ..names import Setup, Transformer, for_trainer, installed, network


def of_integrations(stack: ExitStack) -> dict[str, Any]:
    def start_one_process() -> None:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    def end_process() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    stack.callback(end_process)
    processes = {"start_one_process": start_one_process, "end_process": end_process}
    needed = {"installed": installed, "shards_on_cpu": HAS_SHARDS_ON_CPU}
    names = {"NPC": NPC, "Transformer": Transformer, "for_trainer": for_trainer}
    return {**processes, **needed, **names, "model": network(), "device": "cpu", "folder": "checkpoints", "step": 1}


SETUPS: dict[str, Setup] = {"docs/guides/integrations.md": of_integrations}
