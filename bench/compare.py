"""Finds what got slower: `python -m bench.compare OLD NEW` compares two files of rows from the same device.

A case is compared by the ratio of our time to a peer's. The two were timed in turns, so load on the machine matters
little. The peer is the one of the case's first goal, or else its first peer. Cases without peers are compared in
seconds. A case got slower or faster if the quartiles of the two files do not overlap. The exit status is 1 if any case
got slower.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .rows import Results, Row, RowsError, device, read
from .tables import duration, markdown

# (lower quartile, median, upper quartile) of our time, and its unit.
_Measure = tuple[tuple[float, float, float], str]


def compare(old: Results, new: Results) -> tuple[str, bool]:
    """A table of what changed, and whether anything got slower.

    Raises:
        RowsError: the files have no case in common, or one was measured on another device.
    """
    common = [key for key in new.rows if key in old.rows]
    if not common:
        raise RowsError("the two files have no case in common")
    lines, slower = [], False
    for key in common:
        devices = [device(results.runs[key]) for results in (old, new)]
        if devices[0] != devices[1]:
            raise RowsError(
                f"{key[1]!r} was measured on {devices[0]} and on {devices[1]}; numbers of two devices are not compared"
            )
        pair = _measures(old.rows[key], new.rows[key])
        if pair is None:
            continue
        (before, unit), (after, _) = pair
        if before[0] <= after[2] and after[0] <= before[2]:
            continue
        is_slower = after[1] > before[1]
        slower |= is_slower
        lines.append([*key, _shown(before, unit), _shown(after, unit), "slower" if is_slower else "faster"])
    if not lines:
        return f"Nothing changed beyond its spread in {len(common)} cases.", False
    table = markdown(["part", "case", "before", "after", ""], lines)
    return f"{table}\n\nOur time, in units of the peer's where one is named: more is slower.", slower


def _measures(old: Row, new: Row) -> tuple[_Measure, _Measure] | None:
    """The same measure of both rows; None if they have none."""
    for peer in [*new.goals, *new.ratio]:
        if peer in old.ratio and peer in new.ratio:
            return _relative(old, peer), _relative(new, peer)
    ours = next(iter(new.seconds), None)
    if ours is None or ours not in old.quartiles or ours not in new.quartiles:
        return None
    return _seconds(old, ours), _seconds(new, ours)


def _relative(row: Row, peer: str) -> _Measure:
    low, median, high = row.ratio[peer]
    return (1 / high, 1 / median, 1 / low), f"of {peer}"


def _seconds(row: Row, name: str) -> _Measure:
    low, high = row.quartiles[name]
    return (low, row.seconds[name], high), "s"


def _shown(measure: tuple[float, float, float], unit: str) -> str:
    low, median, high = (duration(one) if unit == "s" else f"{one:.2f}" for one in measure)
    return f"{median} ({low} to {high})" + ("" if unit == "s" else f" {unit}")


def main() -> int:
    """Prints what changed; the exit status says whether something got slower."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("old", type=Path, help="rows.jsonl, or the folder that it is in")
    parser.add_argument("new", type=Path, help="the same of the newer run")
    arguments = parser.parse_args()
    try:
        text, slower = compare(read(arguments.old), read(arguments.new))
    except RowsError as error:
        parser.error(str(error))
    print(text)
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
