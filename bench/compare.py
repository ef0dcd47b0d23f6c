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

_Quartiles = tuple[float, float, float]  # the lower quartile, the median and the upper quartile


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
        measures = _measures(old.rows[key], new.rows[key])
        if measures is None:
            continue
        (before, after), unit = measures
        if before[0] <= after[2] and after[0] <= before[2]:
            continue
        is_slower = after[1] > before[1]
        slower |= is_slower
        lines.append([*key, _shown(before, unit), _shown(after, unit), "slower" if is_slower else "faster"])
    if not lines:
        return f"Nothing changed beyond its spread in {len(common)} cases.", False
    table = markdown(["part", "case", "before", "after", ""], lines)
    return f"{table}\n\nOur time, in units of the peer's where one is named: more is slower.", slower


def _measures(old: Row, new: Row) -> tuple[list[_Quartiles], str] | None:
    """Our time in both rows, and its unit ("" for seconds); None if they have no common measure."""
    for peer in [*new.goals, *new.ratio]:
        if peer in old.ratio and peer in new.ratio:
            ratios = [row.ratio[peer] for row in (old, new)]
            return [(1 / high, 1 / median, 1 / low) for low, median, high in ratios], f" of {peer}"
    ours = next(iter(new.seconds), "")
    if ours in old.quartiles and ours in new.quartiles:
        return [(row.quartiles[ours][0], row.seconds[ours], row.quartiles[ours][1]) for row in (old, new)], ""
    return None


def _shown(measure: _Quartiles, unit: str) -> str:
    low, median, high = (f"{value:.2f}" if unit else duration(value) for value in measure)
    return f"{median} ({low} to {high}){unit}"


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
