"""The base class of optimizers that lower the learning rates of what is important: neurons (NPC) or connections (CPC).

It keeps the options of single layers, looks for the model's layers again whenever parameters are added, and warns where
importance protects little or is not finite. Subclasses find the layers, measure importance, and define the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from .._names import close_to
from ..neurons.protection import Protection, warn_if_little
from .base import ModelOptimizer
from .measured import LayerWarnings
from .moments import FirstMoments
from .nonfinite import NonfiniteSteps
from .options import CONSTANTS, DELTA, LayerOptions, check_choice, check_plasticity_options, with_one_decay


class PlasticityControl(ModelOptimizer):
    """An optimizer with a learning rate for every neuron or connection of the model's layers.

    The groups of subclasses have the options of eqs. 3, 4 and 7: alpha, beta, delta or half_life, sigma and normalize.
    """

    _LAYER_OPTIONS: ClassVar[tuple[str, ...]] = (*CONSTANTS, "protect")
    # For warnings: what is protected, what to do if little is, and where importance that is not finite comes from.
    _UNITS: ClassVar[str]
    _ADVICE: ClassVar[str]
    _NONFINITE_IN: ClassVar[str]

    _group_of: dict[int, dict[str, Any]]  # the group of each parameter, by the parameter's id
    _has_layers = False  # whether the model has been searched; the constructor adds groups before that
    _nonfinite_steps: NonfiniteSteps

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        # Takes the arguments of the subclass's constructor by name, also layers and other_parameters.
        self._other_parameters = arguments["other_parameters"]
        check_choice("other_parameters", self._other_parameters, ("train", "freeze"))
        self._layer_options = LayerOptions(arguments["layers"], self._LAYER_OPTIONS)
        self._layer_warnings = LayerWarnings()
        decay = with_one_decay({name: arguments[name] for name in ("delta", "half_life")})
        if decay == {"delta": None, "half_life": None}:
            decay["delta"] = DELTA
        super().__init__({**arguments, **decay})
        self._find_layers()
        self._has_layers = True
        self._check_protection()

    def _add_group(self, param_group: dict[str, Any]) -> None:
        super()._add_group(param_group)
        try:
            if self._has_layers:
                self._find_layers()
        except Exception:
            self.param_groups.pop()
            raise

    def _find_layers(self) -> None:
        """Searches the model, and prepares what is kept of each layer."""
        raise NotImplementedError

    def _layer_names(self) -> list[str]:
        """The layers that have importance."""
        raise NotImplementedError

    def _in_layers(self, parameter: Tensor) -> bool:
        """Whether a parameter belongs to a layer, also to one with protect=False."""
        raise NotImplementedError

    def _protection(self) -> Protection:
        """How much of what is trained is protected now."""
        raise NotImplementedError

    def set_constants(self, **constants: Any) -> None:
        """Changes constants of all groups from now on, except those of layers that have options in `layers`.

        Args:
            constants: alpha, beta, delta or half_life, sigma, normalize.

        Raises:
            TypeError: there is no such constant, or its type is wrong. Nothing is changed then.
            ValueError: a constant is out of range. Nothing is changed then.

        Example:
            >>> optimizer.set_constants(beta=1.0, half_life=1000)
        """
        for name in constants:
            if name not in CONSTANTS:
                raise TypeError(f"there is no constant {name!r}: {close_to(name, CONSTANTS)}")
        changed = with_one_decay(constants)
        for group in self.param_groups:
            self._check_options({**self.defaults, **group, **changed, "lr": 0.0})
        for group in (self.defaults, *self.param_groups):  # the defaults are for groups that are added later
            group.update(changed)

    def _look_up_groups(self) -> None:
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        if any(self._group_of.get(parameter) is not group for parameter, group in groups.items()):
            self._group_of = groups

    def _take_up_groups(self) -> None:
        super()._take_up_groups()
        self._find_layers()

    def _trains(self, parameter: Tensor) -> bool:
        return self._other_parameters == "train" or self._in_layers(parameter)

    def _trained(self) -> list[Tensor]:
        return [p for p in self._all_parameters() if p.requires_grad and self._trains(p)]

    def _check_protection(self) -> None:
        """Warns if more than half of what is trained is not protected. Called when the layers were found first."""
        unprotected = [parameter for parameter in self._trained() if not self._in_layers(parameter)]
        warn_if_little(self._protection(), self._model, unprotected, self._UNITS, self._ADVICE)

    def _check_layer_options(self, options: Mapping[str, Any], where: str) -> None:
        check_choice(f"{where}protect", options.get("protect", True), (True, False))
        self._check_options({**self.defaults, **options}, where)

    def _check_options(self, options: Mapping[str, Any], where: str = "") -> None:
        super()._check_options(options, where)
        check_plasticity_options(options, where)

    def _report_nonfinite_steps(self) -> None:
        """Called once a step. Warns of layers with an importance that was not finite."""
        counts = self._nonfinite_steps.news()
        if counts is None:
            return
        self._layer_warnings.warn_once(
            [layer for layer, count in zip(self._layer_names(), counts, strict=True) if count],
            "nonfinite_steps",
            f"had an importance that is not finite (inf or nan in {self._NONFINITE_IN}). Such steps leave "
            "importance as it was. plasticity()[layer].nonfinite_steps counts them",
        )

    def _forget_plans(self) -> None:
        super()._forget_plans()
        self._first_moments = FirstMoments()
