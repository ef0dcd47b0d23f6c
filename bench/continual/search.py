"""Tuning: one hyperparameter after the other, and again while that helps; the same budget for every method.

Configurations are scored by the average accuracy after the last task on samples held out of the training set; test
samples are never looked at. All that was tried is recorded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm.auto import tqdm

from . import metrics
from .methods import METHODS, Coordinate, with_choice
from .runs import Run, execute
from .store import Store, hash_of, write

DIVERGED = -1.0


def search(
    runs: Sequence[Run], store: Store, budget: int, results: Path, *, wait: bool = True, position: int = 0
) -> str:
    """Tries up to `budget` configurations of a method and records them; returns a sentence about the best.

    Args:
        runs: of one method, with different seeds, from whose hyperparameters the search starts.
        store: of the runs, in which a repeated search finds those it has done.
        budget: how many configurations.
        results: the folder of the record, <experiment>-<size>.json.
        wait: has no effect; a search always waits for runs that another process holds.
        position: the line of the progress bar.

    Raises:
        ValueError: the runs are not on validation samples.
    """
    first = runs[0]
    if not first.protocol.validation:
        raise ValueError("a search needs runs on validation samples")
    method = METHODS[first.method]
    tried: dict[str, tuple[dict[str, Any], float]] = {}

    with tqdm(
        total=budget, desc=f"{first.experiment} {first.method} search", position=2 * position, leave=False
    ) as bar:

        def score(settings: dict[str, Any]) -> float:
            key = hash_of(settings)
            if key not in tried:
                repeated = [
                    execute(replace(run, hyperparameters=settings), store, position=2 * position + 1) for run in runs
                ]
                scores = [metrics.average_accuracy(record.accuracy) for record in repeated]
                if any(record.diverged_in is not None for record in repeated):
                    scores = [DIVERGED]
                tried[key] = settings, sum(scores) / len(scores)
                bar.update()
            return tried[key][1]

        best = dict(first.hyperparameters)
        score(best)
        before = None
        while best != before and len(tried) < budget:
            before = best
            for coordinate in method.search:
                best = _along(coordinate, best, score, lambda: len(tried) < budget)
    if score(best) == DIVERGED:  # runs are then left to the method's own defaults
        _record(first, len(runs), list(tried.values()), {}, results)
        return (
            f"{len(tried)} configurations tried, and all diverged; start from a lower lr: --set {first.method}.lr=..."
        )
    _record(first, len(runs), list(tried.values()), best, results)
    return f"{len(tried)} configurations tried, best {score(best):.2%} with {best}"


def _along(
    coordinate: Coordinate,
    start: dict[str, Any],
    score: Callable[[dict[str, Any]], float],
    may_go_on: Callable[[], bool],
) -> dict[str, Any]:
    """The best settings that differ from `start` in one hyperparameter only."""
    name, best = coordinate.name, start
    choices: Sequence[Any] = coordinate.values or coordinate.factors
    for choice in choices:
        candidate = with_choice(start, name, choice if coordinate.values else _rounded(start[name] * choice))
        # Where a method diverges, nothing says yet whether the direction is good: the walk goes on.
        while may_go_on() and (score(candidate) > score(best) or (coordinate.walk and score(best) == DIVERGED)):
            best = candidate
            if not coordinate.walk:
                break
            candidate = with_choice(best, name, _rounded(best[name] * choice))
        if coordinate.walk and best is not start:
            break
    return best


def _rounded(value: float) -> float:
    """To one significant digit, so that factors of ten there and back meet."""
    return float(f"{value:.0e}")


def _record(
    run: Run, seeds: int, tried: list[tuple[dict[str, Any], float]], best: dict[str, Any], results: Path
) -> None:
    """Writes what was tried beside what is recorded of other methods."""
    path = results / f"{run.experiment}-{run.size}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        recorded = json.loads(path.read_text()) if path.exists() else {}
        entry = {
            "best": best,
            "seeds": seeds,
            "protocol": asdict(run.protocol),
            "tried": [
                {"settings": settings, "validation accuracy": None if value == DIVERGED else round(value, 5)}
                for settings, value in tried
            ],
        }
        by_method = {**recorded.get("methods", {}), run.method: entry}
        write(path, json.dumps({"experiment": run.experiment, "size": run.size, "methods": by_method}, indent=1) + "\n")
