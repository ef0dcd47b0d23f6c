"""Lists of names in messages, and suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NoReturn, TypeVar

_MOST = 8
_Value = TypeVar("_Value")


class ByLayer(dict[str, _Value]):
    """Values by layer name. A missing name raises KeyError with similar names; each layer prints on one line."""

    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(f"no protected layer {name!r}; {close_to(str(name), self)}")

    def __repr__(self) -> str:
        lines = "".join(f"  {name!r}: {value!r},\n" for name, value in self.items())
        return f"{{\n{lines}}}" if lines else "{}"


def close_to(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the names similar to an unknown one, or else the first known names."""
    names = list(filter(None, known))  # the model itself has no name
    if not names:
        return "there are none"
    sought = name.strip("*?.").lower()
    similar = difflib.get_close_matches(name, names, n=5, cutoff=0.6)
    close = [other for other in names if other in similar or (sought and sought in other.lower())]
    return f"close to it: {listed(close)}" if close else f"there are {listed(names)}"


def listed(names: Iterable[str]) -> str:
    """Lists the first eight names, and counts the others."""
    known = list(names)
    more = len(known) - _MOST
    return ", ".join(map(repr, known[:_MOST])) + (f" and {more} more" if more > 0 else "")
