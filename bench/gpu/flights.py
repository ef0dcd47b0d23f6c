"""The flights: what each part does, and how many seconds it may take at most. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

SECONDS = 230  # a flight's limits add up to no more


@dataclass(frozen=True)
class Part:
    """A part of a flight.

    Attributes:
        name: of the part; its rows carry it.
        limit: seconds after which it is ended, with what it has.
        takes_rest: the part may also use what the parts before it left over.
    """

    name: str
    limit: int
    takes_rest: bool = False


FLIGHTS: dict[str, tuple[Part, ...]] = {
    # Is everything right, and about how fast is it?
    "correctness": (Part("load", 45), Part("tests", 90), Part("sanitizer", 50), Part("decisive", 45)),
    # How near are the kernels to what the memory can do, and what do the counters say?
    "kernels": (
        Part("load", 45),
        Part("importance", 50),
        Part("relu", 10),
        Part("update", 55),
        Part("host", 10),
        Part("revisions", 30),
        Part("counters", 30),
    ),
    # What is a whole training step worth, and what does a whole experiment come to?
    "training": (
        Part("load", 45),
        Part("step", 40),
        Part("frozen", 35),
        Part("reduce_overhead", 25),
        Part("icifar100", 60, takes_rest=True),
        Part("compiled", 25),
    ),
}
