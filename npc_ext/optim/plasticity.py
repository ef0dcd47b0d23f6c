"""The result of `plasticity()`: the plasticity of each layer, by name. It prints as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor

from .._names import ByLayer, aligned


class Printed:
    """The text of the plasticity of a layer's neurons or connections."""

    UNITS: ClassVar[str]

    frozen: float

    def _importance_and_rates(self) -> tuple[Tensor, Tensor]:
        """The importance and the learning rates of all units."""
        raise NotImplementedError

    def _cells(self) -> tuple[str, str, str, str]:
        """The number of units, the share of frozen ones, and the ranges of importance and of learning rates."""
        importance, learning_rate = self._importance_and_rates()
        return f"{importance.numel():,}", f"{self.frozen:.0%}", _range(importance), _range(learning_rate)

    def __repr__(self) -> str:
        units, frozen, importance, learning_rate = self._cells()
        return (
            f"{type(self).__name__}({units} {self.UNITS}, {frozen} frozen, importance {importance}, "
            f"learning rate {learning_rate})"
        )


@dataclass(frozen=True, repr=False)
class LayerPlasticity(Printed):
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

    UNITS = "neurons"

    importance: Tensor
    learning_rate: Tensor
    frozen: float
    nonfinite_steps: int
    frozen_for: Tensor
    gradients_skipped: float

    def _importance_and_rates(self) -> tuple[Tensor, Tensor]:
        return self.importance, self.learning_rate


_Plasticity = TypeVar("_Plasticity", bound=Printed)


class PlasticityByLayer(ByLayer[_Plasticity]):
    """The plasticity of layers by name. It prints as a table with a row for each layer."""

    def __repr__(self) -> str:
        units = next((layer.UNITS for layer in self.values()), "")
        rows = [(name or "(the model)", *layer._cells()) for name, layer in self.items()]
        return "\n".join(aligned(("layer", units, "frozen", "importance", "learning rate"), rows))


def _range(values: Tensor) -> str:
    """The smallest and the largest value, or the only one."""
    if not values.numel():
        return "none"
    smallest, largest = f"{values.min().item():.3g}", f"{values.max().item():.3g}"
    return smallest if smallest == largest else f"{smallest} to {largest}"
