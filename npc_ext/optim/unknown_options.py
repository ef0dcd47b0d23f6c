"""Options that do not exist: misspelled ones, those of torch's optimizers, and those that belong elsewhere."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

from .._names import close_to
from .options import CONSTANTS, MOST_OPTIONS

# Options of torch's optimizers that ours lack, and why.
_TORCH_OPTIONS = {
    "fused": "a step always is a fused call, so leave it out",
    "foreach": "a step always is a fused call, so leave it out",
    "capturable": "CUDA graphs can capture a step without it, so leave it out",
    "differentiable": "steps are not differentiable, so leave it out",
    "amsgrad": "there is no AMSGrad, so leave it out",
    "dampening": "momentum is not dampened, as by default in torch.optim.SGD, so leave it out",
    "betas": "NPCAdamW has it",
    "eps": "NPCAdamW has it",
    "momentum": "the first number of betas takes its place",
    "nesterov": "it belongs to the momentum of SGD",
}
_OF_LAYERS = ("protect", "measure_at", "batch_dim")
_OF_BASELINES = ("strength", "implicit", "damping", "sparsity")
_ALIASES = {"learning_rate": "lr", "LR": "lr", "wd": "weight_decay"}
_OF_CONSTRUCTORS = ("layers", "other_parameters", "skip_gradients", "process_group", "backend")
# How similar an unknown key of a group must be to an option to be a misspelling. Other code keeps keys such as
# "initial_lr" and "max_momentum" in groups.
_MISSPELLED = 0.85
_EXAMPLES = {"momentum": 0.9, "weight_decay": 0.01, "beta": 0.5}


def why_unknown(name: str, known: Collection[str]) -> str:
    """The end of an error message: why there is no such option, or which names are similar."""
    if "optimizer" in known and name in (*_TORCH_OPTIONS, "lr", "weight_decay", "maximize", "params"):
        return "it is an option of the optimizer to wrap"
    if name == "betas" and "beta" in known:
        return f"{_TORCH_OPTIONS[name]} (beta is another thing: the importance at or above which a neuron is frozen)"
    if name in _TORCH_OPTIONS:
        return _TORCH_OPTIONS[name]
    if name in _ALIASES:
        return f"it is called {_ALIASES[name]!r}"
    measures = not {"process_group", "stochastic_rounding"}.isdisjoint(known)
    if name in _OF_LAYERS and (measures or (name == "protect" and "beta" in known)):
        return f"it is an option of single layers: layers={{'<name or pattern>': {{{name!r}: ...}}}}"
    if name in _OF_CONSTRUCTORS and "model" not in known:
        return "it is an option of the whole optimizer: pass it to the constructor"
    if name in CONSTANTS:
        return "it is a constant of NPC"
    if name in _OF_BASELINES and "model" not in known:
        return "it is an option of another method"
    return close_to(name, known, MOST_OPTIONS)


_Constructor = TypeVar("_Constructor", bound=Callable[..., None])


def explains_options(constructor: _Constructor) -> _Constructor:
    """Lets a constructor raise a TypeError that explains an unknown option, or one given by position."""
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    known = [parameter.name for parameter in parameters]
    first = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    example = next((f"{name}={value}" for name, value in _EXAMPLES.items() if name in known), "...")

    @functools.wraps(constructor)
    def explaining(self: Any, *arguments: Any, **options: Any) -> None:
        for name in options:
            if name not in known:
                raise TypeError(f"{type(self).__name__} has no option {name!r}: {why_unknown(name, known)}")
        if len(arguments) > len(first):
            raise TypeError(
                f"{type(self).__name__} takes {' and '.join(first)} by position, got {len(arguments)} arguments; name "
                f"the others, as in {example}"
            )
        constructor(self, *arguments, **options)

    return cast(_Constructor, explaining)


def check_group(group: Any, known: Collection[str]) -> None:
    """Raises if a group is no dictionary, or if one of its keys is a misspelled option or another optimizer's."""
    if not isinstance(group, dict):
        raise TypeError(
            f"the parameter group is of type {type(group).__name__}; expected a dictionary, as in "
            "{'params': model.head.parameters(), 'lr': 0.01}"
        )
    for key in group.keys() - {"params", "lr", *known}:
        if not isinstance(key, str) or (key in _TORCH_OPTIONS and not group[key]):  # such as foreach=None
            continue
        of_others = key in (*_TORCH_OPTIONS, *_ALIASES, *_OF_LAYERS, *_OF_CONSTRUCTORS, *CONSTANTS, *_OF_BASELINES)
        similar = difflib.get_close_matches(key, known, cutoff=_MISSPELLED)
        # "min_weight_decay" and "beta1" are other things, but "weight_decays" is not.
        if of_others or any(option not in key or key == f"{option}s" for option in similar):
            raise ValueError(f"a parameter group has the key {key!r}, which is no option: {why_unknown(key, known)}")
