"""Tests and measures on a GPU in three flights: `python -m bench.gpu --flight correctness --out DIR`.

    correctness   loads or builds the kernels, runs the GPU tests, measures what matters most, looks for memory errors
    kernels       all kernels next to the ceiling of their reads and writes; another revision; counters
    training      whole training steps, and iCIFAR100 at the paper's size for as long as time is left

A flight takes at most 230 seconds: every part has a limit, at which it is killed with all of its processes.
DIR receives rows.jsonl, to which every row is added as soon as it is measured, log.txt, and what a later training
flight needs to resume the run. `python -m bench.tables DIR` makes the tables. `--dry` runs on the CPU, with tiny sizes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import command_line
from ..against.revision import RevisionError, checkout
from ..arguments import output_folder
from ..rows import NAME, Writer
from .commands import COMMANDS, Settings
from .flights import FLIGHTS
from .prepare import ENVIRONMENT
from .processes import KILLED, Worker, of_gpu

_DRY_SLOWER = 5  # a dry run may be on a slow and busy machine
_STATE_OF_GPU = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


@dataclass
class Flight:
    """A flight in progress: its settings, its worker, and when it started."""

    settings: Settings
    slower: int
    started: float = field(default_factory=time.perf_counter)
    worker: Worker | None = None

    def left(self, granted: int) -> float:
        """Seconds left of the `granted` ones, which are the limits of all parts so far."""
        return self.slower * granted - (time.perf_counter() - self.started)

    def fly(self, part: str, limit: float) -> Mapping[str, Any]:
        """Runs one part, as a command or in the worker. Returns how it ended; an error never ends the flight."""
        try:
            if part in COMMANDS:
                command = COMMANDS[part](self.settings)
                return {"state": command} if isinstance(command, str) else command.run(self.settings, limit)
            if self.worker is None or not self.worker.is_running():
                self.worker = Worker(self.settings)
            ended = dict(self.worker.measure(part, limit))
        except Exception as error:
            traceback.print_exc()
            return {"state": "failed", "error": f"{type(error).__name__}: {error}"}
        if ended.pop("lost", False):
            self.worker.kill()
        return ended

    def end(self) -> None:
        """Kills the worker."""
        if self.worker is not None:
            self.worker.kill()


def main() -> int:
    """Runs the flight. The exit status is 1 if a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        epilog=_limits(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--flight", choices=list(FLIGHTS), required=True)
    parser.add_argument("--out", type=output_folder, required=True, help="folder for the results")
    parser.add_argument("--data", type=Path, help="folder of the data sets, for iCIFAR100")
    parser.add_argument(
        "--against", metavar="REV", help="another revision, or a folder with one, for the kernels flight"
    )
    parser.add_argument("--resume", type=Path, metavar="TAR", help="icifar100.tar of an earlier training flight")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts of the flight to run (default: all)")
    parser.add_argument("--dry", action="store_true", help="run on the CPU, with tiny sizes")
    arguments = parser.parse_args()
    parts = FLIGHTS[arguments.flight]
    if unknown := sorted(set(arguments.only or ()) - set(parts)):
        parser.error(f"the flight {arguments.flight} has no part {', '.join(unknown)}; it has {', '.join(parts)}")
    if not arguments.dry and shutil.which("nvidia-smi") is None and not Path("/dev/nvidia0").exists():
        parser.error("there is no GPU here (no nvidia-smi, no /dev/nvidia0); --dry flies on the CPU")
    if (arguments.out / NAME).exists():
        parser.error(f"{arguments.out} has the rows of another flight; name a folder of its own for each")
    if arguments.resume is not None and (arguments.data is None or not arguments.resume.is_file()):
        parser.error(f"--resume {arguments.resume} needs --data and has to be a file")
    if arguments.data is not None and not arguments.data.is_dir():
        parser.error(f"--data {arguments.data} is not a folder")
    try:
        against = None if arguments.against is None else str(checkout(arguments.against))
        arguments.out.mkdir(parents=True, exist_ok=True)
    except (OSError, RevisionError) as error:
        parser.error(str(error))
    arguments.against = against
    for number in (signal.SIGTERM, signal.SIGINT):  # so that all child processes are ended, too
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    scratch = Path(tempfile.mkdtemp(prefix="npc_ext-flight-"))
    try:
        chosen = {part: limit for part, limit in parts.items() if not arguments.only or part in arguments.only}
        return _fly(arguments, chosen, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_failure(state: str) -> bool:
    """Whether a part that ended in this state makes the flight fail."""
    return state in ("failed", KILLED)


def _limits() -> str:
    """The limits of all parts, for --help."""
    lines = ["Parts and their limits in seconds (a part may also use what earlier parts have not used):"]
    for flight, parts in FLIGHTS.items():
        listed = ", ".join(f"{part} {limit}" for part, limit in parts.items())
        lines.append(f"  {flight}: {listed}")
    return "\n".join(lines)


def _fly(arguments: argparse.Namespace, limits: Mapping[str, int], scratch: Path) -> int:
    settings = Settings(
        command=command_line("bench.gpu"),
        out=arguments.out.resolve(),
        dry=arguments.dry,
        scratch=scratch,
        data=arguments.data and arguments.data.resolve(),
        against=arguments.against,
        resume=arguments.resume and arguments.resume.resolve(),
        environment=_environment(arguments),
    )
    flight, writer = Flight(settings, _DRY_SLOWER if settings.dry else 1), Writer(settings.out)
    states, loaded, granted = list[str](), True, 0
    try:
        for part, seconds_of_part in limits.items():
            granted += seconds_of_part
            limit = max(1.0, flight.left(granted))
            if not loaded:
                writer.part(part, "not begun: the kernels did not load", 0)
                continue
            started = time.perf_counter()
            ended: Mapping[str, Any] = {"state": "interrupted"}
            try:
                ended = flight.fly(part, limit)
            finally:
                seconds = time.perf_counter() - started
                writer.part(part, **{"seconds": seconds, "limit": round(limit, 1), **ended}, gpu=of_gpu(*_STATE_OF_GPU))
                shown = [f"{name}: {value}" for name, value in ended.items() if name != "state"]
                print(f"{part}: {', '.join([ended['state'], *shown])}; {seconds:.1f} s", flush=True)
            states.append(ended["state"])
            loaded &= part != "load" or ended["state"] == "complete"
    finally:
        flight.end()
    print(f"{arguments.flight}: {time.perf_counter() - flight.started:.0f} s, {writer.path}", flush=True)
    return int(any(map(is_failure, states)))


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    """The environment of all processes: they share one cache of kernels, built for the flights' GPU only."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if arguments.dry:
        environment.setdefault("NPC_EXT_NVCC", "")  # nothing is compiled for a GPU
    else:
        cache = str(Path(tempfile.gettempdir()) / "npc_ext-flight")
        environment = {**ENVIRONMENT, "NPC_EXT_CACHE": cache, **environment}
    return environment


if __name__ == "__main__":
    sys.exit(main())
