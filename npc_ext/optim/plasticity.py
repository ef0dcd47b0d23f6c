"""The result of `plasticity()` for one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LayerPlasticity:
    """The plasticity of a layer at this moment.

    Attributes:
        importance: (N,) float32, the moving average C of eq. 4; its mean tends to 1.
        learning_rate: (N,) float32, eta of eq. 7 under the learning rate of the layer's weight.
        frozen: the share of neurons, from 0 to 1, for which eq. 7 is 0, regardless of the group's learning rate.
        nonfinite_steps: in how many steps the measured importance was not finite and was left out.
        frozen_for: (N,) int64, the number of steps for which each neuron is certain to stay frozen with the current
            options, regardless of the data: 0 if it is not certain, at most a million.
        gradients_skipped: the share of neurons, from 0 to 1, for which the last step's backward passes skipped the
            weight gradients; 0 if the next pass computes them again.
    """

    importance: Tensor
    learning_rate: Tensor
    frozen: float
    nonfinite_steps: int
    frozen_for: Tensor
    gradients_skipped: float

    def __repr__(self) -> str:
        return described(self, self.importance, self.learning_rate, "neurons")


def described(plasticity: Any, importance: Tensor, learning_rate: Tensor, units: str) -> str:
    """The text of the plasticity of neurons or connections, with all their importance and learning rates."""
    return (
        f"{type(plasticity).__name__}({importance.numel()} {units}, {plasticity.frozen:.0%} frozen, importance "
        f"{_spread(importance)}, learning rate {_spread(learning_rate)})"
    )


def _spread(values: Tensor) -> str:
    """A tensor's minimum, maximum and mean as text."""
    if not values.numel():
        return "of none"
    minimum, mean, maximum = values.min().item(), values.mean().item(), values.max().item()
    return f"{minimum:.3g} to {maximum:.3g} (mean {mean:.3g})"
