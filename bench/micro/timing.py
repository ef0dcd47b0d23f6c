"""Side-by-side timing: peers take turns, so that a machine whose speed drifts slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_CACHE_BYTES = 64 * 2**20
_MOST_SETS = 256


@dataclass(frozen=True)
class Comparison:
    """Seconds per call of ours and of each peer, and the ratio peer / ours turn by turn (above 1: ours is faster)."""

    seconds: dict[str, float]
    ratio: dict[str, tuple[float, float, float]]  # lower quartile, median, upper quartile

    def fastest_peer(self) -> tuple[float, float, float]:
        """The ratio of the peer that is hardest to beat."""
        return min(self.ratio.values(), key=lambda quartiles: quartiles[1])


def sets_of(bytes_per_set: int) -> int:
    """How many sets of inputs to go through in turn so that they do not stay in the caches (256 at most)."""
    return max(1, min(_MOST_SETS, _CACHE_BYTES // max(bytes_per_set, 1)))


_evicting: list[Tensor] = []


def empty_caches() -> None:
    """Fills the caches with other data, as a forward and backward pass between two steps does."""
    if not _evicting:
        _evicting.append(torch.zeros(2 * _CACHE_BYTES // 4))
    _evicting[0].add_(1)


def compare(
    peers: Mapping[str, Callable[[int], object]],
    *,
    sets: int = 1,
    turns: int = 21,
    seconds_per_turn: float = 0.01,
    prepare: Callable[[], None] | None = None,
    units: Mapping[str, int] | None = None,
) -> Comparison:
    """Times functions of the number of an input set; the first is ours. Every turn runs each of them once.

    A turn calls a function as often as fits `seconds_per_turn`; with `prepare`, once after each untimed `prepare()`.
    Where a call does several units of work, `units` of each function, seconds and ratios are those of one.
    """
    calls = {}
    for name, function in peers.items():
        for index in range(min(sets, 3)):  # warm up: compilation, thread pools, allocator
            if prepare:
                prepare()
            function(index)
        calls[name] = max(1, min(2000, int(seconds_per_turn / max(_time(function, 0, 1, sets, prepare), 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in peers}
    order = list(peers)
    for turn in range(turns):
        for name in order if turn % 2 else reversed(order):
            seconds = _time(peers[name], turn, calls[name], sets, prepare)
            samples[name].append(seconds / (units[name] if units else 1))
    ours, *others = order
    quartiles = {
        name: tuple(float(q) for q in np.quantile(np.array(samples[name]) / samples[ours], (0.25, 0.5, 0.75)))
        for name in others
    }
    return Comparison({name: float(np.median(times)) for name, times in samples.items()}, quartiles)  # type: ignore[arg-type]


def _time(
    function: Callable[[int], object], turn: int, calls: int, sets: int, prepare: Callable[[], None] | None
) -> float:
    """Mean seconds of one call."""
    if prepare is None:
        started = time.perf_counter()
        for call in range(turn * calls, (turn + 1) * calls):
            function(call % sets)
        return (time.perf_counter() - started) / calls
    total = 0.0
    for call in range(calls):
        prepare()
        started = time.perf_counter()
        function(call % sets)
        total += time.perf_counter() - started
    return total / calls
