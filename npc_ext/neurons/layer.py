"""The neurons of a layer: their parameters, where they are measured, and the sink of their importance.

A tap is an identity that a hook places in the model where a layer's activation passes (tap.py). Its backward pass
measures the importance of the neurons. A sink is a small leaf tensor with one number per neuron. Its gradient is the
importance that the layer's taps have measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import ops
from ..distributed.shards import is_sharded

PROJECTION = "input projection"


@dataclass(frozen=True)
class NeuronParameter:
    """A parameter of neurons.

    Attributes:
        name: its name in the model.
        parameter: the parameter.
        dim: the dimension that counts neurons.
        groups: more than 1 only for grouped transposed convolutions.
        first: the neuron of the layer to which its first row belongs.
    """

    name: str
    parameter: nn.Parameter = field(repr=False)
    dim: int = 0
    groups: int = 1
    first: int = 0

    @property
    def neurons(self) -> int:
        """The number of neurons to which it belongs."""
        return self.parameter.shape[self.dim] * self.groups


@dataclass(frozen=True)
class TapPoint:
    """A place in the model where a layer's activation passes.

    Attributes:
        module: the name of a module.
        where: "output" or "input" of the module, or "input projection" of attention, which is inside the module
            (attention.py).
        channel_dim: the dimension that counts neurons.
        batch_dim: the dimension that counts samples.
        unbatched_ndim: a tensor with this number of dimensions is a single sample.
        copy: the tap returns a copy, because what follows works in place or is unknown.
        in_backward: the module is an `npc_ext.nn.ReLU`, which measures without a tap.
    """

    module: str
    where: str
    channel_dim: int
    batch_dim: int
    unbatched_ndim: int
    copy: bool = False
    in_backward: bool = False

    @property
    def missing_dim(self) -> int:
        """The position of the dimension that a single sample lacks."""
        return self.batch_dim if self.unbatched_ndim > 1 else 0

    def __str__(self) -> str:
        return f"{self.where} of {self.module or '(the model)'}"


NO_BACKWARD_PASS = -1


def _nothing() -> None:
    pass


@dataclass(eq=False)
class NeuronLayer:
    """The neurons of a weighted layer, or of several layers that share a weight.

    Attributes:
        name: the layer's name in the model.
        neurons: N.
        fan_in: weights per neuron.
        parameters: the parameters of the neurons: the weight, then the bias, and the scales and biases of a following
            normalization.
        points: where their activation is measured.
        note: a remark for the reader of the table.
        sink: (N,) float32 leaf. Its gradient is the importance measured since it was last cleared, and -0.0 for
            neurons that received no gradient.
        measure: the operation that computes importance from an activation and its gradient.
        relu_backward: the operation that computes it together with ReLU's backward pass.
        gradients_skipped: the share of neurons, from 0 to 1, whose weight gradients were skipped for the last step.
        note_rest: set while the layer rests. Its tap calls it in the backward pass.
        forget_skipped: called when the layer's gradients were cleared. It clears the notes of skipped gradients.
        checked: whether the first measurement was checked for a point before a normalization (tap.py).
        last_backward_pass: the number of the last backward pass since the last step.
        expected_version: the version of the weight's gradient after that backward pass.
        has_gradients: whether there are gradients after that backward pass. `fully_shard` stores gradients that are not
            synchronized yet elsewhere.
    """

    name: str
    neurons: int
    fan_in: int
    parameters: tuple[NeuronParameter, ...]
    points: tuple[TapPoint, ...]
    note: str
    sink: Tensor = field(repr=False)
    measure: Callable[..., Tensor] = field(default=ops.importance_of_checked, repr=False)
    relu_backward: Callable[..., tuple[Tensor, Tensor]] = field(
        default=ops.relu_backward_importance_of_checked, repr=False
    )
    gradients_skipped: float = field(default=0.0, repr=False)
    note_rest: Callable[[], None] | None = field(default=None, repr=False)
    forget_skipped: Callable[[], None] = field(default=_nothing, repr=False)
    # For the tap (drop_cleared_importance in tap.py).
    checked: bool = field(default=False, repr=False)
    last_backward_pass: int = field(default=NO_BACKWARD_PASS, repr=False)
    expected_version: int = field(default=0, repr=False)
    has_gradients: bool = field(default=True, repr=False)

    @property
    def module(self) -> str:
        """The name of the module that has the weight."""
        return self.parameters[0].name.rpartition(".")[0]

    def add_note(self, text: str) -> None:
        """Adds a remark for the reader of the table."""
        self.note = f"{self.note}; {text}" if self.note else text

    @property
    def resting(self) -> bool:
        """Whether its parameters are constants in the current call of the model (skipping/constants.py)."""
        return self.note_rest is not None

    def trains(self) -> bool:
        """Whether any of the neurons' parameters requires a gradient."""
        for neuron_parameter in self.parameters:  # every forward pass calls this, and a generator is slower
            if neuron_parameter.parameter.requires_grad:
                return True
        return False

    @functools.cached_property
    def sharded(self) -> bool:
        """Whether the parameters are sharded over processes."""
        return any(is_sharded(p.parameter) for p in self.parameters)

    def note_gradients(self) -> None:
        """Notes whether there are gradients. Call it at the end of a backward pass."""
        self.has_gradients = any(p.parameter.grad is not None for p in self.parameters)

    def trained(self) -> list[nn.Parameter]:
        """The parameters of the neurons that require a gradient."""
        return [p.parameter for p in self.parameters if p.parameter.requires_grad]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "note_rest": None, "forget_skipped": _nothing}  # a copy starts without certificates


@dataclass(frozen=True)
class OtherParameter:
    """A parameter that belongs to no neuron, and the reason."""

    name: str
    parameter: nn.Parameter = field(repr=False)
    reason: str
