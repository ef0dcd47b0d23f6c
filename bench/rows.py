"""Rows: benchmarks write one line of JSON for each measurement to a file `rows.jsonl`.

    {"kind": "run", "command": ..., "environment": {...}}             the run that measured the lines that follow
    {"kind": "row", "part": ..., "case": ..., ...}                    the fields of `Row` that are not empty
    {"kind": "part", "part": ..., "state": ..., "seconds": ...}       how a part ended

A line is written in one piece as soon as it is known, so a process that is killed loses only the measurement in
progress. Several processes may append lines. If a case has several rows, the last one counts.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

NAME = "rows.jsonl"
OURS = "npc_ext"  # the peer that others are compared with
NOT_MEASURED = "not measured"
LIMITED = "limited by the host"  # a fact: the peers whose time is the host's, not the GPU's


@dataclass
class Row:
    """One case.

    Attributes:
        part: the part that the case belongs to.
        case: name of the case, unique within its part.
        seconds: median time of each peer; ours comes first.
        quartiles: lower and upper quartile of each peer's time.
        ratio: quartiles (lower, median, upper) of each peer's time divided by ours, turn by turn; above 1, ours is
            faster.
        goals: by peer, the least ratio to reach.
        bytes: number of bytes that ours reads and writes.
        facts: anything else, by name; None means "not measured".
    """

    part: str
    case: str
    seconds: dict[str, float] = field(default_factory=dict)
    quartiles: dict[str, tuple[float, float]] = field(default_factory=dict)
    ratio: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    goals: dict[str, float] = field(default_factory=dict)
    bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def in_turns(peers: Iterable[str], turns: int, seconds: Callable[[str, int], float]) -> dict[str, list[float]]:
    """Samples `seconds(peer, turn)` of all peers turn by turn, in alternating order."""
    samples: dict[str, list[float]] = {peer: [] for peer in peers}
    for turn in range(turns):
        for peer in samples if turn % 2 else reversed(samples):
            samples[peer].append(seconds(peer, turn))
    return samples


def summary(part: str, name: str, samples: Mapping[str, list[float]]) -> Row:
    """The row of times that were sampled turn by turn; ours comes first."""
    ours, *others = samples
    quartiles = {peer: _quartiles(times) for peer, times in samples.items()}
    return Row(
        part,
        name,
        seconds={peer: median for peer, (_, median, _) in quartiles.items()},
        quartiles={peer: (low, high) for peer, (low, _, high) in quartiles.items()},
        ratio={peer: _quartiles(np.array(samples[peer]) / samples[ours]) for peer in others},
    )


def _quartiles(values: Any) -> tuple[float, float, float]:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(low), float(median), float(high)


class Writer:
    """Appends lines to <folder>/rows.jsonl."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME

    def run(self, command: str, environment: Mapping[str, Any]) -> None:
        """Records the command and the environment of the rows that follow."""
        self._append({"kind": "run", "command": command, "environment": dict(environment)})

    def row(self, row: Row) -> None:
        """Records a measurement."""
        content = {name: value for name, value in asdict(row).items() if value not in (None, {})}
        self._append({"kind": "row", **content})

    def part(self, part: str, state: str, seconds: float, **more: Any) -> None:
        """Records how a part ended: "complete", or why it is not."""
        self._append({"kind": "part", "part": part, "state": state, "seconds": round(seconds, 3), **more})

    def drop(self, parts: Collection[str]) -> None:
        """Removes the rows of parts that will be measured again."""
        if self.path.exists():
            kept = [line for line in _lines(self.path) if line.get("part") not in parts]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in _without_empty_runs(kept)))

    def _append(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, default=str) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


@dataclass
class Results:
    """The content of a file of rows.

    Attributes:
        rows: by part and case.
        runs: by part and case, the run that measured the row: {"command": ..., "environment": {...}}.
        parts: by part, how it ended.
    """

    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    runs: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of_part(self, part: str) -> list[Row]:
        """A part's rows, in the order in which they were measured."""
        return [row for (name, _), row in self.rows.items() if name == part]

    def device_of(self, part: str) -> str:
        """The device that a part was measured on. Raises RowsError if its rows are of several devices."""
        devices = {device(self.runs[part, row.case]) for row in self.of_part(part)}
        if len(devices) > 1:
            raise RowsError(f"rows of {part} are of several devices: {', '.join(sorted(devices))}; keep them apart")
        return next(iter(devices), "unknown")

    def names(self) -> list[str]:
        """All parts in the order in which they began."""
        return list(dict.fromkeys([*(part for part, _ in self.rows), *self.parts]))


def device(run: Mapping[str, Any]) -> str:
    """The device of a run."""
    environment = run.get("environment", {})
    return str(environment.get("gpu") or environment.get("processor", "unknown"))


class RowsError(ValueError):
    """A file of rows is missing or damaged."""


def read(path: Path) -> Results:
    """Reads rows.jsonl, or the one in a folder.

    Raises:
        RowsError: there is no such file, or a line of it is not what `Writer` writes.
    """
    path = path / NAME if path.is_dir() else path
    if not path.exists():
        raise RowsError(f"{path} does not exist; expected a file of rows, or a folder with {NAME} in it")
    results, run = Results(), dict[str, Any]()
    for number, line in enumerate(_lines(path), start=1):
        kind = line.pop("kind", None)
        try:
            if kind == "run":
                run = line
            elif kind == "part":
                results.parts[line["part"]] = line
            elif kind == "row":
                row = Row(**line)
                results.rows.pop((row.part, row.case), None)
                results.rows[row.part, row.case], results.runs[row.part, row.case] = row, run
            else:
                raise TypeError(f"its kind is {kind!r}")
        except (KeyError, TypeError) as error:
            raise RowsError(f"{path}, line {number}: {error}; expected a line of kind run, row or part") from error
    return results


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(errors="replace").splitlines()
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(lines):
                print(f"{path}: the last line is cut off and left out", file=sys.stderr)
                return
            raise RowsError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(line, dict):
            raise RowsError(f"{path}, line {number} is no object of JSON")
        yield line


def _without_empty_runs(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The lines without runs that have no row or part."""
    for line, following in zip(lines, [*lines[1:], {"kind": "run"}], strict=True):
        if not line["kind"] == following["kind"] == "run":
            yield line
