"""When parameters may count as constants: within a call of the whole model, and nowhere else.

Layers rest (resting.py): what they compute then requires no gradient. Whoever calls the model as a
whole sees that in none of its outputs. Whoever calls it part by part takes a loss, or registers a hook, anywhere in
between, and so do hooks of others on its modules. There every layer computes something that requires a gradient, as
ever (its weight gradients are left out nevertheless, see frozen_rows.py).

A checkpoint computes a part of a call again during back-propagation; layers then do as they did in that call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ._torch import after_backward, is_looked_into
from .neurons import NeuronLayer
from .tap import TapHook, Unscriptable


class Calls(Unscriptable):
    """Forward pre-hook and forward hook of the whole model; picklable with it.

    Args:
        layers: those that may rest; none of them does so any more when a call is over.
    """

    def __init__(self, model: nn.Module, layers: Sequence[NeuronLayer]) -> None:
        self._model: Any = model
        self._layers = layers
        self._depth = 0  # a model may call itself
        self._is_looked_into: bool | None = None  # not known yet in this call
        self._asked = False  # whether layers may have gone to rest

    def attach(self) -> list[Any]:
        """Puts it into the model; returns handles that undo it by `remove()`."""
        return [
            self._model.register_forward_pre_hook(self),
            self._model.register_forward_hook(self, always_call=True),  # also after an exception
        ]

    def __call__(self, model: nn.Module, inputs: Any, *output: Any) -> None:
        """As a forward hook it is called with the output, as a forward pre-hook without."""
        if torch.compiler.is_compiling():
            return
        if output:
            self._depth = max(self._depth - 1, 0)
        else:
            self._depth += 1
        if self._depth == (0 if output else 1):
            self._wake_all_up()

    def allow_constants(self) -> bool:
        """Whether this is within a call of the model into which nobody looks."""
        if self._depth == 0:
            return False
        self._asked = True
        if self._is_looked_into is None:
            self._is_looked_into = is_looked_into(self._model, (TapHook, Calls))
        return not self._is_looked_into

    def end(self) -> None:
        """Ends a call that was broken off so that no hook could tell, as by Ctrl-C."""
        self._depth = 0
        self._wake_all_up()

    def end_after_backward(self) -> None:
        """Within a backward pass: has layers wake up when that is over."""
        self._asked = True
        after_backward(self._backward_is_over)

    def _backward_is_over(self) -> None:
        if self._depth == 0:  # else it was a part of the call
            self._wake_all_up()

    def _wake_all_up(self) -> None:
        if not self._asked:
            return
        self._asked, self._is_looked_into = False, None
        for layer in self._layers:
            layer.wake_up()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_depth": 0}
