"""The cases that compare two revisions on a GPU (`bench.against`); without a GPU, tiny ones on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..timing import Case, Timer
from .device import Device
from .parts import few_importance, few_updates, relu

_device = Device(dry=not torch.cuda.is_available())
PARTS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "importance": lambda quick: few_importance(_device),
    "update": lambda quick: few_updates(_device),
    "relu": lambda quick: relu(_device),
}


def timer() -> Timer:
    """The device's."""
    return _device.timer
