"""Goals on a GPU, and what the flights under bench/results/<GPU>/<flight>/ say of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..gpu.flights import FLIGHTS
from ..rows import NAME, NOT_MEASURED, Results, read
from ..tables import markdown, verdict
from .provenance import RESULTS


@dataclass(frozen=True)
class Goal:
    """A goal.

    Attributes:
        text: the goal in words.
        parts: the parts of a flight that measure it.
        about: whether a goal of a row, with this peer and case, belongs to it.
    """

    text: str
    parts: tuple[str, ...]
    about: Callable[[str, str], bool]


_PAPER = "paper's CNN, batch 256"
GOALS = (
    Goal(
        "`importance` and `update` reach at least 90 % of the bandwidth of a kernel with the same mix of reads and "
        "writes, from 64 MiB up",
        ("importance", "update"),
        lambda peer, case: peer.startswith("ceiling"),
    ),
    Goal(
        "`update` takes at most as long as `SGD(fused=True)`, from 10 thousand to 500 million parameters",
        ("update",),
        lambda peer, case: peer == "SGD fused",
    ),
    Goal(
        "`relu_backward_importance` takes at most 1.03 times as long as ReLU's backward pass",
        ("relu",),
        lambda peer, case: peer == "without importance",
    ),
    Goal(
        "A whole step of the paper's CNN, batch 256, takes at most 1.03 times as long as with fused SGD, and 1.01 "
        "times in a CUDA graph",
        ("step",),
        lambda peer, case: case.startswith(_PAPER),
    ),
    Goal(
        "The same with 75 % of each layer certified takes at most 0.85 times as long, and 0.75 times with 100 %",
        ("frozen",),
        lambda peer, case: case.startswith(_PAPER),
    ),
)
# A count that the tables show; it has no peer.
LAUNCHES = (
    "Each operation is one launch. An update is one launch for each dtype, and one more for layers with more than "
    '4,096 neurons. A step with `skip_gradients="none"` does not synchronize'
)


def flights(folder: Path = RESULTS) -> Iterator[tuple[Path, Results]]:
    """The recorded flights: their folders and rows."""
    for path in sorted(folder.glob(f"*/*/{NAME}")):
        if path.parent.name in FLIGHTS:
            yield path.parent, read(path)


def flown() -> bool:
    """Whether a flight is recorded."""
    return any(True for _ in flights())


def goals_table(folder: Path = RESULTS) -> str:
    """The goals, and how many of the rows that measure each of them reached it."""
    lines = []
    for goal in GOALS:
        verdicts: Counter[str] = Counter(
            verdict(row, peer)
            for _, results in flights(folder)
            for part in goal.parts
            for row in results.of_part(part)
            for peer in row.goals
            if goal.about(peer, row.case)
        )
        found = ", ".join(f"{word} in {count} of {verdicts.total()} rows" for word, count in verdicts.items())
        lines.append([goal.text, found or NOT_MEASURED])
    counted = any(results.of_part("launches") for _, results in flights(folder))
    lines.append([LAUNCHES, "see the table of launches" if counted else NOT_MEASURED])
    return markdown(["goal", "result"], lines)


def flights_list(folder: Path = RESULTS) -> str:
    """Links to the tables of the recorded flights."""
    lines = []
    for flight, _ in flights(folder):
        tables = [
            f"[{path.stem}](../../bench/results/{path.relative_to(folder)})" for path in sorted(flight.glob("*.md"))
        ]
        lines.append(f"* {flight.parent.name}, {flight.name}: {', '.join(tables)}")
    return "\n".join(lines) or "No run on a GPU is recorded yet."
