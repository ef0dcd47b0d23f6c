"""Setups of the guides to other libraries."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch.distributed

from ...distributed.processes import HAS_SHARDS_ON_CPU
from ..names import Setup, installed

# What torchrun tells a process. Port 0 is any free port.
_OF_ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def of_processes(stack: ExitStack) -> dict[str, Any]:
    """For pages that start torch.distributed, as if torchrun had started one process."""
    of_page = stack.enter_context(ExitStack())
    of_page.enter_context(mock.patch.dict(os.environ, {**_OF_ONE_PROCESS, "GLOO_SOCKET_IFNAME": "lo"}))
    of_page.callback(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())
    return {"shards_on_cpu": HAS_SHARDS_ON_CPU, "end_process": of_page.close}


def of_trainers(stack: ExitStack) -> dict[str, Any]:
    return {"installed": installed}


SETUPS: dict[str, Setup] = {
    "docs/guides/ddp.md": of_processes,
    "docs/guides/fsdp2.md": of_processes,
    "docs/guides/hugging-face.md": of_trainers,
    "docs/guides/accelerate.md": of_trainers,
    "docs/guides/lightning.md": of_trainers,
    "docs/guides/avalanche.md": of_trainers,
    "docs/guides/lora.md": of_trainers,
}
