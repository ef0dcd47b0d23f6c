"""Setups of the guides to the package itself."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from npc_ext import NPC

from ..names import Setup, batches, network, train


def of_baselines(stack: ExitStack) -> dict[str, Any]:
    return {"model": network(), "train": train, "tasks": [[0, 1], [2, 3]], "loaders": [batches(2), batches(2)]}


def of_gpu(stack: ExitStack) -> dict[str, Any]:
    return {"torch": torch, "optimizer": NPC(network())}


SETUPS: dict[str, Setup] = {"docs/guides/baselines.md": of_baselines, "docs/guides/gpu.md": of_gpu}
