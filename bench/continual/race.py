"""How long whole runs take: methods learn the same tasks in one process and take turns epoch by epoch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import npc_ext

from .. import environment
from ..cases import share_skipped
from ..tables import markdown
from . import experiments, runs
from .experiments import EXPERIMENTS
from .metrics import average_accuracy
from .runs import Run
from .tasks import Task
from .training import accuracy_of, train


class _Contestant:
    """One method that learns the tasks, with its own random numbers."""

    def __init__(self, run: Run, tasks: list[Task]) -> None:
        self._run, self._tasks = run, tasks
        self.model, self.optimizer = runs.fresh(run, tasks, 0)
        self.seconds: list[list[float]] = []  # task by task, epoch by epoch
        self.consolidation_seconds: list[float] = []
        self.skipped: list[float] = []
        self.accuracy: list[list[float]] = []

    def begin(self, number: int) -> None:
        """Begins a task."""
        task = self._tasks[number]
        self._number, self._batches = number, runs.training_batches(self._run, number, task, task)
        runs.seed_task(self._run.seed, number)
        self._random = torch.get_rng_state()
        self.seconds.append([])

    def epoch(self) -> None:
        """Learns one epoch."""
        torch.set_rng_state(self._random)
        _, seconds = train(self.model, self.optimizer, self._batches, epochs=1, machine=self._run.machine)
        self._random = torch.get_rng_state()
        self.seconds[-1].append(seconds)

    def end(self) -> None:
        """Consolidates after a task, and tests on all tasks."""
        started = time.perf_counter()
        if self._number + 1 < len(self._tasks):
            runs.consolidate(self._run, self.optimizer, self._tasks[self._number])
        self.consolidation_seconds.append(time.perf_counter() - started)
        self.accuracy.append([accuracy_of(self.model, task, self._run.machine) for task in self._tasks])
        if isinstance(self.optimizer, npc_ext.NPC):
            self.skipped.append(share_skipped(self.optimizer))


def race(entries: Mapping[str, Run], out: Path, command: str) -> str:
    """Times runs of one experiment and protocol side by side, and writes how long each took.

    Args:
        entries: the runs, by name. The others are compared with the last one.
        out: folder of race-<experiment>-<widths>.json and .md.
        command: the command of the race, to be recorded.

    Returns:
        The table.

    Raises:
        DatasetError: a data set is missing.
    """
    first = next(iter(entries.values()))
    tasks = experiments.tasks_of(EXPERIMENTS[first.experiment], first.protocol, first.folder)
    tasks = [task.to(torch.device(first.machine.device)) for task in tasks]
    racers = {name: _Contestant(run, tasks) for name, run in entries.items()}
    with tqdm(total=len(tasks) * first.protocol.epochs, unit="epoch", leave=False) as bar:
        for number in range(len(tasks)):
            for racer in racers.values():
                racer.begin(number)
            for epoch in range(first.protocol.epochs):
                order = list(racers.values())
                for racer in order if epoch % 2 else reversed(order):
                    racer.epoch()
                bar.update()
            for racer in racers.values():
                racer.end()
    result = {
        "command": command,
        "environment": environment.describe(),
        "experiment": first.experiment,
        "protocol": asdict(first.protocol),
        "entries": {name: _result(racer, entries[name]) for name, racer in racers.items()},
    }
    text = table(result)
    out.mkdir(parents=True, exist_ok=True)
    stem = f"race-{first.experiment}-{'-'.join(map(str, first.protocol.channels))}"
    (out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{stem}.md").write_text(f"`{command}`\n\n{text}\n")
    return text


def _result(racer: _Contestant, run: Run) -> dict[str, Any]:
    return {
        "method": run.method,
        "hyperparameters": run.hyperparameters,
        "seconds of epochs, by task": racer.seconds,
        "seconds of consolidation": racer.consolidation_seconds,
        "share of gradients skipped after each task": racer.skipped,
        "accuracy after each task": racer.accuracy,
    }


def table(result: Mapping[str, Any]) -> str:
    """Total times, and times of each task relative to the last entry's. Quartiles are over epochs."""

    def by_task(entry: Mapping[str, Any]) -> Any:
        return np.array(entry["seconds of epochs, by task"]).sum(1) + entry["seconds of consolidation"]

    entries: dict[str, Any] = result["entries"]
    last, measure = list(entries.items())[-1]
    epochs, total = np.array(measure["seconds of epochs, by task"]), by_task(measure)
    lines = []
    for name, entry in entries.items():
        seconds = by_task(entry)
        low, high = np.quantile(np.array(entry["seconds of epochs, by task"]) / epochs, (0.25, 0.75))
        skipped = ", ".join(f"{share:.0%}" for share in entry["share of gradients skipped after each task"])
        lines.append(
            [
                name,
                f"{seconds.sum():.1f} s",
                f"{seconds.sum() / total.sum():.2f} ({low:.2f} to {high:.2f})",
                ", ".join(f"{ratio:.2f}" for ratio in seconds / total),
                skipped,
                f"{average_accuracy(entry['accuracy after each task']):.1%}",
            ]
        )
    header: Sequence[str] = ("", "total", f"of {last}'s (quartiles of epochs)", "by task", "skipped", "accuracy")
    return markdown(header, lines)
