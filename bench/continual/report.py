"""Tables and figures of learned sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .metrics import average_accuracy, forgetting


@dataclass
class Run:
    """What learning a sequence of tasks came to.

    `accuracy[t][k]` is the accuracy on task k after task t; `seconds_per_step` the mean of training steps alone.
    """

    accuracy: list[list[float]]
    steps: int
    seconds_per_step: float


COLORS = {"SGD": "#c44e52", "NPC": "#4c72b0"}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def percent(values: Sequence[float]) -> str:
    """Mean ± standard error, in percent."""
    mean, error = mean_and_error(values)
    return f"{100 * mean:.1f} ± {100 * error:.1f}"


def table(runs: Mapping[str, Sequence[Run]], tasks: Sequence[str]) -> str:
    """A Markdown table: accuracy per task after the last, average, forgetting, seconds per step; over seeds."""
    header = ["", *tasks, "average", "forgetting", "ms per step"]
    rows = []
    for method, repeated in runs.items():
        per_task = [percent([run.accuracy[-1][k] for run in repeated]) for k in range(len(tasks))]
        milliseconds, error = mean_and_error([1000 * run.seconds_per_step for run in repeated])
        rows.append(
            [
                method,
                *per_task,
                f"**{percent([average_accuracy(run.accuracy) for run in repeated])}**",
                percent([forgetting(run.accuracy) for run in repeated]),
                f"{milliseconds:.2f} ± {error:.2f}",
            ]
        )
    return markdown(header, rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in plain text, too."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def figure_average(runs: Mapping[str, Sequence[Run]]) -> Figure:
    """Average accuracy over the tasks so far, after each task; the band is the standard error over seeds."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes: Any = figure.subplots()
    for method, repeated in runs.items():
        so_far = np.array([[np.mean(row[: t + 1]) for t, row in enumerate(run.accuracy)] for run in repeated])
        _line(axes, method, np.arange(1, so_far.shape[1] + 1), so_far)
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("average accuracy of the tasks so far")
    _finish(axes)
    axes.legend(frameon=False, loc="lower left")
    return figure


def figure_per_task(runs: Mapping[str, Sequence[Run]], tasks: Sequence[str]) -> Figure:
    """Accuracy of every single task from when it is learned to the end."""
    count = len(tasks)
    figure = Figure(figsize=(2.2 * count, 2.6), layout="constrained")
    grid: Any = figure.subplots(1, count, sharey=True, squeeze=False)
    for k, axes in enumerate(grid[0]):
        for method, repeated in runs.items():
            course = np.array([[row[k] for row in run.accuracy[k:]] for run in repeated])
            _line(axes, method, np.arange(k + 1, count + 1), course)
        axes.set_title(f"task {k + 1}: {tasks[k]}", fontsize=10)
        axes.set_xlim(0.7, count + 0.3)
        axes.set_xlabel("tasks learned", fontsize=9)
        _finish(axes)
    grid[0, 0].set_ylabel("accuracy")
    grid[0, 0].legend(frameon=False, loc="lower left", fontsize=9)
    return figure


def _line(axes: Any, method: str, x: np.ndarray, values: np.ndarray) -> None:
    mean, error = values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))
    color = COLORS.get(method)
    axes.plot(x, mean, marker="o", markersize=4, color=color, label=method)
    axes.fill_between(x, mean - error, np.minimum(mean + error, 1), color=color, alpha=0.2, linewidth=0)
    axes.set_xticks(x if len(x) > 1 else [x[0]])


def _finish(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
