"""Checks that the layers that are trained were measured, and finds out why they were not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from .._names import listed
from .._torch import backward_passes, in_backward, version_of
from .._warn import warn
from ..neurons.kinds import NORMALIZATION, torch_class
from ..neurons.layer import NO_BACKWARD_PASS, NeuronLayer
from ..neurons.table import Neurons
from ..neurons.tap import ImportanceWarning

_MOST_EMPTY_STEPS = 10
_MOST_EXAMPLES = 3
_POSSIBLE_CAUSES = (
    "the forward pass ran in eval mode (call model.train() before it)",
    "the gradients were assigned, copied from another model, or computed with torch.func (call loss.backward() on the "
    "outputs of the model that the optimizer was built on)",
    "the model was compiled and called before the optimizer was built (call torch.compiler.reset())",
    "a graph of torch.jit.trace or torch.export was called (call the model itself)",
)
_POSSIBLE_IN_FIRST_STEP = "the forward pass ran before the optimizer was built (build it first)"
_POSSIBLE_IN_LATER_STEPS = "step() was called twice after one backward pass"


class LayerWarnings:
    """Gives each kind of warning once for each layer, and one warning for all layers of a step."""

    def __init__(self) -> None:
        self._warned: set[tuple[str, str]] = set()

    def new(self, layers: Iterable[str], kind: str) -> set[str]:
        """The layers of which no warning of this kind was given before."""
        return {layer for layer in layers if (layer, kind) not in self._warned}

    def warn_once(self, layers: Sequence[str], kind: str, text: str) -> None:
        """Warns of layers, except for those of which a warning of this kind was given before."""
        if new := self.new(layers, kind):
            self._warned.update((layer, kind) for layer in new)
            warn(f"{_named(layer for layer in layers if layer in new)} {text}", ImportanceWarning)


class Observed(NamedTuple):
    """What an optimizer knows about a step without importance.

    Attributes:
        model: the network.
        neurons: its neurons.
        is_superseded: whether another optimizer has taken the importance over.
        has_begun: whether the optimizer has taken a step before.
        shared: whether other processes measure, too.
        rebuilt: the call that builds a new optimizer with the importance of this one.
    """

    model: nn.Module
    neurons: Neurons
    is_superseded: bool
    has_begun: bool
    shared: bool
    rebuilt: str


class MeasurementChecks:
    """Raises or warns where importance is missing."""

    def __init__(self, warnings: LayerWarnings) -> None:
        self._warnings = warnings
        self._empty_steps = 0  # in a row
        self._last_backward_pass = NO_BACKWARD_PASS

    def note_step(self, backward_pass: int) -> None:
        """Notes that a step used importance that a backward pass with this number measured."""
        self._last_backward_pass = backward_pass

    def check(
        self,
        trained: Sequence[NeuronLayer],
        unmeasured: Collection[NeuronLayer],
        observe: Callable[[], Observed],
    ) -> None:
        """Raises if no layer that received gradients was measured; warns if single layers were not.

        Args:
            trained: the layers that received gradients.
            unmeasured: the layers that were not measured since the last step.
            observe: returns everything else that is known.
        """
        missing = [layer for layer in trained if layer in unmeasured]
        if not missing:
            return
        if len(missing) == len(trained):
            raise RuntimeError(
                "no importance was measured since the last step, although there are gradients "
                f"({_named(layer.name for layer in missing)}), so nothing would be protected. "
                f"{self._why_nothing(missing, observe())}"
            )
        new = self._warnings.new((layer.name for layer in missing), "unmeasured")
        if new:
            self._warn_of_unmeasured([layer for layer in missing if layer.name in new], observe())

    def _warn_of_unmeasured(self, layers: Sequence[NeuronLayer], observed: Observed) -> None:
        by_cause: dict[Cause, list[NeuronLayer]] = {}
        for layer in layers:
            if not (observed.shared and layer.checked):  # other processes may have measured it
                by_cause.setdefault(_cause(layer, observed), []).append(layer)
        for cause, members in by_cause.items():
            self._warnings.warn_once(
                [layer.name for layer in members],
                "unmeasured",
                f"received gradients, but importance was not measured. {cause(members, observed)}. Until then, "
                "learning rates follow from the importance so far",
            )

    def _why_nothing(self, layers: Sequence[NeuronLayer], observed: Observed) -> str:
        """Why no layer was measured, and what to do: the cause if it is known, or else the possible ones."""
        if observed.is_superseded:
            return (
                "Another optimizer has taken over the importance of this one (load_importance) and measures the model "
                "instead: call step() of that optimizer."
            )
        if not observed.neurons.are_tapped():
            return (
                "optimizer.neurons.detach() has removed the taps that measure it. To continue training, build a new "
                f"optimizer with the importance of this one (earlier): {observed.rebuilt}."
            )
        if self._no_backward_pass_since():
            return (
                "There was no backward pass since the last step, which has used up the importance of its gradients. "
                "Call backward() before each step()."
            )
        for cause in (_without_taps, _in_eval_mode):
            if all(_cause(layer, observed) is cause for layer in layers):
                return f"{cause(layers, observed)}."
        if any(layer.last_backward_pass != NO_BACKWARD_PASS for layer in layers):
            return (
                "torch.autograd.grad and backward(inputs=...) compute the gradients that they are asked for, and no "
                "importance. Call loss.backward() instead."
            )
        causes = [_POSSIBLE_IN_FIRST_STEP, *_POSSIBLE_CAUSES]
        if observed.has_begun:
            causes = [*_POSSIBLE_CAUSES, _POSSIBLE_IN_LATER_STEPS]
        return f"Possible causes: {'; '.join(causes)}."

    def _no_backward_pass_since(self) -> bool:
        """Whether autograd has run no backward pass since the one that the last step used."""
        if self._last_backward_pass == NO_BACKWARD_PASS or in_backward():
            return False
        counted = backward_passes()
        if counted != self._last_backward_pass + 1:
            return False
        self._last_backward_pass = counted  # which was one, so that another step() finds the same cause
        return True

    def drop_compiled_leftovers(self, layers: Iterable[NeuronLayer]) -> None:
        """Drops importance that compiled code measured, if the gradients were cleared in between.

        Taps in compiled code do not notice that. Each backward pass but the first increments the version of the sink's
        gradient and of the weight's gradient. If the weight's gradient was cleared, its version starts at 0 again.
        """
        dropped = []
        for layer in layers:
            gradient, measured = layer.parameters[0].parameter.grad, layer.sink.grad
            if gradient is None or measured is None or version_of(gradient) >= version_of(measured) or layer.sharded:
                continue
            layer.sink.grad = None
            dropped.append(layer.name)
        if not dropped:
            return
        self._warnings.warn_once(
            dropped,
            "cleared",
            "ran in compiled code, which does not notice that model.zero_grad() or other code clears gradients. "
            "Importance of the discarded gradients would have counted, so importance does not change in such steps: "
            "call optimizer.zero_grad() instead",
        )

    def count_empty_steps(self, is_empty: bool) -> None:
        """Warns after several steps in a row that updated nothing: probably another model is trained."""
        self._empty_steps = self._empty_steps + 1 if is_empty else 0
        if self._empty_steps == _MOST_EMPTY_STEPS:
            warn(
                f"no parameter had a gradient in {_MOST_EMPTY_STEPS} steps in a row, so nothing was learned: build the "
                "optimizer on the model that is trained (not on a copy), and call backward() between zero_grad() and "
                "step()",
                ImportanceWarning,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last_backward_pass": NO_BACKWARD_PASS}  # each process counts its own


def _named(layers: Iterable[str]) -> str:
    names = list(layers)
    return f"{'layer' if len(names) == 1 else 'layers'} {listed(names)}"


# A cause is a function that returns its text for the layers that have it.
Cause = Callable[[Sequence[NeuronLayer], Observed], str]


def _cause(layer: NeuronLayer, observed: Observed) -> Cause:
    """The likely cause why a layer was not measured."""
    if not observed.neurons.is_tapped(layer, observed.model):
        return _without_taps
    if not observed.model.get_submodule(layer.module).training:
        return _in_eval_mode
    return _not_called if all(point.module == layer.module for point in layer.points) else _elsewhere


def _without_taps(layers: Sequence[NeuronLayer], observed: Observed) -> str:
    return (
        "Other code has replaced modules or removed forward hooks, so the taps that measure it are no longer in the "
        "model. After such changes, build a new optimizer with the importance of this one (earlier): "
        f"{observed.rebuilt}"
    )


def _in_eval_mode(layers: Sequence[NeuronLayer], observed: Observed) -> str:
    return (
        "In eval mode, importance is not measured: call model.train() before the forward pass. To keep dropout or "
        "normalization in eval mode, call eval() on these modules after that"
    )


def _not_called(layers: Sequence[NeuronLayer], observed: Observed) -> str:
    options = {layer.name: {"protect": False} for layer in layers[:_MOST_EXAMPLES]}
    return (
        "The module was probably not called, because other code uses its weight: call the module, or leave it "
        f"unprotected: layers={options}. {_COMPILED}"
    )


def _elsewhere(layers: Sequence[NeuronLayer], observed: Observed) -> str:
    where = " and the ".join(map(str, layers[0].points))
    options = {layer.name: {"measure_at": _behind(layer, observed.model)} for layer in layers[:_MOST_EXAMPLES]}
    return (
        f"Layer {layers[0].name!r} is measured at the {where}, which was probably not called in this step, as happens "
        f"to one of several heads. Measure at a module that is called in every forward pass: layers={options}. "
        f"{_COMPILED}"
    )


_COMPILED = "If the model was compiled before the optimizer was built, call torch.compiler.reset()"


def _behind(layer: NeuronLayer, model: nn.Module) -> str:
    """The normalization whose scales belong to a layer's neurons, or the layer itself without one."""
    owners = [parameter.name.rpartition(".")[0] for parameter in reversed(layer.parameters)]
    return next((name for name in owners if torch_class(model.get_submodule(name)) in NORMALIZATION), layer.module)
