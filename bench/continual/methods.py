"""The methods that are compared: their optimizers, hyperparameters, and consolidation after a task."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import npc_ext
from npc_ext._names import listed

from .store import ALPHA_UNIT, completed, in_units_of_lr

SEARCH = Path("bench/results/continual/search")
Settings = Mapping[str, Any]
Batches = Iterable[tuple[Tensor, Tensor]]
Outputs = Callable[[Tensor], Tensor]
Optimizer = torch.optim.Optimizer
# Builds an optimizer from a model, the hyperparameters and the number of steps of one task.
Builder = Callable[[nn.Module, Settings, int], Optimizer]


@dataclass(frozen=True)
class Coordinate:
    """One step of a search, over one hyperparameter.

    Tries `values`, or the best value so far times each of `factors`. With `walk`, a factor that helps is applied again
    as long as it helps, and the remaining factors are skipped.
    """

    name: str
    values: tuple[Any, ...] = ()
    factors: tuple[float, ...] = ()
    walk: bool = False


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        paper: its hyperparameters, with the paper's values.
        optimizer: builds the optimizer from the model, the hyperparameters and the number of steps of one task.
        consolidate: called after a task with the optimizer, the task's samples and a selection of its outputs.
        search: the walks of a search, each of which starts from the paper's hyperparameters.
        more: hyperparameters that a run records only if they are set, with their defaults.
    """

    paper: Settings
    optimizer: Builder
    consolidate: Callable[[Any, Batches, Outputs], None] = lambda optimizer, batches, outputs: None
    search: tuple[tuple[Coordinate, ...], ...] = ()
    more: Settings = field(default_factory=dict)


def _sgd(model: nn.Module, settings: Settings, steps: int) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"], fused=True)


_WORDS = {"output": ("all", "active", "free"), "measure": ("after pooling", "before pooling")}


def _plastic(kind: Callable[..., Optimizer]) -> Builder:
    def build(model: nn.Module, settings: Settings, steps: int) -> Optimizer:
        for name, words in _WORDS.items():
            if settings.get(name, words[0]) not in words:
                raise ValueError(f"{name} is {settings[name]!r}; expected {listed(words)}")
        output = {"protect": False} if settings["output"] == "free" else {"normalize": settings["output"]}
        layers: dict[str, dict[str, Any]] = {"output": output}
        if settings.get("measure") == "before pooling":
            blocks = [name.removeprefix("conv") for name, _ in model.named_children() if name.startswith("conv")]
            layers |= {f"conv{block}": {"measure_at": f"relu{block}"} for block in blocks}
        delta = settings["survive"] ** (1 / steps) if settings["delta"] is None else settings["delta"]
        options = {option: settings[option] for option in ("lr", "alpha", "beta", "sigma")}
        if kind is npc_ext.NPC:
            options["skip_gradients"] = settings.get("skip_gradients", "layers")
        return kind(model, **options, delta=delta, layers=layers)

    return build


def _anchored(kind: Callable[..., Optimizer]) -> Builder:
    # Older records lack `implicit`; their anchors pulled explicitly.
    return lambda model, settings, steps: kind(model, **{"implicit": False, **settings})


def _from_samples(optimizer: Any, batches: Batches, outputs: Outputs) -> None:
    optimizer.consolidate(batches, outputs=outputs, progress=False)


def _from_path(optimizer: Any, batches: Batches, outputs: Outputs) -> None:
    optimizer.consolidate()


def _strength(*more: Coordinate) -> tuple[tuple[Coordinate, ...], ...]:
    """Two walks over powers of ten and then smaller factors, because lr and strength trade off against each other.

    One walk varies the learning rate first, the other the strength.
    """
    lr, strength = (Coordinate(name, factors=(0.1, 10), walk=True) for name in ("lr", "strength"))
    then = (*more, Coordinate("lr", factors=(0.3, 3)), Coordinate("strength", factors=(0.5, 2, 3)))
    return (lr, strength, *then), (strength, *then)


# `survive` is the share of importance that is left after another task, delta ** steps. `output` is how the output layer
# is normalized, or "free" if it is not protected.
_PLASTIC = {
    "lr": 0.1,
    "alpha": 0.5,
    "beta": 0.5,
    "delta": 1 - 2e-4,
    "survive": None,
    "output": "all",
    "sigma": "sigmoid",
    ALPHA_UNIT: "lr",
}
_PLASTIC_SEARCH = (
    (
        Coordinate("output", values=("active", "free")),
        Coordinate("survive", values=(0.2, 0.8)),
        Coordinate("lr", factors=(0.3,)),
        Coordinate("beta", factors=(0.5, 0.8, 1.2, 2)),
    ),
)
_SGD = {"lr": 0.1, "weight_decay": 1e-4}
_SGD_SEARCH = (
    (
        Coordinate("lr", factors=(0.1, 10), walk=True),
        Coordinate("weight_decay", factors=(0.1, 10), walk=True),
        Coordinate("lr", factors=(0.3, 3)),
        Coordinate("weight_decay", factors=(0.5, 2, 3)),
    ),
)
METHODS = {
    "npc": Method(
        {**_PLASTIC, "measure": "after pooling"},
        _plastic(npc_ext.NPC),
        search=_PLASTIC_SEARCH,
        more={"skip_gradients": "layers"},
    ),
    "cpc": Method(_PLASTIC, _plastic(npc_ext.CPC), search=_PLASTIC_SEARCH),
    "ewc": Method({"lr": 0.1, "strength": 900.0, "implicit": True}, _anchored(npc_ext.EWC), _from_samples, _strength()),
    "mas": Method({"lr": 0.1, "strength": 3.0, "implicit": True}, _anchored(npc_ext.MAS), _from_samples, _strength()),
    "si": Method({"lr": 0.1, "strength": 0.08, "implicit": True}, _anchored(npc_ext.SI), _from_path, _strength()),
    "ssl": Method(
        {"lr": 0.1, "strength": 3.0, "sparsity": 2e-6, "implicit": True},
        _anchored(npc_ext.SSL),
        _from_samples,
        _strength(Coordinate("sparsity", factors=(0.1, 10))),
    ),
    "sgd": Method(_SGD, _sgd, search=_SGD_SEARCH),
    # Bounds, which are not tuned.
    "joint": Method({**_SGD, "lr": 0.03}, _sgd),
    "single": Method({**_SGD, "lr": 0.03}, _sgd),
}
BOUNDS = ("joint", "single")
# Experiments that are not searched use the search of another experiment.
TUNED_ON = {"activation": "icifar100", "hetero": "icifar100"}


def defaults(method: str, experiment: str, size: str, *, tuned: bool = True) -> dict[str, Any]:
    """Hyperparameters of a method: from the recorded search for the experiment and size, or else the paper's.

    If delta would be the paper's but the size is "small", half of the importance survives a task, about as in the
    paper. With `tuned=False` searches are ignored, so that a repeated search starts where the first one did. Settings
    from a search with explicit anchors keep explicit anchors.
    """
    settings = dict(METHODS[method].paper)
    if "delta" in settings:
        if size == "small":
            settings |= {"delta": None, "survive": 0.5}
        elif experiment == "imnist":
            settings["delta"] = 1 - 1e-3
    chosen = searched(method, experiment, size)[0] if tuned else {}
    if chosen and "implicit" not in chosen:
        settings.pop("implicit", None)
    return settings | chosen


def searched(method: str, experiment: str, size: str) -> tuple[dict[str, Any], str]:
    """The settings that a recorded search chose for a method, and the `Protocol.batches` of that search.

    Searches in whole batches are preferred to those whose epochs ended with a smaller batch. Without a search, returns
    {} and "whole".
    """
    name = f"{TUNED_ON.get(experiment, experiment)}-{size}"
    for path in (SEARCH / f"{name}.json", SEARCH / f"{name}-cut.json"):
        entry = json.loads(path.read_text())["methods"].get(method) if path.exists() else None
        if entry is not None:
            return in_units_of_lr(entry["best"]), completed(entry["protocol"])["batches"]
    return {}, "whole"


def with_choice(settings: Settings, name: str, value: Any) -> dict[str, Any]:
    """Settings with one hyperparameter changed. Setting delta unsets `survive`, and vice versa."""
    other = {"delta": "survive", "survive": "delta"}.get(name)
    return {**settings, name: value, **({other: None} if other else {})}
