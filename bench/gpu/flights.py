"""The flights: their parts, and how many seconds each may take. Nothing here imports torch."""

from __future__ import annotations

SECONDS = 230  # the sum of a flight's limits is at most this


def _parts(**limits: int) -> dict[str, int]:
    """By part, the seconds that it may take, in addition to what earlier parts have not used."""
    return limits


# Only `load` ends a flight if it fails. Its limit leaves time to import torch for the first time, and to build.
FLIGHTS = {
    # Is everything correct, and roughly how fast is it?
    # What may take any time comes last: memcheck and, in training, iCIFAR100.
    "correctness": _parts(load=75, tests=75, exercise=25, decisive=30, sanitizer=25),
    # How close are the kernels to the memory's bandwidth, and what do the counters say?
    "kernels": _parts(load=75, importance=45, relu=15, update=45, host=10, revisions=20, counters=20),
    # How fast are whole training steps, and what does an experiment achieve?
    "training": _parts(load=75, step=35, frozen=25, reduce_overhead=25, compile_tests=25, compiled=20, icifar100=25),
}
