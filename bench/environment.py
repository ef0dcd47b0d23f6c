"""The environment of a result: machine, versions and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import numpy
import torch

import npc_ext
from npc_ext.kernels import native

from . import ROOT


def describe() -> dict[str, str | int]:
    """Everything that two runs must share for their numbers to be comparable."""
    module = native.status().module
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "npc_ext": npc_ext.__version__,
        "kernels": "none" if module is None else f"{module.isa_in_use()}, compiler {module.compiler}",
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str:
    """The commit. Where there is no repository, the environment variable NPC_BENCH_COMMIT names it."""
    if named := os.environ.get("NPC_BENCH_COMMIT"):
        return named

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "npc_ext", "csrc", "bench/*.py", "setup.py")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
