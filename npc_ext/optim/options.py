"""Options of groups and of single layers, and their checks."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from .._names import close_to
from ..columns import PlasticityOptions, columns_of
from ..kernels.checks import SIGMAS

BACKENDS = ("auto", "native", "reference")
SGD_OPTIONS = ("momentum", "nesterov", "weight_decay", "maximize")
CONSTANTS = ("alpha", "beta", "delta", "sigma", "normalize")  # of eqs. 3, 4 and 7
# Groups of NPC and CPC name the unit of their alpha under this key, also in state dicts: "lr", the group's rate.
ALPHA_UNIT = "alpha_unit"
ALPHA_IN_UNITS_OF_LR: Mapping[str, str] = {
    ALPHA_UNIT: (
        "their alpha, {alpha:g}, is an absolute learning rate. Expected alpha in units of lr: in each group, divide it "
        "by the lr that it was chosen for (0.05 at lr 0.1 becomes 0.5), and set group['alpha_unit'] = 'lr'"
    )
}


class LayerOptions:
    """The options of single layers, as in `layers={"head*": {"normalize": "active"}}`."""

    def __init__(self, options: Mapping[str, Mapping[str, Any]] | None, known: Sequence[str]) -> None:
        options = options or {}
        if not isinstance(options, Mapping) or not all(
            isinstance(name, str) and isinstance(values, Mapping) for name, values in options.items()
        ):
            raise TypeError(
                f"layers is {options!r}; expected the options of layers by name or pattern, as in "
                "{'output': {'protect': False}}"
            )
        self._options = {name: dict(values) for name, values in options.items()}
        self._known = known

    def of(self, name: str) -> dict[str, Any]:
        """The options of a layer. Its name takes precedence over patterns, and earlier patterns over later ones."""
        matching = (values for pattern, values in self._options.items() if fnmatchcase(name, pattern))
        return dict(ChainMap(self._options.get(name, {}), *matching))

    def names(self, name: str) -> bool:
        """Whether a layer has options under its name, rather than under a pattern."""
        return name in self._options

    def check(self, names: Iterable[str], check_values: Callable[[Mapping[str, Any], str], None]) -> None:
        """Raises ValueError for a pattern that matches no layer and for an unknown option; calls `check_values`."""
        layers = list(names)
        for pattern, options in self._options.items():
            check_pattern("layers", pattern, layers)
            for option in options:
                if option not in self._known:
                    raise ValueError(
                        f"layers[{pattern!r}] has the option {option!r}; expected {', '.join(self._known)}"
                    )
            check_values(options, f"layers[{pattern!r}]: ")


def check_pattern(option: str, pattern: str, layers: Sequence[str]) -> None:
    """Raises ValueError if a name or shell-style pattern in an option matches no layer."""
    if pattern not in layers and not any(fnmatchcase(name, pattern) for name in layers):
        raise ValueError(
            f"{option} names {pattern!r}, but no layer with neurons has that name; {close_to(pattern, layers)}"
        )


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError if an option is not one of its choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_number(name: str, value: Any, where: str = "", *, positive: bool = False) -> None:
    """Raises unless an option is a finite number that is not negative (or 0); lr may be a tensor with one element."""
    expected = f"a finite number {'above 0' if positive else 'of at least 0'}"
    number = _number(name, value, expected, where)
    if not (number > 0 if positive else number >= 0) or not number < math.inf:
        raise ValueError(f"{where}{name} is {value}; expected {expected}")


def _number(name: str, value: Any, expected: str, where: str) -> float:
    if isinstance(value, Tensor) and name != "lr":  # steps would not notice that it is changed in place
        raise TypeError(f"{where}{name} is a tensor; expected {expected}, as {name}.item()")
    if not (value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, SupportsFloat)):
        raise TypeError(f"{where}{name} is {value!r}; expected {expected}")
    return float(value)


def check_plasticity_options(options: Mapping[str, Any], where: str = "") -> None:
    """Raises ValueError if the options of eqs. 3, 4 and 7 are out of range."""
    for name in ("alpha", "beta"):
        check_number(name, options[name], where, positive=True)
    if not 0 <= _number("delta", options["delta"], "a number in [0, 1)", where) < 1:
        raise ValueError(f"{where}delta is {options['delta']}; expected a number in [0, 1)")
    check_choice(f"{where}sigma", options["sigma"], SIGMAS)
    check_choice(f"{where}normalize", options["normalize"], ("all", "active"))


def check_rounding(group: Mapping[str, Any]) -> None:
    """Raises ValueError if a group without bfloat16 parameters has stochastic rounding on."""
    dtypes = {parameter.dtype for parameter in group["params"]}
    check_choice("stochastic_rounding", group["stochastic_rounding"], (True, False))
    if group["stochastic_rounding"] and dtypes and torch.bfloat16 not in dtypes:
        raise ValueError(
            f"stochastic_rounding is on, but the parameters are {', '.join(sorted(map(str, dtypes)))}; it rounds "
            "torch.bfloat16 only: convert the model first (model.to(torch.bfloat16)), or turn it off (for one "
            "group: {'params': ..., 'stochastic_rounding': False})"
        )


def plasticity_columns(layers: Sequence[Mapping[str, Any]]) -> PlasticityOptions:
    """The constants of layers as operations take them."""
    active_only = [layer["normalize"] == "active" for layer in layers]
    return columns_of(PlasticityOptions, layers, active_only=active_only)
