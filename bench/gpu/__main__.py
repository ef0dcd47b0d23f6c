"""A quarter of an hour of a GPU, in three flights: `python -m bench.gpu --flight correctness --out DIR`.

    correctness   builds or loads, runs the GPU tests, looks for memory errors, measures what matters most
    kernels       every row of the kernels beside the ceiling of their reads and writes; another revision; counters
    training      whole training steps, and iCIFAR100 at the paper's size for as long as time is left

A flight takes 230 seconds at most: every part has a limit (flights.py) and is ended at it, with all of its processes.
DIR gets rows.jsonl, to which every row is added as soon as it is measured, log.txt, and what the training flight needs
to go on with its run another time. `python -m bench.tables DIR` makes the tables later. `--dry` flies on the CPU, with
tiny sizes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..rows import Writer
from .commands import COMMANDS, Settings
from .flights import FLIGHTS, SECONDS, Part
from .prepare import ENVIRONMENT
from .processes import Command, Worker

_DRY_SLOWER = 5  # a dry run may be on a slow and busy machine


@dataclass
class Flight:
    """A flight on its way: its settings, its worker, and the time."""

    settings: Settings
    writer: Writer
    slower: int
    started: float = field(default_factory=time.perf_counter)
    worker: Worker | None = None

    def left(self) -> float:
        """Seconds until the flight must be over."""
        return SECONDS * self.slower - (time.perf_counter() - self.started)

    def limit_of(self, part: Part, later: tuple[Part, ...]) -> float:
        """Seconds that a part may take now."""
        limit = float(part.limit * self.slower)
        if part.takes_rest:
            limit = max(limit, self.left() - self.slower * sum(other.limit for other in later))
        return max(1.0, min(limit, self.left()))

    def fly(self, part: Part, limit: float) -> Mapping[str, Any]:
        """Runs one part: a command of its own, or what the worker measures."""
        if part.name in COMMANDS:
            command = COMMANDS[part.name](self.settings)
            return {"state": command} if isinstance(command, str) else self._run(command, limit)
        if self.worker is None or not self.worker.lives():
            self.worker = Worker(self.settings)
        ended = self.worker.measure(part.name, limit)
        if ended["state"] == "failed":
            self.worker.kill()  # after an error of CUDA nothing works any more
        return ended

    def _run(self, command: Command, limit: float) -> Mapping[str, Any]:
        return command.run(self.settings, self.writer, limit)

    def end(self) -> None:
        """Ends the worker."""
        if self.worker is not None:
            self.worker.kill()


def main() -> int:
    """Flies; the exit status is 1 if a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        epilog=_limits(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--flight", choices=list(FLIGHTS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--data", type=Path, help="folder of the data sets, for iCIFAR100")
    parser.add_argument(
        "--against", metavar="REV", help="another revision, or a folder with one, for the kernels flight"
    )
    parser.add_argument("--resume", type=Path, metavar="TAR", help="icifar100.tar of an earlier training flight")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts of the flight to run (default: all)")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny: to see that everything runs")
    arguments = parser.parse_args()
    parts = FLIGHTS[arguments.flight]
    if unknown := set(arguments.only or ()) - {part.name for part in parts}:
        parser.error(
            f"the flight {arguments.flight} has no part {', '.join(sorted(unknown))}; it has "
            f"{', '.join(part.name for part in parts)}"
        )
    if not arguments.dry and shutil.which("nvidia-smi") is None:
        parser.error("there is no GPU here (no nvidia-smi); --dry flies on the CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended, too
    scratch = Path(tempfile.mkdtemp(prefix="npc_ext-flight-"))
    try:
        return _fly(arguments, tuple(p for p in parts if not arguments.only or p.name in arguments.only), scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _limits() -> str:
    """What --help says of the parts."""
    lines = ["Parts, and the seconds that each may take at most:"]
    for flight, parts in FLIGHTS.items():
        listed = ", ".join(f"{part.name} {part.limit}{' or what is left' * part.takes_rest}" for part in parts)
        lines.append(f"  {flight}: {listed}")
    return "\n".join(lines)


def _fly(arguments: argparse.Namespace, parts: tuple[Part, ...], scratch: Path) -> int:
    settings = Settings(
        command=shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]]),
        out=arguments.out.resolve(),
        dry=arguments.dry,
        scratch=scratch,
        data=arguments.data and arguments.data.resolve(),
        against=arguments.against,
        resume=arguments.resume and arguments.resume.resolve(),
        environment=_environment(arguments),
    )
    flight = Flight(settings, Writer(settings.out), _DRY_SLOWER if settings.dry else 1)
    failed = False
    try:
        for index, part in enumerate(parts):
            limit = flight.limit_of(part, parts[index + 1 :])
            if flight.left() < 1:
                flight.writer.part(part.name, "not begun", 0, limit=0)
                continue
            started = time.perf_counter()
            ended = dict(flight.fly(part, limit))
            seconds = time.perf_counter() - started
            flight.writer.part(part.name, seconds=seconds, limit=round(limit, 1), **ended)
            print(f"{part.name}: {ended['state']}, {seconds:.1f} s of {limit:.0f} {ended.get('error', '')}", flush=True)
            failed |= ended["state"] in ("failed", "killed at its limit")
            if part.name == "load" and ended["state"] != "complete":
                break  # nothing can be tested or measured
    finally:
        flight.end()
    print(f"{arguments.flight}: {time.perf_counter() - flight.started:.0f} s, {flight.writer.path}", flush=True)
    return int(failed)


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Of all processes: one cache of kernels, built for the GPU of the flights alone."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if not arguments.dry:
        cache = str(Path(tempfile.gettempdir()) / "npc_ext-flight")
        environment = {**ENVIRONMENT, "NPC_EXT_CACHE": cache, **environment}
    return environment


if __name__ == "__main__":
    sys.exit(main())
