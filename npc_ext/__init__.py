"""Neuron-level plasticity control: networks that learn one task after another without forgetting.

>>> from npc_ext import NPC
>>> optimizer = NPC(model, lr=0.1)  # was: torch.optim.SGD(model.parameters(), lr=0.1)
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_IMPORTS = [
    (f".{node.module}" if node.module else "", imported.name)
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for imported in node.names
]
_MODULE_OF = {name: module for module, name in _IMPORTS if module}
# Not in __all__: `from npc_ext import *` would put npc_ext.nn in the place of the user's torch.nn.
_MODULES = [name for module, name in _IMPORTS if not module]
__all__ = sorted(_MODULE_OF)


# Loaded at first use: `python -m npc_ext` must be able to say what is wrong when torch itself does not load.
def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name], __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_MODULES])
