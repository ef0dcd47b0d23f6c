"""Names in messages: lists, tables, and suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import NoReturn, TypeVar

_MOST = 8
_Value = TypeVar("_Value")


class ByLayer(dict[str, _Value]):
    """Values by layer name. A missing name raises KeyError with similar names."""

    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(f"no protected layer {name!r}; {close_to(str(name), self)}")


def close_to(name: str, known: Iterable[str], most: int = _MOST) -> str:
    """The end of an error message: the names similar to an unknown one, or else the first known names."""
    names = list(filter(None, known))  # the model itself has no name
    if not names:
        return "there are none"
    sought = name.strip("*?.").lower()
    similar = difflib.get_close_matches(name, names, n=5, cutoff=0.6)
    close = [other for other in names if other in similar or (sought and sought in other.lower())]
    return f"close to it: {listed(close)}" if close else f"there are {listed(names, most)}"


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    cells = [tuple(header), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, tuple("-" * width for width in widths))
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def listed(names: Iterable[str], most: int = _MOST) -> str:
    """Lists the first names, and counts the others."""
    known = list(names)
    more = len(known) - most
    return ", ".join(map(repr, known[:most])) + (f" and {more} more" if more > 0 else "")
