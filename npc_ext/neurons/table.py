"""All neurons of a model: places their taps in the model, removes them, and shows the neurons as a table.

layer.py explains taps and sinks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .. import ops
from .._names import close_to
from .._torch import guard_hooks
from . import attention
from .layer import PROJECTION, NeuronLayer, OtherParameter
from .protection import Protection
from .relu import ReLU
from .tap import TapHook


class Neurons:
    """All neurons of a model, by layer, and the parameters that belong to none. Printing it shows a table."""

    def __init__(self, layers: list[NeuronLayer], others: list[OtherParameter]) -> None:
        self.layers, self.others = tuple(layers), tuple(others)
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

    def attach(
        self,
        model: nn.Module,
        layers: list[NeuronLayer] | None = None,
        measure: Callable[..., Tensor] = ops.importance_of_checked,
        relu_backward: Callable[..., tuple[Tensor, Tensor]] = ops.relu_backward_importance_of_checked,
    ) -> None:
        """Places the taps of layers in the model.

        Args:
            model: the model.
            layers: default: all layers.
            measure: the operation that computes importance from an activation and its gradient.
            relu_backward: the operation that computes it together with ReLU's backward pass.
        """
        guard_hooks()
        for layer in self.layers if layers is None else layers:
            layer.measure, layer.relu_backward = measure, relu_backward
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
        """Lets `detach` also call `remove()` of a handle of something else in the model."""
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
        """How much of what is trained is protected at the moment."""
        chosen = {id(p.parameter) for layer in self.layers if layer.name in self._left_alone for p in layer.parameters}
        protected = {id(p.parameter) for layer in self.layers for p in layer.parameters} - chosen
        return Protection.of(self.trained(), protected, chosen)

    def trained(self) -> list[Tensor]:
        """The tensors that the optimizer moves at the moment. Without an optimizer: all that require a gradient."""
        everything: Iterable[Tensor] | None = self._trained
        if everything is None:
            in_neurons = (p.parameter for layer in self.layers for p in layer.parameters)
            everything = [*in_neurons, *(other.parameter for other in self.others)]
        return [parameter for parameter in everything if parameter.requires_grad]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_finalizer": None}

    def __str__(self) -> str:
        trained = set(map(id, self.trained()))
        rows = [("layer", "neurons", "fan-in", "gradients skipped", "measured at", "parameters of its neurons")]
        for layer in self.layers:
            measured = " and ".join(f"{p}, in its backward pass" if p.in_backward else str(p) for p in layer.points)
            if any(point.copy for point in layer.points):
                measured += " (copied)"
            trains = [id(p.parameter) in trained for p in layer.parameters]
            if not layer.trains():
                measured = "nowhere: none of its parameters requires a gradient"
            elif not any(trains):
                measured = "nowhere: this optimizer trains none of its parameters"
            elif reason := self._left_alone.get(layer.name):
                measured = f"nowhere: {reason}"
            names = ", ".join(
                _relative(p.name, layer.module) + ("" if is_trained or not any(trains) else " (not trained)")
                for p, is_trained in zip(layer.parameters, trains, strict=True)
            )
            counts = f"{layer.neurons:,}", f"{layer.fan_in:,}", f"{layer.gradients_skipped:.0%}"
            rows.append((layer.name or "(the model)", *counts, measured, names))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines += [f"note: {layer.name}: {layer.note}" for layer in self.layers if layer.note]
        if self.others:
            lines += ["", "in no neuron, trained at plain learning rate unless others='freeze':"]
            width = max(len(other.name) for other in self.others)
            for other in self.others:
                frozen = "" if other.parameter.requires_grad else "; requires no gradient, and is not trained"
                if not frozen and id(other.parameter) not in trained:
                    frozen = "; not trained by this optimizer"
                lines.append(f"  {other.name.ljust(width)}  {other.reason}{frozen}")
        of_model = {id(p.parameter) for layer in self.layers for p in layer.parameters}
        of_model.update(id(other.parameter) for other in self.others)
        if outside := [parameter.numel() for parameter in self.trained() if id(parameter) not in of_model]:
            size = f"{len(outside)} parameters, {sum(outside):,} elements"
            lines += ["", f"not in the model, trained at plain learning rate: {size}"]
        return "\n".join([*lines, "", str(self.protection())])

    __repr__ = __str__


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _relative(name: str, layer: str) -> str:
    return name[len(layer) + 1 :] if layer and name.startswith(f"{layer}.") else name
