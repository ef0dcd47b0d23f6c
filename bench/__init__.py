"""Benchmarks and experiments; README.md says what each command does."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def command_line(module: str, arguments: Sequence[str] | None = None) -> str:
    """The command that runs a module with the given arguments (default: the arguments of this process)."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])
