"""What `plasticity()` returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerPlasticity:
    """How plastic one layer is at this moment.

    Attributes:
        importance: (N,) float32, the moving average C of eq. 4; its mean tends to 1.
        learning_rate: (N,) float32, eta of eq. 7 under the learning rate of the layer's weight.
        frozen: the share of neurons, from 0 to 1, for which eq. 7 is 0, whatever the learning rate of the group.
        nonfinite_steps: in how many steps the measured importance was not finite and was left out.
        frozen_for: (N,) int64, for how many more steps each neuron is certain not to move whatever the data, under the
            constants in force; 0 where that is not certain, at most a million.
        gradients_skipped: the share of neurons, from 0 to 1, whose weight gradients were left out of the last step's
            backward passes; 0 if the next one computes them again.
    """

    importance: Tensor
    learning_rate: Tensor
    frozen: float
    nonfinite_steps: int
    frozen_for: Tensor
    gradients_skipped: float

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.importance.numel()} neurons, {self.frozen:.0%} frozen, importance "
            f"{spread(self.importance)}, learning rate {spread(self.learning_rate)})"
        )


def spread(values: Tensor) -> str:
    """A tensor's least, mean and largest value, for a line of text."""
    if not values.numel():
        return "of none"
    least, mean, most = values.min().item(), values.mean().item(), values.max().item()
    return f"{least:.3g} to {most:.3g} (mean {mean:.3g})"
