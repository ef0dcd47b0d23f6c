"""Metrics of learning in a row, from a table of accuracies.

`accuracy[t][k]` is the accuracy on task k after task t was learned. Entries that were not measured are None.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Accuracy = Sequence[Sequence["float | None"]]


def average_accuracy(accuracy: Accuracy) -> float:
    """Mean accuracy of all tasks after the last one."""
    return float(np.mean(_last(accuracy)))


def forgetting(accuracy: Accuracy) -> float:
    """The mean drop of all tasks but the last from their best accuracy since they were learned.

    Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018.
    """
    tasks = len(accuracy)
    best = [max(_known(accuracy[t][k]) for t in range(k, tasks - 1)) for k in range(tasks - 1)]
    return float(np.mean(np.array(best) - _last(accuracy)[:-1]))


def backward_transfer(accuracy: Accuracy) -> float:
    """The mean gain (below 0: loss) of all tasks but the last since they were learned: mean of A[T][k] - A[k][k].

    Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017.
    """
    return float(np.mean((_last(accuracy) - _diagonal(accuracy))[:-1]))


def forward_transfer(accuracy: Accuracy, single: Accuracy) -> float:
    """The mean gain of all tasks but the first over a fresh network, when learned: mean of A[k][k] - S[k][k]."""
    return float(np.mean((_diagonal(accuracy) - _diagonal(single))[1:]))


def _last(accuracy: Accuracy) -> np.ndarray:
    return np.array([_known(value) for value in accuracy[-1]])


def _diagonal(accuracy: Accuracy) -> np.ndarray:
    return np.array([_known(row[k]) for k, row in enumerate(accuracy)])


def _known(value: float | None) -> float:
    if value is None:
        raise ValueError("the table of accuracies lacks a value that this metric needs")
    return value
