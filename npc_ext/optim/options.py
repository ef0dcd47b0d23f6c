"""Options of groups and of single layers, and checks of their values."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from .._names import close_to
from ..columns import PlasticityOptions, columns_of, delta_of
from ..kernels.checks import SIGMAS

BACKENDS = ("auto", "native", "reference")
SGD_OPTIONS = ("momentum", "nesterov", "weight_decay", "maximize")
CONSTANTS = ("alpha", "beta", "delta", "half_life", "sigma", "normalize")  # of eqs. 3, 4 and 7
DELTA = 1 - 2e-4  # the paper's
MOST_OPTIONS = 20  # to list in a message


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
        self._options = {name: with_one_decay(values) for name, values in options.items()}
        self._known = known

    def __str__(self) -> str:
        return str({name: {o: v for o, v in values.items() if v is not None} for name, values in self._options.items()})

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
                    expected = close_to(option, self._known, MOST_OPTIONS)
                    if option in ("lr", *SGD_OPTIONS, "betas", "eps"):
                        expected += "; give it to a group of the layer's parameters, in params=[...]"
                    raise ValueError(f"layers[{pattern!r}] has the option {option!r}; {expected}")
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
    if type(value) is float or type(value) is int:  # the test for a protocol below is slow
        return float(value)
    if isinstance(value, bool):
        raise TypeError(f"{where}{name} is {value}; expected {expected}")
    if isinstance(value, Tensor) and name != "lr":  # steps would not notice that it is changed in place
        raise TypeError(f"{where}{name} is a tensor; expected {expected}, as {name}.item()")
    if not (value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, SupportsFloat)):
        raise TypeError(f"{where}{name} is {value!r}; expected {expected}")
    return float(value)


def check_plasticity_options(options: Mapping[str, Any], where: str = "") -> None:
    """Raises ValueError if the options of eqs. 3, 4 and 7 are out of range."""
    if isinstance(options["beta"], (tuple, list)):
        raise TypeError(
            f"{where}beta is {options['beta']}; expected a number, the importance at or above which a neuron is "
            "frozen. The decay rates of Adam's moments are called betas"
        )
    for name in ("alpha", "beta"):
        check_number(name, options[name], where, positive=True)
    delta, half_life = options["delta"], options["half_life"]
    if (delta is None) == (half_life is None):
        raise ValueError(
            f"{where}delta is {delta} and half_life is {half_life}; expected one of them, and None for the other: "
            "delta = 0.5 ** (1 / half_life)"
        )
    if half_life is None and not 0 <= _number("delta", delta, "a number in [0, 1)", where) < 1:
        raise ValueError(f"{where}delta is {delta}; expected a number in [0, 1)")
    if delta is None:
        check_number("half_life", half_life, where, positive=True)
        if delta_of(options) == 1:
            raise ValueError(f"{where}half_life is {half_life}; expected a number of steps below 1e15")
    check_choice(f"{where}sigma", options["sigma"], SIGMAS)
    check_choice(f"{where}normalize", options["normalize"], ("all", "active"))


def with_one_decay(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in which delta is None if they have a half_life, and the reverse. They may have both, or neither."""
    given = [name for name in ("delta", "half_life") if options.get(name) is not None]
    return {**({"delta": None, "half_life": None} if given else {}), **options}


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
    return columns_of(PlasticityOptions, layers, active_only=active_only, delta=list(map(delta_of, layers)))
