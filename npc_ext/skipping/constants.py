"""Treats the parameters of a layer as constants during one call of the model.

A tap is an identity that is placed behind a layer. Its backward pass measures the layer's importance, and returns it as
the gradient of the layer's sink, a small leaf tensor (neurons/tap.py). Before the tap of a network's first weighted
layer, back-propagation only computes the gradients of the layer's parameters, and those of a normalization between
layer and tap. If no neuron of the layer can move in the next step (certificate.py), nothing there needs a gradient.

Such a layer rests: during the call, its parameters are constants. No activation before the tap is kept, and
back-propagation ends at the tap. The tap measures as usual, and gives the parameters the zero gradients that they would
have had.

This does not change the outputs of the model. But code that calls the model part by part may compute a loss in between,
and hooks of other code may read what comes before the tap. So layers only rest in a call of the whole model, and only
if no module has such hooks. Otherwise, the parameters require gradients as usual, and only weight gradients are skipped
(forward.py).

A checkpoint computes a part of a call again during back-propagation. Layers then behave as in that call.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from .._torch import after_backward, is_looked_into
from ..neurons.layer import NeuronLayer
from ..neurons.stand_in import StandIn, Unscriptable
from ..neurons.tap import TapHook


class Calls(Unscriptable):
    """Forward pre-hook and forward hook of the whole model, which know whether the model is being called.

    They can be pickled with the model.

    Attributes:
        layers: the layers that may rest. When a call is over, none of them rests any more.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self.layers: list[NeuronLayer] = []
        self._depth = 0  # of nested calls: a model may call itself
        self._is_looked_into: bool | None = None  # None: not known yet in this call
        self._asked = False  # whether any layer may be resting

    def attach(self) -> list[Any]:
        """Registers the hooks; returns their handles."""
        return [
            self._model.register_forward_pre_hook(self),
            self._model.register_forward_hook(self, always_call=True),  # also after an exception
        ]

    def __call__(self, model: nn.Module, inputs: Any, *output: Any) -> None:
        """A forward hook is called with the output, a forward pre-hook without."""
        if torch.compiler.is_compiling():
            return
        if output:
            self._depth = max(self._depth - 1, 0)
        else:
            self._depth += 1
        if self._depth == (0 if output else 1):
            self._wake_all_up()

    def allow_constants(self) -> bool:
        """Whether the model is being called, and no other code reads the outputs of its modules."""
        if self._depth == 0:
            return False
        self._asked = True
        if self._is_looked_into is None:
            self._is_looked_into = is_looked_into(self._model, (TapHook, Calls))
        return not self._is_looked_into

    def end(self) -> None:
        """Ends a call that was interrupted before its forward hook was called, for example by Ctrl-C."""
        self._depth = 0
        self._wake_all_up()

    def end_after_backward(self) -> None:
        """Wakes up all layers when the current backward pass is over."""
        self._asked = True
        after_backward(self._backward_is_over)

    def _backward_is_over(self) -> None:
        if self._depth == 0:  # otherwise, the backward pass was part of the call
            self._wake_all_up()

    def _wake_all_up(self) -> None:
        if not self._asked:
            return
        self._asked, self._is_looked_into = False, None
        for layer in self.layers:
            layer.note_rest = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_depth": 0}


class ConstantScales(StandIn):
    """Replaces a normalization's forward; its parameters are constants while their layer rests.

    Its users are layers, one for each optimizer of the model. It can be pickled with the model.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._usual(self._module, *arguments, **options)
        parameters = self._constants()
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            return self._usual(self._module, *arguments, **options)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def _constants(self) -> list[nn.Parameter]:
        """The parameters that are constants in this call."""
        resting = next((layer for layer in self._users if layer.resting), None)
        if resting is None:
            return []
        parameters = [parameter for parameter in self._module.parameters(recurse=False) if parameter.requires_grad]
        known = {id(part.parameter) for part in resting.parameters}
        # torch.func.functional_call brings other parameters, of which nothing is certain.
        return parameters if all(id(parameter) in known for parameter in parameters) else []


def install_resting(model: nn.Module, layers: Sequence[NeuronLayer], trained: Collection[int]) -> list[Any]:
    """Makes normalizations rest with their layers. Returns handles; their `remove()` undoes it.

    Args:
        model: the network.
        layers: the layers that may rest.
        trained: the ids of the parameters that the optimizer trains.
    """
    handles: list[Any] = []
    for layer in layers:
        names = {part.name.rpartition(".")[0] for part in layer.parameters} - {layer.name}
        for module in map(model.get_submodule, sorted(names)):
            all_trained = all(id(parameter) in trained for parameter in module.parameters(recurse=False))
            forward = StandIn.of(module) if "forward" in module.__dict__ else ConstantScales(module)
            # A forward that other code has replaced is not touched. Its scales then require gradients as usual.
            if all_trained and isinstance(forward, ConstantScales):
                handles.append(forward.join(layer))
    return handles
