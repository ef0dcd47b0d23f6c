"""How long a neuron is certain to stay frozen, whatever the data.

Normalized importance is never negative, so in eq. 4, C loses at most a factor of delta in each step. If

    delta ** m * C_i >= beta,

eq. 7 gives eta_i = 0 in each of the next m steps.

**Rounding.** Let u = 2 ** -24, half the distance from 1 to the next float32. A step computes
C' = fl(fl(fl(delta) * C) + r) with r >= 0. fl(delta) and the product lose at most a factor of 1 - u each. The sum loses
nothing: rounding is monotonic and the first term is already a float32, so C' is at least that term, also with a fused
multiply-add. So C' >= delta (1 - u)^2 C, which is more than delta (1 - 4 u) C. In eq. 7, beta is rounded to float32,
and so is beta / C, which is at most 1 where C >= fl(beta). The bound here is C >= beta (1 + 8 u), which also covers the
rounding of the comparison. All of this holds only above the smallest normal float32, so the bound is never below it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_U = 2.0**-24
_SMALLEST_NORMAL = 2.0**-126
# plasticity() counts no more steps than this.
LONGEST = 10**6


def frozen_for(importance: Tensor, beta: float, delta: float) -> Tensor:
    """The number of coming steps in which each neuron is certain not to move, whatever the data.

    Args:
        importance: (N,) float32, C of eq. 4.
        beta: the constant of eq. 7.
        delta: the constant of eq. 4.

    Returns:
        (N,) int64, 0 where nothing is certain, at most `LONGEST`.
    """
    surplus = (importance.double() / _frozen_from(beta)).log()
    steps = surplus / -math.log(delta * (1 - 4 * _U)) if delta > 0 else torch.zeros_like(surplus)
    return steps.nan_to_num(0.0, LONGEST, 0.0).clamp(0, LONGEST).floor().long()


def least_importance(beta: float, delta: float, steps: int) -> float:
    """The least C with which a neuron is certain not to move in the next `steps` steps."""
    decay = (delta * (1 - 4 * _U)) ** steps
    return _frozen_from(beta) / decay if decay > 0 else math.inf


def _frozen_from(beta: float) -> float:
    return max(beta * (1 + 8 * _U), 2 * _SMALLEST_NORMAL)
