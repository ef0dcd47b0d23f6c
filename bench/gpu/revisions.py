"""Cases that compare two revisions on a GPU (for `bench.against`); without a GPU, tiny ones on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..timing import Case, Later, Timer
from .device import Device
from .parts import few_importance, few_updates

_device = Device(dry=not torch.cuda.is_available())


def _cases(laters: Iterator[Later]) -> Iterator[Case]:
    for later in laters:
        made = later.make()
        assert isinstance(made, Case)
        yield made


PARTS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "importance": lambda quick: _cases(few_importance(_device, alone=True)),
    "update": lambda quick: _cases(few_updates(_device, alone=True)),
}


def timer() -> Timer:
    """The device's timer."""
    return _device.timer
