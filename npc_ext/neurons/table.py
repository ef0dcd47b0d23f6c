"""All neurons of a model: places their taps in the model, removes them, and prints the neurons as a table.

layer.py explains taps and sinks.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .._names import aligned, close_to
from .._torch import guard_hooks
from . import attention
from .layer import PROJECTION, NeuronLayer, OtherParameter
from .protection import Protection
from .relu import ReLU
from .tap import TapHook


class Neurons:
    """All neurons of a model, by layer, and the parameters that belong to none. Printing it shows a table."""

    def __init__(self, layers: list[NeuronLayer], other_parameters: list[OtherParameter]) -> None:
        self.layers, self.other_parameters = tuple(layers), tuple(other_parameters)
        self._trained: tuple[Tensor, ...] | None = None  # by the optimizer; None without one
        self._left_alone: dict[str, str] = {}  # layers that are not measured, with the reason
        self._handles: list[Any] = []
        self._finalizer: weakref.finalize[..., Any] | None = None

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[NeuronLayer]:
        return iter(self.layers)

    def __getitem__(self, name: str) -> NeuronLayer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; {close_to(name, (layer.name for layer in self.layers))}")

    def attach(self, model: nn.Module, layers: Iterable[NeuronLayer] | None = None) -> None:
        """Places the taps of layers in the model. By default, of all layers."""
        guard_hooks()
        for layer in self.layers if layers is None else layers:
            weighted = model.get_submodule(layer.module)
            for point in layer.points:
                module, hook = model.get_submodule(point.module), TapHook(layer, point, weighted)
                if point.in_backward and isinstance(module, ReLU):
                    self._handles.append(module.attach(hook))
                elif point.where == "output":
                    self._handles.append(module.register_forward_hook(hook))
                elif point.where == PROJECTION:
                    self._handles.append(attention.tap_projection(module, hook))
                else:
                    self._handles.append(module.register_forward_pre_hook(hook))

    def hold(self, handle: Any) -> None:
        """Makes `detach` also call `remove()` of the handle of something else in the model."""
        self._handles.append(handle)

    def detach(self) -> None:
        """Removes everything from the model that was placed in it."""
        _remove_all(self._handles)

    def detach_with(self, owner: object) -> None:
        """Calls `detach` when `owner` is deleted. May be called again."""
        if self._finalizer is None:
            self._finalizer = weakref.finalize(owner, _remove_all, self._handles)
            self._finalizer.atexit = False

    def note_training(self, trained: Iterable[Tensor], left_alone: Mapping[str, str]) -> None:
        """Notes what an optimizer trains, for the table.

        Args:
            trained: the parameters that it moves if they require a gradient.
            left_alone: the layers that it trains but does not measure, with the reason.
        """
        self._trained, self._left_alone = tuple(trained), dict(left_alone)

    def protection(self) -> Protection:
        """How much of the trained parameters is protected at the moment."""
        chosen = {id(p.parameter) for layer in self.layers if layer.name in self._left_alone for p in layer.parameters}
        protected = {id(p.parameter) for layer in self.layers for p in layer.parameters} - chosen
        return Protection.of(self.trained(), protected, chosen)

    def trained(self) -> list[Tensor]:
        """The tensors that the optimizer moves at the moment; without an optimizer, all that require a gradient."""
        tensors = self._of_model() if self._trained is None else self._trained
        return [tensor for tensor in tensors if tensor.requires_grad]

    def _of_model(self) -> list[Tensor]:
        in_neurons = [p.parameter for layer in self.layers for p in layer.parameters]
        return [*in_neurons, *(other.parameter for other in self.other_parameters)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_finalizer": None}

    def __str__(self) -> str:
        trained = set(map(id, self.trained()))
        header = ("layer", "neurons", "fan-in", "gradients skipped", "measured at", "parameters of its neurons")
        lines = aligned(header, (self._row(layer, trained) for layer in self.layers))
        lines += [f"note: {layer.name}: {layer.note}" for layer in self.layers if layer.note]
        if self.other_parameters:
            lines += ["", "in no neuron, trained at plain learning rate unless other_parameters='freeze':"]
            width = max(len(other.name) for other in self.other_parameters)
            for other in self.other_parameters:
                frozen = ""
                if not other.parameter.requires_grad:
                    frozen = "; requires no gradient, and is not trained"
                elif id(other.parameter) not in trained:
                    frozen = "; not trained by this optimizer"
                lines.append(f"  {other.name.ljust(width)}  {other.reason}{frozen}")
        of_model = set(map(id, self._of_model()))
        if outside := [parameter.numel() for parameter in self.trained() if id(parameter) not in of_model]:
            size = f"{len(outside)} parameters, {sum(outside):,} elements"
            lines += ["", f"not in the model, trained at plain learning rate: {size}"]
        return "\n".join([*lines, "", str(self.protection())])

    def _row(self, layer: NeuronLayer, trained: Collection[int]) -> tuple[str, ...]:
        """The row of a layer. `trained` holds the ids of all trained parameters."""
        is_trained = {p.name: id(p.parameter) in trained for p in layer.parameters}
        measured = " and ".join(f"{p}, in its backward pass" if p.in_backward else str(p) for p in layer.points)
        if any(point.copy for point in layer.points):
            measured += " (copied)"
        if not layer.trains():
            measured = "nowhere: none of its parameters requires a gradient"
        elif not any(is_trained.values()):
            measured = "nowhere: this optimizer trains none of its parameters"
        elif reason := self._left_alone.get(layer.name):
            measured = f"nowhere: {reason}"
        names = ", ".join(
            name.removeprefix(f"{layer.module}.") + ("" if trains or not any(is_trained.values()) else " (not trained)")
            for name, trains in is_trained.items()
        )
        counts = f"{layer.neurons:,}", f"{layer.fan_in:,}", f"{layer.gradients_skipped:.0%}"
        return layer.name or "(the model)", *counts, measured, names

    __repr__ = __str__


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
