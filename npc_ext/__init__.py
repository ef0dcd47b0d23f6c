"""Neuron-level plasticity control: networks that learn one task after another without forgetting.

During back-propagation, the optimizers measure how important each neuron is, and lower the learning rate of important
neurons (Paik et al., AAAI 2020, arXiv 1907.13322). They need no old data and no task boundaries. Build one optimizer
and keep it for all tasks:

>>> from npc_ext import NPC
>>> optimizer = NPC(model, lr=0.1, half_life=steps_per_task)  # was: torch.optim.SGD(model.parameters(), lr=0.1)

Optimizers that protect neurons:
    NPC                   SGD with a learning rate for each neuron
    NPCAdamW              the same for AdamW
    PlasticityWrapper     the same for any other optimizer

Methods to compare them with, also optimizers:
    CPC                   NPC for single weights instead of neurons
    EWC                   elastic weight consolidation, by the Fisher information
    MAS                   memory aware synapses, by the effect of weights on the outputs
    SI                    synaptic intelligence, by how much weights reduced the loss
    SSL                   selfless sequential learning: MAS with sparse activations
    baselines             the importance of EWC and MAS as functions: `baselines.consolidation`

Watching them:
    check_capacity        warns of layers that have little room for another task
    log_plasticity        writes importance and learning rates for TensorBoard
    plot_plasticity       draws importance and learning rates with matplotlib
    find_neurons          finds the layers of a model, and where they are measured, without an optimizer
    LayerPlasticity       what `plasticity()` returns for each layer
    ConnectionPlasticity  what `CPC.plasticity()` returns for each layer
    CapacityWarning       a layer has little room left
    ImportanceWarning     importance is not measured, or lost, or protects little

For custom loops and kernels:
    nn                    `nn.ReLU` measures importance in its own backward pass
    ops                   the compiled operations on tensors, with checked arguments (`npc_ext.columns`)
    reference             the same in plain PyTorch, one function for each equation

To read on: `help(npc_ext.NPC)` explains every option. README.md and docs/ have programs, other libraries and limits;
docs/reference/errors.md says what to do about an error or a warning.
`python -m npc_ext` shows what is installed, and how to fix what does not work.
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
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})
