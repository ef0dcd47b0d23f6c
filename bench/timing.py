"""Side-by-side timing: peers take turns, so that a machine whose speed drifts slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .rows import Row, summary

_CACHE_BYTES = 64 * 2**20
_MOST_SETS = 256

Call = Callable[[int], object]


@dataclass
class Case:
    """What is timed: functions of the number of an input set, by name; ours comes first.

    Attributes:
        name: tells it from the other cases of its part.
        peers: the functions. All of them do the same work, or a part of it that is known.
        sets: how many input sets there are. Calls go through them in turn, so that none stays in a cache.
        prepare: is called before each call, and not timed.
        check: raises AssertionError if a peer, by name, does not compute what it should.
        turns: how often each function is timed.
        seconds_per_turn: a function is called as often in a turn as fits this time.
        goals: by peer, how many times as long as ours it should take at least.
        bytes: that ours reads and writes.
        facts: more about the case; or a function that finds them out after the case was timed.
        part: what it belongs to, if not to the part that yields it.
    """

    name: str
    peers: Mapping[str, Call]
    sets: int = 1
    prepare: Callable[[], None] | None = None
    check: Callable[[str], None] | None = None
    turns: int = 21
    seconds_per_turn: float = 0.01
    goals: Mapping[str, float] = field(default_factory=dict)
    bytes: int | None = None
    facts: Mapping[str, Any] | Callable[[], Mapping[str, Any]] = field(default_factory=dict)
    part: str = ""


@dataclass(frozen=True)
class Later:
    """A case that is made when its turn comes: an error while it is made is the case's own.

    Attributes:
        name: of the case.
        make: makes it.
        part: what it belongs to, if not to the part that yields it.
    """

    name: str
    make: Callable[[], Case]
    part: str = ""


class Timer(Protocol):
    """How calls are timed; a turn has `most_calls` at most."""

    most_calls: int

    def seconds(self, case: Case, name: str, first: int, calls: int) -> float:
        """Mean seconds of one call of a peer, from call number `first` on."""

    def finish(self) -> Mapping[str, Any]:
        """Facts about how the last case was timed; the next case may begin."""


class HostTimer:
    """Times work that is done when the call returns."""

    most_calls = 2000

    def seconds(self, case: Case, name: str, first: int, calls: int) -> float:
        """As `Timer` says."""
        function, total = case.peers[name], 0.0
        if case.prepare is None:
            started = time.perf_counter()
            for call in range(first, first + calls):
                function(call % case.sets)
            return (time.perf_counter() - started) / calls
        for call in range(first, first + calls):
            case.prepare()
            started = time.perf_counter()
            function(call % case.sets)
            total += time.perf_counter() - started
        return total / calls

    def finish(self) -> Mapping[str, Any]:
        """Nothing is known beside the times."""
        return {}


def warm_up(case: Case, name: str) -> None:
    """Checks what a peer computes and calls it a few times: compilation, thread pools, allocator."""
    if case.check is not None:
        case.check(name)
    for index in range(min(max(case.sets, 2), 3)):
        if case.prepare:
            case.prepare()
        case.peers[name](index % case.sets)


def calls_per_turn(case: Case, name: str, timer: Timer) -> int:
    """How many calls of a peer make a turn."""
    once = timer.seconds(case, name, 0, 1)
    return max(1, min(timer.most_calls, int(case.seconds_per_turn / max(once, 1e-7))))


def measure(part: str, case: Case, timer: Timer, turns: int | None = None) -> Row:
    """Times all peers of a case, turn by turn in alternating order.

    Args:
        part: what the case belongs to.
        case: what to time.
        timer: how.
        turns: how many, if not as many as the case asks for; a turn has one call then.
    """
    calls = {}
    for name in case.peers:
        warm_up(case, name)
        calls[name] = 1 if turns else calls_per_turn(case, name, timer)
    samples: dict[str, list[float]] = {name: [] for name in case.peers}
    order = list(case.peers)
    for turn in range(turns or case.turns):
        for name in order if turn % 2 else reversed(order):
            samples[name].append(timer.seconds(case, name, turn * calls[name], calls[name]))
    row = summary(case.part or part, case.name, samples)
    row.goals, row.bytes = dict(case.goals), case.bytes
    row.facts = {**timer.finish(), **(case.facts() if callable(case.facts) else case.facts)}
    return row


def check(name: str, got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    """Raises AssertionError if a peer computes something else: it is no peer then."""
    error = (got.double() - want.double()).norm() / want.double().norm()
    if not error < tolerance:
        raise AssertionError(f"{name} is off by {error:.2g} of what it should compute")


def ignoring_the_set(function: Callable[[], object]) -> Call:
    """A peer of one that has no input sets."""
    return lambda _: function()


def sets_of(bytes_per_set: int) -> int:
    """How many sets of inputs to go through in turn so that they do not stay in the CPU's caches (256 at most)."""
    return max(1, min(_MOST_SETS, _CACHE_BYTES // max(bytes_per_set, 1)))


_evicting: list[Tensor] = []


def empty_caches() -> None:
    """Fills the CPU's caches with other data, as a forward and backward pass between two steps does."""
    if not _evicting:
        _evicting.append(torch.zeros(2 * _CACHE_BYTES // 4))
    _evicting[0].add_(1)
