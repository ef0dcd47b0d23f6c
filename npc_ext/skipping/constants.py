"""When parameters may count as constants: within a call of the whole model, and nowhere else.

The first weighted layer of a network has no gradient to hand on: where its neurons are all certified (certificate.py),
nothing upstream of its tap needs one. Such a layer rests while the model is called: its parameters, and the scales of a
normalization behind it, count as constants, so that no activation before the tap is kept and back-propagation ends
there. The tap measures as ever and gives the parameters the gradients of zeros that they would have had.

Whoever calls the model as a whole sees that in none of its outputs. Whoever calls it part by part takes a loss, or
registers a hook, anywhere in between, and so do hooks of others on its modules. There every layer computes something
that requires a gradient, as ever (its weight gradients are left out nevertheless, see forward.py).

A checkpoint computes a part of a call again during back-propagation; layers then do as they did in that call.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from .._torch import after_backward, is_looked_into
from ..neurons.layer import NeuronLayer
from ..neurons.tap import SharedStandIn, StandIn, TapHook, Unscriptable


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


class ConstantScales(SharedStandIn):
    """Its `__call__` stands in for the forward of a normalization whose scales are a layer's: constants at times.

    Each optimizer of the model has a layer of its own for them. Picklable with the model.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._usual(self._module, *arguments, **options)
        constant = [layer for layer in self._users if layer.resting]
        if not constant:
            return self._usual(self._module, *arguments, **options)
        parameters = [one for one in self._module.parameters(recurse=False) if one.requires_grad]
        ours = {id(own.parameter) for own in constant[0].parameters}
        if not all(id(one) in ours for one in parameters):  # somebody calls the module with others
            return self._usual(self._module, *arguments, **options)
        for one in parameters:
            one.requires_grad_(False)
        try:
            return self._usual(self._module, *arguments, **options)
        finally:
            for one in parameters:
                one.requires_grad_(True)


def let_rest(model: nn.Module, layers: Sequence[NeuronLayer], trained: Collection[int]) -> list[Any]:
    """Prepares the normalizations of layers that rest at times; returns handles that undo it by `remove()`.

    Args:
        model: the network.
        layers: those that may rest.
        trained: the ids of the parameters that the optimizer trains.
    """
    handles: list[Any] = []
    for layer in layers:
        owners = {own.name.rpartition(".")[0] for own in layer.parameters} - {layer.name}
        for module in map(model.get_submodule, sorted(owners)):
            ours = all(id(parameter) in trained for parameter in module.parameters(recurse=False))
            forward = StandIn.of(module) if "forward" in module.__dict__ else ConstantScales(module)
            # What somebody else put there stays; its scales then keep back-propagation going, which changes nothing.
            if ours and isinstance(forward, ConstantScales):
                handles.append(forward.join(layer))
    return handles
