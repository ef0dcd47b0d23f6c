"""The names that the documentation's blocks use without defining them, page by page."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from ..names import Setup, Writer, batches, network, train
from . import concepts, development, examples, guides, libraries, reference


def of_readme(stack: ExitStack) -> dict[str, Any]:
    data = {"old_data": batches(10), "new_data": batches(10)}
    return {**data, "train": train, "network": network, "device": "cpu", "writer": Writer(), "step": 0}


SETUPS: dict[str, Setup] = {
    "README.md": of_readme,
    **concepts.SETUPS,
    **development.SETUPS,
    **examples.SETUPS,
    **guides.SETUPS,
    **libraries.SETUPS,
    **reference.SETUPS,
}
