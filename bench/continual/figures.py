"""Figures of learning in a row. A line is the mean over seeds, a band its standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .methods import BOUNDS
from .metrics import Accuracy, average_accuracy
from .store import Record

# One table for each seed.
Tables = Sequence[Accuracy]
_COLORS = {
    "npc": "#4c72b0",
    "npc, shuffled": "#55a868",
    "sgd": "#c44e52",
    "sgd, falling rate": "#dd8452",
    "cpc": "#64b5cd",
    "ewc": "#dd8452",
    "mas": "#55a868",
    "si": "#8172b3",
    "ssl": "#937860",
    "joint": "#222222",
    "single": "#999999",
}
_COLUMNS = 3


def average(tables: Mapping[str, Tables]) -> Figure:
    """Average accuracy of the tasks so far after each task. Dashed: the bounds' after the last task."""
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes: Any = figure.subplots()
    for method, repeated in tables.items():
        if _is_bound(method):
            level = float(np.mean([average_accuracy(accuracy) for accuracy in repeated]))
            axes.axhline(level, color=_color(method), linestyle="--", linewidth=1, label=method)
            continue
        so_far = np.array([[np.mean(_known(row[: t + 1])) for t, row in enumerate(table)] for table in repeated])
        _line(axes, method, np.arange(1, so_far.shape[1] + 1), so_far)
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("average accuracy of the tasks so far")
    _finish(axes)
    # Outside of the axes, where it hides no line.
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside right upper", fontsize=9)
    return figure


def per_task(tables: Mapping[str, Tables], tasks: Sequence[str]) -> Figure:
    """Accuracy of each task from when it is learned to the end."""
    count = len(tasks)
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.1 * columns + 0.4, 2.4 * rows), layout="constrained")
    grid: Any = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[count:]:
        axes.remove()
    for k, axes in enumerate(grid.flat[:count]):
        for method, repeated in tables.items():
            if not _is_bound(method):
                course = np.array([_known(row[k] for row in table[k:]) for table in repeated])
                _line(axes, method, np.arange(k + 1, count + 1), course)
        axes.set_title(f"task {k + 1}: {tasks[k]}", fontsize=10)
        axes.set_xlim(0.7, count + 0.3)
        axes.set_xlabel("tasks learned", fontsize=9)
        _finish(axes)
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy")
    labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(*labels, frameon=False, loc="outside upper center", ncols=4, fontsize=9)
    return figure


def activation(records: Mapping[str, Sequence[Record]]) -> Figure:
    """Change of each hidden neuron's activation over task 2 against its importance after task 1, for all seeds."""
    figure = Figure(figsize=(3.4 * len(records), 3.2), layout="constrained")
    grid: Any = figure.subplots(1, len(records), sharey=True, squeeze=False)
    for axes, (method, repeated) in zip(grid[0], records.items(), strict=True):
        for record in repeated:
            pairs = zip(record.extra["importance"], record.extra["change"], strict=True)
            known = np.array([(importance, change) for importance, change in pairs if change is not None])
            axes.scatter(*known.T, s=6, color=_color(method), alpha=0.6, linewidths=0)
        axes.set_title(method, fontsize=10)
        axes.set_xlabel("importance after task 1")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("relative change over task 2")
    grid[0, 0].set_ylim(bottom=0)
    return figure


def _known(values: Any) -> list[float]:
    return [float(value) for value in values]


def _is_bound(method: str) -> bool:
    return method.split()[0] in BOUNDS


def _color(method: str) -> str | None:
    name = method.lower()
    return _COLORS.get(name) or _COLORS.get(name.split()[0])


def _line(axes: Any, method: str, x: np.ndarray, values: np.ndarray) -> None:
    mean = values.mean(0)
    axes.plot(x, mean, marker="o", markersize=4, color=_color(method), label=method)
    if len(values) > 1:
        error = values.std(0, ddof=1) / np.sqrt(len(values))
        axes.fill_between(x, mean - error, np.minimum(mean + error, 1), color=_color(method), alpha=0.2, linewidth=0)
    axes.set_xticks(x if len(x) > 1 else [x[0]])


def _finish(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
