"""Times two revisions in turns, each in its own process, on the same cases.

Both run the cases of this checkout; only `npc_ext` and its kernels differ. One process waits while the other is timed.
Both belong to the process group of this process, and end with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import ROOT
from ..rows import OURS, Row, Writer, in_turns, summary
from .revision import RevisionError, checkout

BEFORE, AGAINST = "before", "revisions"


class _Worker:
    """A process that times the cases of one revision on request."""

    def __init__(
        self, folder: Path, module: str, parts: Sequence[str], quick: bool, environment: Mapping[str, str]
    ) -> None:
        command = [sys.executable, "-m", "bench.against.worker", module, *parts, *(["--quick"] if quick else [])]
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RevisionError(f"a process ended with status {self._process.wait()}; its errors are above")
        return dict(json.loads(answer))

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def against(
    revision: str,
    module: str,
    parts: Sequence[str],
    quick: bool,
    writer: Writer,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Times this checkout against another revision; returns the cases that got slower beyond their spread.

    Args:
        revision: a revision of git, or a folder in which one is checked out (and perhaps built).
        module: name of a module with a dictionary `PARTS` and, if calls are not timed by the host, a function `timer`.
        parts: the parts to measure; empty: all.
        quick: yield fewer cases.
        writer: writes the rows, in which the other revision is the peer "before".
        environment: environment variables for both processes.

    Raises:
        RevisionError: the revision is unknown, or one of the two cannot be measured.
    """
    slower: list[str] = []
    folders = {OURS: ROOT, BEFORE: checkout(revision)}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(closing(_Worker(folder, module, parts, quick, environment)))
            for name, folder in folders.items()
        }
        for name, worker in workers.items():
            if reason := worker.ask(command="begin")["reason"]:
                raise RevisionError(f"the kernels of {name} cannot be used: {reason}")
        broken = ""
        while True:
            answers = {name: worker.ask(command="next", after=broken) for name, worker in workers.items()}
            if any("end" in answer for answer in answers.values()):
                return slower
            part, broken = answers[OURS]["part"], ""
            if errors := {name: answer["broken"] for name, answer in answers.items() if "broken" in answer}:
                broken, case = part, "all further cases"
            else:
                case = answers[OURS]["case"]
                errors = {name: answer["error"] for name, answer in answers.items() if "error" in answer}
            if errors:
                writer.row(
                    Row(f"{part}-{AGAINST}", case, facts={f"error of {name}": error for name, error in errors.items()})
                )
                continue
            row = _timed(workers, f"{part}-{AGAINST}", case, answers)
            writer.row(row)
            if row.ratio[BEFORE][2] < 1:
                slower.append(f"{part}, {case}")


def _timed(workers: dict[str, _Worker], part: str, case: str, answers: dict[str, dict[str, Any]]) -> Row:
    calls = min(answer["calls"] for answer in answers.values())

    def seconds(name: str, turn: int) -> float:
        return float(workers[name].ask(command="time", first=turn * calls, calls=calls)["seconds"])

    row = summary(part, case, in_turns(workers, answers[OURS]["turns"], seconds))
    row.bytes = answers[OURS]["bytes"]
    row.goals = {BEFORE: 1.0}
    return row
