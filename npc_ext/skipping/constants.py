"""When the parameters of a layer count as constants: within one call of the model, and nowhere else.

A tap is an identity that is placed behind a layer. Its backward pass measures the layer's importance, and gives it to
the layer's sink, a small leaf tensor, as the gradient (neurons/tap.py). Before the tap of a network's first weighted
layer, back-propagation only serves the parameters of the layer, and those of a normalization between layer and tap. If
no neuron of the layer can move in the coming step (certificate.py), nothing there needs a gradient.

Such a layer rests: for the time of the call its parameters count as constants. No activation before the tap is kept,
and back-propagation ends at the tap. The tap measures as usual, and gives the parameters the gradients of zeros that
they would have had.

None of this shows in the outputs of the model. But code that calls the model part by part may take a loss in between,
and hooks of others on its modules may see what lies before the tap. Therefore layers rest only within a call of the
whole model, and only if no module has such hooks. Elsewhere the parameters require gradients as usual, and only weight
gradients are left out (forward.py).

A checkpoint computes a part of a call again during back-propagation. Layers then do as they did in that call.
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
        self._depth = 0  # a model may call itself
        self._is_looked_into: bool | None = None  # not known yet in this call
        self._asked = False  # whether layers may rest now

    def attach(self) -> list[Any]:
        """Registers the hooks; returns their handles."""
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
        """Whether the model is being called, and no other code sees the outputs of its modules."""
        if self._depth == 0:
            return False
        self._asked = True
        if self._is_looked_into is None:
            self._is_looked_into = is_looked_into(self._model, (TapHook, Calls))
        return not self._is_looked_into

    def end(self) -> None:
        """Ends a call that was interrupted before any hook was called, as by Ctrl-C."""
        self._depth = 0
        self._wake_all_up()

    def end_after_backward(self) -> None:
        """Within a backward pass: ends what rests when the pass is over."""
        self._asked = True
        after_backward(self._backward_is_over)

    def _backward_is_over(self) -> None:
        if self._depth == 0:  # else the backward pass was a part of the call
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
    """Its `__call__` stands in for a normalization's forward; the parameters are constants while their layer rests.

    Each optimizer of the model has a layer of its own for them. Picklable with the model.
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
    """Has the normalizations of layers take part when their layer rests; returns handles that undo it by `remove()`.

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
            # A forward that other code has replaced stays. Its scales then keep back-propagation going as usual.
            if all_trained and isinstance(forward, ConstantScales):
                handles.append(forward.join(layer))
    return handles
