"""The share of the trained parameters that is protected, and a warning if it is small."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from .._warn import warn
from .tap import ImportanceWarning

_LEAST_SHARE = 0.5
_MOST_NAMED = 3


@dataclass(frozen=True)
class Protection:
    """How many elements of parameters an optimizer trains, and how many of them are protected.

    Attributes:
        trained: elements that require a gradient and that the optimizer moves.
        protected: the elements of these that learn at the rate of their neuron (or connection).
        chosen: the elements that are unprotected by the user's choice (protect=False).
    """

    trained: int
    protected: int
    chosen: int

    @classmethod
    def of(cls, trained: Iterable[Tensor], protected: Collection[int], chosen: Collection[int] = ()) -> Protection:
        """Counts elements of parameters. `protected` and `chosen` are ids of parameters."""
        parameters = [parameter for parameter in trained if parameter.requires_grad]
        return cls(
            sum(p.numel() for p in parameters),
            sum(p.numel() for p in parameters if id(p) in protected),
            sum(p.numel() for p in parameters if id(p) in chosen),
        )

    @property
    def share(self) -> float:
        """The protected share of the trained elements, from 0 to 1; 1 if nothing is trained."""
        return self.protected / self.trained if self.trained else 1.0

    def is_little(self) -> bool:
        """Whether more than half is unprotected, not counting the user's choice."""
        return self.trained - self.protected - self.chosen > (1 - _LEAST_SHARE) * self.trained

    def __str__(self) -> str:
        return f"in protected layers: {self.protected:,} of {self.trained:,} trained elements ({_percent(self.share)})"


def warn_if_little(
    protection: Protection, model: nn.Module, unprotected: Iterable[Tensor], units: str, advice: str
) -> None:
    """Warns if more than half of the trained elements are unprotected, and names the modules that hold most of them.

    Args:
        protection: the counts.
        model: the network.
        unprotected: trained parameters that are not protected, except for the user's choice.
        units: "neurons" or "connections", whichever the optimizer protects.
        advice: what to do, as a part of a sentence.
    """
    if not protection.is_little():
        return
    rest = ", ".join(_largest(model, unprotected, protection.trained))
    warn(
        f"only {_percent(protection.share)} of the trained parameters (counted by elements) belong to protected "
        f"{units}; the rest trains at the plain learning rate and forgets: {rest}. {advice}",
        ImportanceWarning,
    )


def _largest(model: nn.Module, parameters: Iterable[Tensor], trained: int) -> list[str]:
    """The classes of modules that hold most of the parameters, each with its share of all trained elements."""
    owner_of: dict[int, tuple[str, str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owner_of.setdefault(id(parameter), (type(module).__name__, name))
    elements: dict[str, Counter[str]] = {}  # by class, then by module
    for parameter in parameters:
        kind, name = owner_of.get(id(parameter), ("parameters outside of the model", ""))
        elements.setdefault(kind, Counter())[name] += parameter.numel()
    largest = sorted(elements, key=lambda kind: -elements[kind].total())[:_MOST_NAMED]
    return [f"{_named(kind, list(elements[kind]))}: {_percent(elements[kind].total() / trained)}" for kind in largest]


def _named(kind: str, names: list[str]) -> str:
    if not names[0]:
        return kind
    return f"{kind} {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share in (0, 1) or 0.01 <= share <= 0.99 else 2}f} %"
