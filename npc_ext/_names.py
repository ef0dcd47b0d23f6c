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
    if close:
        return f"close to it: {_listed(close[:_MOST])}"
    rest = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return f"there are {_listed(names[:_MOST])}{rest}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
