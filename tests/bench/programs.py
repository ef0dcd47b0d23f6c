"""Runs the benchmarks' programs as a user does, and the experiments in forked processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import ROOT


def python(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python in the checkout's folder."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def experiments(arguments: list[str], output: Path) -> None:
    """Runs `python -m bench.continual` in this process; what it prints goes to a file."""
    from bench.continual.__main__ import main

    with output.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        status = main(arguments)
    sys.exit(status)


def experiments_that_die(arguments: list[str], output: Path, moves: int) -> None:
    """The same, but the process is killed when it moves a file after the given number of moves."""
    replace, left = os.replace, moves

    def replace_or_die(*positional: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*positional)

    os.replace = replace_or_die  # type: ignore[assignment]
    experiments(arguments, output)
