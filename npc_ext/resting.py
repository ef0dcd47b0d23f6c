"""Layers whose parameters are constants in a forward pass, because they are certain not to move in the coming step.

The first weighted layer of a network has no gradient to hand on: where its neurons are all certified (certificate.py),
nothing upstream of its tap needs one. Such a layer rests while the model is called (calls.py): its parameters, and the
scales of a normalization behind it, count as constants, so that no activation before the tap is kept and
back-propagation ends there. The tap measures as ever and gives the parameters the gradients of zeros that they would
have had.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from .neurons import NeuronLayer
from .tap import SharedStandIn, StandIn


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
