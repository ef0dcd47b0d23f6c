"""All neurons of a model: places their taps in the model, removes them, and prints the neurons as a table.

layer.py explains taps and sinks.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .._names import aligned, close_to
from .._torch import direct_hooks, guard_hooks
from . import attention
from .layer import PROJECTION, NeuronLayer, OtherParameter
from .protection import Protection
from .relu import ReLU
from .stand_in import StandIn
from .tap import TapHook

_COPIED = "copied"


class Neurons:
    """All neurons of a model, by layer, and the parameters that belong to none. Printing it shows a table.

    It is a sequence of layers; `neurons["features.0"]` is the layer of this name. A layer has the attributes `name`,
    `neurons` (N), `fan_in` (weights per neuron), `parameters`, `points` (where its activation is measured), `note` (a
    remark for the reader of the table) and `gradients_skipped` (the share of its neurons, from 0 to 1, whose weight
    gradients were skipped for the last step).

    Example:
        >>> print(optimizer.neurons)
        >>> optimizer.neurons.detach()  # before torch.jit.script(model), for example
    """

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
        """Places the taps of layers in the model. Optimizers do this for their own neurons.

        Args:
            model: the model in which the neurons were found.
            layers: the layers to measure. Default: all.

        Raises:
            RuntimeError: they are in the model already, so each layer would be measured twice.
        """
        if self.are_tapped():
            raise RuntimeError(
                "the taps of these neurons are in the model already (an optimizer places those of its own neurons); "
                "call detach() first to place them again"
            )
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

    def are_tapped(self) -> bool:
        """Whether taps have been placed in the model, and not been removed by `detach`."""
        return bool(self._handles)

    def is_tapped(self, layer: NeuronLayer, model: nn.Module) -> bool:
        """Whether the taps of a layer are in the model. Other code may have removed them."""
        modules = dict(model.named_modules(remove_duplicate=False))
        if layer.module not in modules or any(point.module not in modules for point in layer.points):
            return False
        return all(any(hook.layer is layer for hook in _taps_of(modules[point.module])) for point in layer.points)

    def detach(self) -> None:
        """Removes everything from the model that was placed in it. The optimizer can then take no more steps."""
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
        if any(point.copy for layer in self.layers for point in layer.points):
            lines.append(
                f"{_COPIED}: the tap passes on a copy, because what follows may change the activation in place"
            )
        if self._trained is not None and not self.are_tapped():
            lines.append("detached: the taps have been removed from the model, so nothing is measured any more")
        lines += [f"note: {layer.name}: {layer.note}" for layer in self.layers if layer.note]
        if self.other_parameters:
            lines += ["", self._heading_of_others(trained)]
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
            lines += ["", f"not in the model, so not protected; trained at the plain learning rate: {size}"]
        return "\n".join([*lines, "", str(self.protection())])

    def _heading_of_others(self, trained: Collection[int]) -> str:
        if not any(id(other.parameter) in trained for other in self.other_parameters):
            return "in no neuron, and not trained:"
        return (
            "in no neuron, so not protected; trained at the plain learning rate (other_parameters='freeze' keeps them "
            "as they are):"
        )

    def _row(self, layer: NeuronLayer, trained: Collection[int]) -> tuple[str, ...]:
        """The row of a layer. `trained` holds the ids of all trained parameters."""
        is_trained = {p.name: id(p.parameter) in trained for p in layer.parameters}
        measured = " and ".join(f"{p}, in its backward pass" if p.in_backward else str(p) for p in layer.points)
        if any(point.copy for point in layer.points):
            measured += f" ({_COPIED})"
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


def _taps_of(module: nn.Module) -> list[TapHook]:
    """The taps at a module's input, at its output, and inside it."""
    placed: list[Any] = [hook for hooks in direct_hooks(module) for hook in hooks.values()]
    if isinstance(module, ReLU):
        placed += module.taps()
    if isinstance(stand_in := StandIn.of(module), attention.AttentionForward):
        placed += stand_in.users()
    return [hook for hook in placed if isinstance(hook, TapHook)]


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
