"""The commands of this program that produce the published results, the most important first.

Size "paper" starts with the paper's main experiment, because time on a GPU may run out. Hyperparameters do not transfer
from other implementations or from the small size, so every method is searched before it is run.
"""

from __future__ import annotations

from .methods import METHODS

_BOUNDS = "joint,single"
_RIVALS = "sgd,ewc,mas,si,cpc,ssl"
_ALL = ",".join(METHODS)


def _search(experiment: str, methods: str, *, tasks: int = 0) -> list[str]:
    return ["search", "--experiment", experiment, "--methods", methods, *(["--tasks", str(tasks)] if tasks else [])]


def _run(experiment: str, methods: str, *settings: str) -> list[str]:
    return ["run", "--experiment", experiment, "--methods", methods, *(["--set", *settings] if settings else [])]


# Settings of NPC that the paper leaves open.
_OPEN = (
    "npc.measure=before pooling",
    "npc.sigma=erf",
    "npc.output=all",
    "npc.output=free",
    "npc.output=active",
    "npc.survive=0.2",
    "npc.survive=0.8",
    "npc.beta=0.2",
    "batch_size=16",
    "batch_size=128",
    "channels=(64, 128, 128)",
)
PLANS: dict[str, list[list[str]]] = {
    "small": [
        _search("imnist", f"npc,{_RIVALS}"),
        _run("imnist", _ALL),
        _search("icifar100", f"npc,{_RIVALS}", tasks=3),
        _run("icifar100", _ALL),
        _search("ifashion", f"npc,{_RIVALS}"),
        _run("ifashion", _ALL),
        _run("activation", "npc,sgd"),
        *(_run("ifashion", "npc", setting) for setting in _OPEN),
        _run("idigits", "npc"),
    ],
    "paper": [
        _run("icifar100", "npc"),
        *(_run("icifar100", "npc", f"batch_size={size}") for size in (64, 128, 512)),
        _search("icifar100", _RIVALS, tasks=3),
        _run("icifar100", f"{_RIVALS},{_BOUNDS}"),
        _run("imnist", "npc"),
        _search("imnist", _RIVALS),
        _run("imnist", f"{_RIVALS},{_BOUNDS}"),
        _run("activation", "npc,sgd"),
        _run("hetero", _ALL),
    ],
}
