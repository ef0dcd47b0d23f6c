"""The store of results: one JSON file per run, rewritten in one piece after every task.

    <store>/<experiment>-<size>/<method>/<hash of the settings>/seed<k>.json     a run: settings, accuracies, machine
    <store>/checkpoints/…/seed<k>.pt and .lock                                   while it is not finished

To merge the stores of several machines, copy one over the other.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

STORE = Path("bench/results/continual/runs")
ALPHA_UNIT = "alpha_unit"  # a hyperparameter that says that alpha is in units of "lr"


@dataclass
class Record:
    """The results of one run.

    Attributes:
        experiment, size, method, seed: identify the run.
        settings: everything that the numbers depend on: {"protocol": ..., "method": ..., "precision": ...}.
        tasks: names of all tasks.
        accuracy: after each task so far, the accuracies on all tasks; None where there is none.
        seconds, steps: training time (without consolidation) and steps of each task so far.
        consolidation_seconds: time of consolidation after each task so far.
        environments: the machines that it ran on, in order.
        extra: further measurements of an experiment.
        diverged_in: number of the task in which weights, or their importance at its end, became non-finite; None if
            they did not. No task was learned from then on; accuracies are those of the diverged network.
    """

    experiment: str
    size: str
    method: str
    seed: int
    settings: dict[str, Any]
    tasks: list[str]
    accuracy: list[list[float | None]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    consolidation_seconds: list[float] = field(default_factory=list)
    environments: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    diverged_in: int | None = None

    @property
    def finished(self) -> bool:
        """Whether all tasks are learned."""
        return len(self.accuracy) == len(self.tasks)

    @property
    def protocol(self) -> dict[str, Any]:
        """The fields of `Protocol`."""
        return completed(self.settings["protocol"])

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The hyperparameters of the method, with alpha in units of lr."""
        return in_units_of_lr(self.settings["method"])

    @property
    def path(self) -> Path:
        """The path in a store, without suffix."""
        return Path(f"{self.experiment}-{self.size}") / self.method / hash_of(self.settings) / f"seed{self.seed}"


def hash_of(settings: dict[str, Any]) -> str:
    """A short hash of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def completed(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded protocol with all fields. Older records lack `batches`, which was "cut" then."""
    return {"batches": "cut", **protocol}


def in_units_of_lr(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded hyperparameters with alpha in units of lr. Records without a unit have alpha as a learning rate."""
    converted = dict(hyperparameters)
    if "alpha" in converted and ALPHA_UNIT not in converted:
        converted |= {"alpha": round(converted["alpha"] / converted["lr"], 4), ALPHA_UNIT: "lr"}
    return converted


def write(path: Path, content: str | bytes) -> None:
    """Writes a file in one piece: readers find the old or the new content, even if the writer is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


class StoreError(ValueError):
    """A file of a store is not what a run wrote."""


def _read(path: Path) -> Record:
    try:
        return Record(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise StoreError(f"{path} is no record of a run: {error}; delete it to have the run done anew") from error


class Store:
    """A folder of records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def lock(self, record: Record) -> FileLock:
        """The lock of a run; only its holder may work on the run."""
        path = self._checkpoint(record, ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def save(self, record: Record, state: dict[str, Any]) -> None:
        """Stores a run after a task: its record and, unless it is finished, a checkpoint."""
        text = json.dumps(asdict(record)) + "\n"
        checkpoint = self._checkpoint(record, ".pt")
        if not record.finished:
            content = io.BytesIO()
            # The checkpoint contains the record, too, so that the two agree whenever the process is killed.
            torch.save({"record": text, **state}, content)
            write(checkpoint, content.getvalue())
        write(self.folder / record.path.with_suffix(".json"), text)
        if record.finished:
            checkpoint.unlink(missing_ok=True)

    def load(self, record: Record) -> tuple[Record, dict[str, Any] | None]:
        """Returns the stored record and, unless the run is finished, the checkpoint; else the given record and None.

        Raises:
            StoreError: a stored file is damaged; the message names it.
        """
        path = self.folder / record.path.with_suffix(".json")
        if path.exists() and (stored := _read(path)).finished:
            return stored, None
        checkpoint = self._checkpoint(record, ".pt")
        if not checkpoint.exists():
            return record, None
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            return Record(**json.loads(state.pop("record"))), state
        except Exception as error:  # a damaged file can raise nearly anything
            raise StoreError(f"{checkpoint} is damaged: {error}; delete it to start the run anew") from error

    def records(self) -> Iterator[Record]:
        """All runs, finished or not, in order of their names. Raises StoreError if a file is damaged."""
        for path in sorted(self.folder.glob("*/*/*/seed*.json")):
            yield _read(path)

    def _checkpoint(self, record: Record, suffix: str) -> Path:
        return self.folder / "checkpoints" / record.path.with_suffix(suffix)
