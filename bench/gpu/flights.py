"""The flights: what each part does, and how many seconds it may take. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

SECONDS = 230  # the limits of a flight add up to no more


@dataclass(frozen=True)
class Part:
    """A part of a flight.

    Attributes:
        name: of the part; its rows carry it.
        limit: seconds that it may take, besides what the parts before it left over of theirs.
    """

    name: str
    limit: int


def _parts(**limits: int) -> tuple[Part, ...]:
    return tuple(Part(name, limit) for name, limit in limits.items())


FLIGHTS: dict[str, tuple[Part, ...]] = {
    # Is everything right, and about how fast is it?
    "correctness": _parts(load=40, tests=75, exercise=25, sanitizer=45, decisive=45),
    # How near are the kernels to what the memory can do, and what do the counters say?
    "kernels": _parts(load=40, importance=50, relu=15, update=55, host=10, revisions=30, counters=30),
    # What is a whole training step worth, and what does a whole experiment come to? Compiled peers come last.
    "training": _parts(load=40, step=40, frozen=30, reduce_overhead=30, icifar100=45, compile_tests=25, compiled=20),
}
