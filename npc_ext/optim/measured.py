"""Checks that the layers that are trained were measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .._torch import version_of
from .._warn import warn
from ..neurons.layer import NeuronLayer
from ..neurons.tap import ImportanceWarning

_MOST_EMPTY_STEPS = 10


class LayerWarnings:
    """Gives each kind of warning once for each layer."""

    def __init__(self) -> None:
        self._warned: set[tuple[str, str]] = set()

    def warn_once(self, layer: str, kind: str, text: str) -> None:
        """Warns of a layer, unless a warning of this kind was given before."""
        if (layer, kind) not in self._warned:
            self._warned.add((layer, kind))
            warn(f"layer {layer!r} {text}", ImportanceWarning)


class MeasurementChecks:
    """Raises or warns where importance is missing."""

    def __init__(self, warnings: LayerWarnings) -> None:
        self._warnings = warnings
        self._empty_steps = 0  # in a row

    def check(
        self, trained: Sequence[NeuronLayer], unmeasured: Collection[NeuronLayer], *, training: bool, shared: bool
    ) -> None:
        """Raises if no layer that received gradients was measured; warns if single layers were not.

        Args:
            trained: the layers that received gradients.
            unmeasured: the layers that were not measured since the last step.
            training: whether the model is in training mode.
            shared: whether other processes measure, too.
        """
        missing = [layer for layer in trained if layer in unmeasured]
        if not missing:
            return
        if len(missing) == len(trained):
            hint = "" if training else " The model is in eval mode now: call model.train()."
            raise RuntimeError(
                f"no importance was measured since the last step, although there are gradients (layer "
                f"{trained[0].name!r} and all others), so nothing would be protected.{hint} Importance is measured in "
                "the backward pass of a forward pass in training mode, by hooks in the model that the optimizer was "
                "built on: build it on the model that is trained (not on a copy), keep its hooks, and call backward(), "
                "not torch.autograd.grad, between zero_grad() and step(). If the model was compiled and trained before "
                "the optimizer was built, compile it again: call torch.compiler.reset()."
            )
        for layer in missing:
            if shared and layer.checked:  # other processes may have measured it
                continue
            self._warnings.warn_once(
                layer.name,
                "unmeasured",
                "received gradients, but its importance was not measured, so it trains at the rates of its importance "
                f"so far. It is measured in training mode, at the {' and the '.join(map(str, layer.points))}. If the "
                "layer is in eval mode, call train(). If that place belongs to one of several heads, make the function "
                "before it a module, or, if no normalization follows the layer, write "
                f"layers={{{layer.name!r}: {{'measure_at': {layer.name!r}}}}}. If the model was compiled before the "
                "optimizer was built, call torch.compiler.reset()",
            )

    def drop_compiled_leftovers(self, layer: NeuronLayer) -> None:
        """Drops importance that compiled code measured, if the gradients were cleared in between.

        Taps in compiled code do not notice that. Each backward pass but the first increments the version of the sink's
        gradient and of the weight's gradient. If the weight's gradient was cleared, its version starts at 0 again.
        """
        gradient, measured = layer.parameters[0].parameter.grad, layer.sink.grad
        if gradient is None or measured is None or version_of(gradient) >= version_of(measured) or layer.sharded:
            return
        layer.sink.grad = None
        self._warnings.warn_once(
            layer.name,
            "cleared",
            "is in code that torch.compile has compiled, and its gradients were not cleared by the optimizer's "
            "zero_grad(), so the importance of discarded gradients would have counted; its importance does not change "
            "in such steps: call optimizer.zero_grad() instead",
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
