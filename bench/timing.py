"""Side-by-side timing: peers take turns, so a machine whose speed drifts affects all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .rows import Row, in_turns, summary

_CACHE_BYTES = 64 * 2**20
_MOST_SETS = 256

Call = Callable[[int], object]


@dataclass
class Case:
    """Functions to time, each of which takes the index of an input set.

    Attributes:
        name: name of the case, unique within its part.
        peers: the functions, by name; ours comes first. All do the same work, or a known part of it.
        sets: number of input sets. Calls cycle through them, so that none stays in a cache.
        prepare: called before each call; not timed.
        check: called with the name of a peer; raises AssertionError if the peer computes something else.
        turns: how often each function is timed.
        seconds_per_turn: time that the calls of one turn should take.
        goals: by peer, the least ratio of its time to ours.
        bytes: number of bytes that ours reads and writes.
        facts: more about the case, or a function that returns it after the case was timed.
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


@dataclass(frozen=True)
class Later:
    """A case that is built when its turn comes, so that an error while it is built concerns this case only.

    Attributes:
        name: name of the case.
        make: builds the case, or its row if it is not timed on the device.
        part: the part that the case belongs to (default: the part that yields it).
    """

    name: str
    make: Callable[[], Case | Row]
    part: str = ""


class Timer(Protocol):
    """Times calls. A turn has at most `most_calls`."""

    most_calls: int

    def seconds(self, case: Case, name: str, first: int, calls: int) -> float:
        """Returns the mean seconds of a peer's call over some calls, the first of which has number `first`."""

    def finish(self) -> Mapping[str, Any]:
        """Returns facts about how the last case was timed. Called before the next case begins."""


class HostTimer:
    """Times how long a call takes to return.

    Args:
        before: called before each call; not timed.
        most_calls: the most calls of a turn.
    """

    def __init__(self, before: Callable[[], None] | None = None, most_calls: int = 2000) -> None:
        self._before, self.most_calls = before, most_calls

    def seconds(self, case: Case, name: str, first: int, calls: int) -> float:
        """See `Timer`."""
        function, total = case.peers[name], 0.0
        preparations = [prepare for prepare in (case.prepare, self._before) if prepare is not None]
        if not preparations:
            started = time.perf_counter()
            for call in range(first, first + calls):
                function(call % case.sets)
            return (time.perf_counter() - started) / calls
        for call in range(first, first + calls):
            for prepare in preparations:
                prepare()
            started = time.perf_counter()
            function(call % case.sets)
            total += time.perf_counter() - started
        return total / calls

    def finish(self) -> Mapping[str, Any]:
        """See `Timer`; there are no facts."""
        return {}


def warm_up(case: Case, name: str) -> None:
    """Checks what a peer computes, and calls it a few times to warm up compilation, thread pools and allocator."""
    if case.check is not None:
        case.check(name)
    for index in range(min(max(case.sets, 2), 3)):
        if case.prepare:
            case.prepare()
        case.peers[name](index % case.sets)


def calls_per_turn(case: Case, name: str, timer: Timer) -> int:
    """The number of a peer's calls in one turn."""
    once = timer.seconds(case, name, 0, 1)
    return max(1, min(timer.most_calls, int(case.seconds_per_turn / max(once, 1e-7))))


def measure(part: str, case: Case, timer: Timer, turns: int | None = None) -> Row:
    """Times all peers of a case, turn by turn in alternating order.

    Args:
        part: the part that the case belongs to.
        case: the case to time.
        timer: times the calls.
        turns: number of turns, each of one call (default: the case's turns and calls).
    """
    calls = {}
    for name in case.peers:
        warm_up(case, name)
        calls[name] = 1 if turns else calls_per_turn(case, name, timer)

    def seconds(name: str, turn: int) -> float:
        return timer.seconds(case, name, turn * calls[name], calls[name])

    row = summary(part, case.name, in_turns(case.peers, turns or case.turns, seconds))
    row.goals, row.bytes = dict(case.goals), case.bytes
    row.facts = {**timer.finish(), **(case.facts() if callable(case.facts) else case.facts)}
    return row


def check(name: str, got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    """Raises AssertionError if a peer computes something else than it should. If it should be zero, it has to be."""
    error, size = (got.double() - want.double()).norm(), want.double().norm()
    if not error <= tolerance * size:  # also if one of them is NaN
        raise AssertionError(f"{name} is off by {error / size:.2g} of what it should compute")


def ignoring_the_set(function: Callable[[], object]) -> Call:
    """Turns a function without arguments into a peer."""
    return lambda _: function()


def sets_of(bytes_per_set: int) -> int:
    """How many input sets to cycle through so that they do not stay in the CPU's caches (at most 256)."""
    return max(1, min(_MOST_SETS, _CACHE_BYTES // max(bytes_per_set, 1)))


_evicting: list[Tensor] = []


def empty_caches() -> None:
    """Fills the CPU's caches with other data, as the forward and backward pass between two steps does."""
    if not _evicting:
        _evicting.append(torch.zeros(2 * _CACHE_BYTES // 4))
    _evicting[0].add_(1)
