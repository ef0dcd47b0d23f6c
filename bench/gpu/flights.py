"""The flights: their parts, and how many seconds each may take. Nothing here imports torch."""

from __future__ import annotations

SECONDS = 230  # the sum of a flight's limits is at most this


def _parts(**limits: int) -> dict[str, int]:
    """By part, the seconds that it may take, in addition to what earlier parts have not used."""
    return limits


FLIGHTS = {
    # Is everything correct, and roughly how fast is it?
    "correctness": _parts(load=40, tests=75, exercise=25, sanitizer=45, decisive=45),
    # How close are the kernels to the memory's bandwidth, and what do the counters say?
    "kernels": _parts(load=40, importance=50, relu=15, update=55, host=10, revisions=30, counters=30),
    # How fast are whole training steps, and what does an experiment achieve? Compiled peers come last.
    "training": _parts(load=40, step=40, frozen=30, reduce_overhead=30, icifar100=45, compile_tests=25, compiled=20),
}
