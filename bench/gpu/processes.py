"""Processes of a flight, each in its own process group, which is killed as a whole when its time is over."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from .. import ROOT

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_DIE = 3
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
KILLED = "killed at its limit"


@dataclass
class Settings:
    """The options of a flight, and what its processes need.

    Attributes:
        command: the command of the flight, for its rows.
        out: folder of the results.
        dry: run on the CPU, with tiny sizes.
        scratch: temporary folder, removed when the flight is over.
        data, against, resume: see `python -m bench.gpu --help`.
        environment: environment variables of all processes.
    """

    command: str
    out: Path
    dry: bool
    scratch: Path
    data: Path | None
    against: str | None
    resume: Path | None
    environment: dict[str, str] = field(default_factory=dict)

    def log(self) -> IO[bytes]:
        """Opens log.txt, to which all processes write."""
        return (self.out / "log.txt").open("ab")


def of_gpu(*properties: str) -> str:
    """Properties of the GPU, as nvidia-smi prints them; empty if it does not."""
    query = ["nvidia-smi", f"--query-gpu={','.join(properties)}", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=False, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _lead_a_group() -> None:
    """Called in a new process: makes it the leader of a group that dies with its parent, even a killed one."""
    os.setpgrp()
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def _start(
    command: list[str], settings: Settings, environment: Mapping[str, str] = MappingProxyType({}), **options: Any
) -> subprocess.Popen[bytes]:
    """Starts a process as the leader of a new group in our session, so that the end of the session ends it, too."""
    with settings.log() as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**settings.environment, **environment},
            stderr=log,
            preexec_fn=_lead_a_group,
            **{"stdout": log, **options},
        )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and all processes that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # it may hang in the driver
        process.wait(_SECONDS_TO_DIE)


@dataclass
class Command:
    """A part that runs as a command.

    Attributes:
        arguments: the command.
        verdict: returns how the part ended, {"state": ..., "error": ...}, from the exit status (None: it was killed).
        at_limit: returns the state of a part that was killed at its limit, which is a failure unless it says otherwise.
        look: called now and then while the command runs, and when it has ended, to keep intermediate results.
        environment: environment variables in addition to the flight's.
    """

    arguments: list[str]
    verdict: Callable[[int | None], Mapping[str, Any]]
    look: Callable[[], None] = lambda: None
    at_limit: Callable[[], str] = lambda: KILLED
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, settings: Settings, limit: float) -> Mapping[str, Any]:
        """Runs the command for at most `limit` seconds."""
        deadline = time.perf_counter() + limit
        process = _start(self.arguments, settings, self.environment)
        try:
            while time.perf_counter() < deadline:
                try:
                    process.wait(min(_SECONDS_BETWEEN_LOOKS, max(deadline - time.perf_counter(), 0.01)))
                    return self.verdict(process.returncode)
                except subprocess.TimeoutExpired:
                    self.look()
            _kill(process)
            return {**self.verdict(None), "state": self.at_limit()}
        finally:
            _kill(process)
            self.look()


class Worker:
    """The process that measures parts itself (worker.py)."""

    def __init__(self, settings: Settings) -> None:
        command = [sys.executable, "-m", "bench.gpu.worker", str(settings.out), "--command", settings.command]
        command += ["--dry"] if settings.dry else []
        self._process = _start(command, settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    @property
    def pid(self) -> int:
        """The ID of the process."""
        return self._process.pid

    def is_running(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def measure(self, part: str, limit: float) -> Mapping[str, Any]:
        """Has the process measure a part for at most `limit` seconds; kills it if it takes longer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        deadline = time.perf_counter() + limit
        try:
            self._process.stdin.write(json.dumps({"part": part, "limit": limit}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"state": "failed", "error": f"the worker ended with status {self._process.wait()}; see log.txt"}
        ready, _, _ = select.select([self._process.stdout], [], [], max(deadline - time.perf_counter(), 0))
        if not ready:
            self.kill()
            return {"state": KILLED}
        answer = self._process.stdout.readline()
        if not answer:
            return {"state": "failed", "error": f"the worker ended with status {self._process.wait()}; see log.txt"}
        return dict(json.loads(answer))

    def kill(self) -> None:
        """Kills the process."""
        _kill(self._process)
