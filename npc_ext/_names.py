"""Answers to names that are not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NoReturn, TypeVar

_MOST = 8
_Value = TypeVar("_Value")


class ByLayer(dict[str, _Value]):
    """Values by the names of layers. A missing name is answered with close ones; each layer prints on a line."""

    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(f"no consolidated layer {name!r}; {close_to(str(name), self)}")

    def __repr__(self) -> str:
        lines = "".join(f"  {name!r}: {value!r},\n" for name, value in self.items())
        return f"{{\n{lines}}}" if lines else "{}"


def close_to(name: str, known: Iterable[str]) -> str:
    """A part of a sentence that names what a misspelt name may have meant, or else the first of what there is."""
    names = [one for one in known if one]  # the model itself has no name
    if not names:
        return "there are none"
    sought = name.strip("*?.").lower()
    similar = difflib.get_close_matches(name, names, n=5, cutoff=0.6)
    close = [one for one in names if one in similar or (sought and sought in one.lower())]
    return f"close to it: {listed(close)}" if close else f"there are {listed(names)}"


def listed(names: Iterable[str]) -> str:
    """Names as a message lists them: the first eight."""
    known = list(names)
    more = len(known) - _MOST
    return ", ".join(map(repr, known[:_MOST])) + (f" and {more} more" if more > 0 else "")
