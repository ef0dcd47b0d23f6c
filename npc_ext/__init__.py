"""Neuron-level plasticity control: networks that learn one task after another without forgetting.

>>> from npc_ext import NPC
>>> optimizer = NPC(model, lr=0.1)  # was: torch.optim.SGD(model.parameters(), lr=0.1)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cpc import CPC as CPC
    from .cpc import ConnectionPlasticity as ConnectionPlasticity
    from .ewc import EWC as EWC
    from .mas import MAS as MAS
    from .neurons import find_neurons as find_neurons
    from .npc import NPC as NPC
    from .npc_adamw import NPCAdamW as NPCAdamW
    from .plastic import LayerPlasticity as LayerPlasticity
    from .plot import plot_plasticity as plot_plasticity
    from .si import SI as SI
    from .ssl import SSL as SSL
    from .tap import ImportanceWarning as ImportanceWarning
    from .watch import CapacityWarning as CapacityWarning
    from .watch import check_capacity as check_capacity
    from .watch import log_plasticity as log_plasticity
    from .wrapper import PlasticityWrapper as PlasticityWrapper

__version__ = "0.1.0"

_HOME = {
    "CPC": "cpc",
    "ConnectionPlasticity": "cpc",
    "EWC": "ewc",
    "MAS": "mas",
    "NPC": "npc",
    "NPCAdamW": "npc_adamw",
    "LayerPlasticity": "plastic",
    "find_neurons": "neurons",
    "ImportanceWarning": "tap",
    "SI": "si",
    "SSL": "ssl",
    "CapacityWarning": "watch",
    "check_capacity": "watch",
    "log_plasticity": "watch",
    "PlasticityWrapper": "wrapper",
    "plot_plasticity": "plot",
}
__all__ = [
    "CPC",
    "EWC",
    "MAS",
    "NPC",
    "SI",
    "SSL",
    "CapacityWarning",
    "ConnectionPlasticity",
    "ImportanceWarning",
    "LayerPlasticity",
    "NPCAdamW",
    "PlasticityWrapper",
    "check_capacity",
    "find_neurons",
    "log_plasticity",
    "plot_plasticity",
]
# In no __all__: `from npc_ext import *` would put npc_ext.nn in the place of the user's torch.nn.
_MODULES = ("consolidation", "nn", "ops", "reference")


# Loaded at first use: `python -m npc_ext` must be able to say what is wrong when torch itself does not load.
def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_MODULES])
