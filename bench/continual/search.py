"""Hyperparameter search: one hyperparameter after the other, repeatedly, while the score improves.

Each walk has the same budget. A method whose hyperparameters trade off against each other has two walks (methods.py);
no other method has fewer than NPC.

The score of a configuration is the average accuracy after the last task on samples held out of the training set. Test
samples are never used. The walks use one seed. The best three configurations are then run from the other seeds, too,
and the best mean wins. All configurations are recorded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm.auto import tqdm

from . import metrics
from .methods import METHODS, Coordinate, with_choice
from .runs import Run, execute
from .store import Store, completed, hash_of, write

DIVERGED = -1.0
_FINALISTS = 3


@dataclass
class _Tried:
    settings: dict[str, Any]
    scores: list[float]  # by seed, as far as it was run

    @property
    def score(self) -> float:
        return DIVERGED if DIVERGED in self.scores else sum(self.scores) / len(self.scores)


def search(
    runs: Sequence[Run], store: Store, budget: int, results: Path, *, wait: bool = True, position: int = 0
) -> str:
    """Tries up to `budget` configurations in each walk and records them; returns a sentence about the best.

    Configurations that diverge do not count, so that a method is not searched less because its first ones diverge.

    Args:
        runs: runs of one method with different seeds; the search starts from their hyperparameters.
        store: store of the runs. A repeated search finds its earlier runs there.
        budget: number of configurations in a walk.
        results: folder of the record, <experiment>-<size>.json.
        wait: ignored; a search always waits for runs that another process is working on.
        position: line of the progress bar.

    Raises:
        ValueError: the runs are not tested on validation samples.
    """
    first = runs[0]
    if not first.protocol.validation:
        raise ValueError("a search needs runs on validation samples")
    walks = METHODS[first.method].search
    tried: dict[str, _Tried] = {}
    of_walk: set[str] = set()

    def may_go_on() -> bool:
        return sum(tried[key].score != DIVERGED for key in of_walk) < budget and len(of_walk) < 2 * budget

    def evaluate(run: Run, settings: dict[str, Any]) -> float:
        record = execute(replace(run, hyperparameters=settings), store, position=2 * position + 1)
        return DIVERGED if record.diverged_in is not None else metrics.average_accuracy(record.accuracy)

    name = f"{first.experiment} {first.method} search"
    with tqdm(total=budget * len(walks), desc=name, position=2 * position, leave=False) as bar:

        def score(settings: dict[str, Any]) -> float:
            key = hash_of(settings)
            if key not in tried:
                tried[key] = _Tried(settings, [evaluate(first, settings)])
                bar.update(tried[key].score != DIVERGED)
            of_walk.add(key)
            return tried[key].score

        for coordinates in walks:
            of_walk.clear()
            best = dict(first.hyperparameters)
            score(best)
            before = None
            while best != before and may_go_on():
                before = best
                for coordinate in coordinates:
                    best = _along(coordinate, best, score, may_go_on)
        finalists = sorted(tried.values(), key=lambda trial: trial.score, reverse=True)[:_FINALISTS]
        for trial in finalists:
            if trial.score != DIVERGED:
                trial.scores += [evaluate(run, trial.settings) for run in runs[1:]]
    chosen = max(finalists, key=lambda trial: trial.score)
    diverged = chosen.score == DIVERGED
    # Without a best configuration, runs use the method's defaults.
    _record(first, list(tried.values()), {} if diverged else chosen.settings, results)
    said = f"{len(tried)} configurations tried"
    if diverged:
        return f"{said}, and all diverged; start from a lower lr: --set {first.method}.lr=..."
    return f"{said}, best {chosen.score:.2%} with {chosen.settings}"


def _along(
    coordinate: Coordinate,
    start: dict[str, Any],
    score: Callable[[dict[str, Any]], float],
    may_go_on: Callable[[], bool],
) -> dict[str, Any]:
    """The best settings that differ from `start` in one hyperparameter."""
    name, best = coordinate.name, start
    choices: Sequence[Any] = coordinate.values or coordinate.factors
    for choice in choices:
        candidate = with_choice(start, name, choice if coordinate.values else _rounded(start[name] * choice))
        # Equal scores (diverged, or at chance) say nothing about the direction yet, so a walk continues.
        while may_go_on() and (score(candidate) > score(best) or (coordinate.walk and score(candidate) == score(best))):
            best = candidate
            if not coordinate.walk:
                break
            candidate = with_choice(best, name, _rounded(best[name] * choice))
        if coordinate.walk and best is not start:
            break
    return best


def _rounded(value: float) -> float:
    """Rounds to one significant digit, so that steps by factors of ten back and forth meet."""
    return float(f"{value:.0e}")


def _record(run: Run, tried: list[_Tried], best: dict[str, Any], results: Path) -> None:
    """Adds what was tried to the record, which has the other methods, too.

    First moves records of searches whose epochs ended with a smaller batch to <experiment>-<size>-cut.json.
    """
    path = results / f"{run.experiment}-{run.size}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        recorded = json.loads(path.read_text()) if path.exists() else {}
        if any(completed(other["protocol"])["batches"] == "cut" for other in recorded.get("methods", {}).values()):
            os.replace(path, path.with_stem(f"{path.stem}-cut"))
            recorded = {}
        entry = {
            "best": best,
            "protocol": asdict(run.protocol),
            "tried": [
                {
                    "settings": trial.settings,
                    "validation accuracy": None if trial.score == DIVERGED else round(trial.score, 5),
                    "seeds": len(trial.scores),
                }
                for trial in tried
            ],
        }
        by_method = {**recorded.get("methods", {}), run.method: entry}
        write(path, json.dumps({"experiment": run.experiment, "size": run.size, "methods": by_method}, indent=1) + "\n")
