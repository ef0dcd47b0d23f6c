"""Options of single layers, by name or by pattern as in a shell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from .names import close_to


class LayerOptions:
    """What a user wrote as `layers={"head*": {"normalize": "active"}}`."""

    def __init__(self, options: Mapping[str, Mapping[str, Any]] | None, known: Sequence[str]) -> None:
        if not isinstance(options or {}, Mapping) or not all(
            isinstance(name, str) and isinstance(own, Mapping) for name, own in (options or {}).items()
        ):
            raise TypeError(
                f"layers is {options!r}; expected the options of layers by name or pattern, as in "
                "{'output': {'consolidate': False}}"
            )
        self._options = {name: dict(own) for name, own in (options or {}).items()}
        self._known = known

    def of(self, name: str) -> dict[str, Any]:
        """Options of one layer. Those under its own name win, then those under the pattern that was given first."""
        under_patterns = [
            own for pattern, own in self._options.items() if pattern != name and fnmatchcase(name, pattern)
        ]
        merged: dict[str, Any] = {}
        for own in reversed([self._options.get(name, {}), *under_patterns]):
            merged.update(own)
        return merged

    def names(self, name: str) -> bool:
        """Whether a layer has options under its own name, not under a pattern."""
        return name in self._options

    def check(self, names: Iterable[str], check_values: Callable[[Mapping[str, Any], str], None]) -> None:
        """Raises ValueError for a pattern that no layer has, an unknown option, or what `check_values` objects to."""
        layers = list(names)
        for pattern, options in self._options.items():
            if not any(name == pattern or fnmatchcase(name, pattern) for name in layers):
                raise ValueError(
                    f"layers names {pattern!r}, but no layer with neurons has that name; {close_to(pattern, layers)}"
                )
            for option in options:
                if option not in self._known:
                    raise ValueError(
                        f"layers[{pattern!r}] has the option {option!r}; expected {', '.join(self._known)}"
                    )
            check_values(options, f"layers[{pattern!r}]: ")
