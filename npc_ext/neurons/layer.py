"""What the neurons of one layer are: their parameters, where they are measured, and the sink of their importance."""

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
    """A parameter whose dimension `dim` counts neurons; `groups` > 1 only for grouped transposed convolutions.

    Its first row belongs to neuron `first` of its layer.
    """

    name: str
    parameter: nn.Parameter
    dim: int = 0
    groups: int = 1
    first: int = 0


@dataclass(frozen=True)
class TapPoint:
    """A place in the model where a layer's activation passes: what a module returns, or what it takes.

    Or the input projection of attention, in the middle of a module (attention.py).

    `copy`: what follows works in place, or is unknown, so the tap hands on a copy. `in_backward`: the module is an
    `npc_ext.nn.ReLU` that needs no tap. A tensor of `unbatched_ndim` dimensions is a single sample.
    """

    module: str
    where: str  # "output", "input" or "input projection"
    channel_dim: int
    batch_dim: int
    unbatched_ndim: int
    copy: bool = False
    in_backward: bool = False

    @property
    def missing_dim(self) -> int:
        """Where a single sample lacks the dimension of samples."""
        return self.batch_dim if self.unbatched_ndim > 1 else 0

    def __str__(self) -> str:
        return f"{self.where} of {self.module or '(the model)'}"


NO_BACKWARD_PASS = -1


def _nothing() -> None:
    pass


@dataclass(eq=False)
class NeuronLayer:
    """The neurons of one weighted layer (or of several that share their weight).

    Attributes:
        name: the layer's name in the model.
        neurons: N.
        fan_in: weights per neuron.
        parameters: what belongs to the neurons, weight first: bias, and scales and biases of a following
            normalization.
        points: where their activation is measured.
        note: what a reader of the table should know.
        sink: (N,) float32 leaf whose gradient is the importance measured since it was last cleared; -0.0 where a neuron
            received no gradient.
        gradients_skipped: the share of neurons, from 0 to 1, whose weight gradients the last step did without.
        resting: whether the layer is measured, but its parameters are constants, in the call that is going on
            (skipping/constants.py).
    """

    name: str
    neurons: int
    fan_in: int
    parameters: tuple[NeuronParameter, ...]
    points: tuple[TapPoint, ...]
    note: str
    sink: Tensor
    measure: Callable[..., Tensor] = ops.importance_of_checked
    relu_backward: Callable[..., tuple[Tensor, Tensor]] = ops.relu_backward_importance_of_checked
    gradients_skipped: float = field(default=0.0, repr=False)
    resting: bool = field(default=False, repr=False)
    note_rest: Callable[[], None] | None = field(default=None, repr=False)  # to be called by what leaves gradients out
    checked: bool = field(default=False, repr=False)  # for a point before a normalization, see tap.py
    # Of tap.drop_what_was_cleared: the last backward pass since the last step, the version of the weight's gradient
    # after it, and whether it left gradients. `fully_shard` keeps those that are not synchronized yet where only it
    # finds them.
    last_backward_pass: int = field(default=NO_BACKWARD_PASS, repr=False)
    expected_version: int = field(default=0, repr=False)
    has_gradients: bool = field(default=True, repr=False)
    forget_left_out: Callable[[], None] = field(default=_nothing, repr=False)  # of certificates

    @property
    def module(self) -> str:
        """The name of the module that has the weight."""
        return self.parameters[0].name.rpartition(".")[0]

    def add_note(self, text: str) -> None:
        """Adds to what a reader of the table should know."""
        self.note = f"{self.note}; {text}" if self.note else text

    def trains(self) -> bool:
        """Whether any of the neurons' parameters requires a gradient."""
        for own in self.parameters:  # no generator: this is called in every forward pass
            if own.parameter.requires_grad:
                return True
        return False

    @functools.cached_property
    def sharded(self) -> bool:
        """Whether the parameters are sharded over processes."""
        return any(is_sharded(own.parameter) for own in self.parameters)

    def note_gradients(self) -> None:
        """Notes whether there are gradients; called when a backward pass is over."""
        self.has_gradients = any(own.parameter.grad is not None for own in self.parameters)

    def wake_up(self) -> None:
        """Back to usual, in the next call."""
        self.resting, self.note_rest = False, None

    def trained(self) -> list[nn.Parameter]:
        """Those of the neurons' parameters that require a gradient."""
        return [own.parameter for own in self.parameters if own.parameter.requires_grad]

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts without certificates.
        usual = {"resting": False, "note_rest": None, "forget_left_out": _nothing}
        return {**self.__dict__, **usual}


@dataclass(frozen=True)
class OtherParameter:
    """A parameter that belongs to no neuron, and why."""

    name: str
    parameter: nn.Parameter
    reason: str
