"""Tables: how numbers are shown. `python -m bench.tables` makes tables and figures from stored rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import output_folder
from .rows import LIMITED, NOT_MEASURED, OURS, Results, Row, RowsError, read

NOT_DECIDED = "not decided"  # whether a goal was reached


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Its columns are aligned in plain text."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which is NaN for a single value."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(np.mean(values)), float(error)


def with_error(values: Sequence[float], digits: int, factor: int = 1) -> str:
    """Mean ± standard error, both times a factor; a single value has no error."""
    mean, error = mean_and_error(values)
    return f"{factor * mean:.{digits}f}" + ("" if np.isnan(error) else f" ± {factor * error:.{digits}f}")


def percent(values: Sequence[float]) -> str:
    """Mean ± standard error in percent; a single value has no error."""
    return with_error(values, 1, 100)


def duration(seconds: float) -> str:
    """Seconds as text, in s, ms or µs."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.2f} {unit}"
    return f"{seconds * 1e6:.1f} µs"


def save(figure: Any, stem: Path) -> None:
    """Writes a figure as SVG. The same figure always gives the same bytes."""
    import matplotlib

    stem.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": stem.name}):
        figure.savefig(stem.with_name(stem.name + ".svg"), metadata={"Date": None})


def of_rows(rows: Iterable[Row]) -> str:
    """A table of rows: our time, the ratio of each peer's time to ours, facts, and whether goals were reached.

    Of rows of tests, only failures are shown.
    """
    shown = [row for row in rows if row.facts.get("outcome") not in ("passed", "skipped")]
    if not shown:
        return ""
    ours = next((name for row in shown for name in row.seconds), "")
    peers = list(dict.fromkeys(peer for row in shown for peer in row.ratio))
    facts = list(dict.fromkeys(fact for row in shown for fact in row.facts))
    header = ["case"]
    header += [ours] if ours else []
    header += ["GB/s"] if any(row.bytes for row in shown) else []
    header += [f"{peer}, times as long" for peer in peers] + facts
    header += ["goal"] if any(row.goals for row in shown) else []
    lines = []
    for row in shown:
        time = next(iter(row.seconds.values()), None)
        cells = {"case": row.case, ours: "" if time is None else duration(time), "goal": _verdicts(row)}
        cells["GB/s"] = f"{row.bytes / time / 1e9:.0f}" if row.bytes and time else ""
        cells |= {f"{peer}, times as long": cell(ratio) for peer, ratio in row.ratio.items()}
        cells |= {fact: cell(value) for fact, value in row.facts.items()}
        lines.append([cells.get(column, "") for column in header])
    return markdown(header, lines)


def cell(value: Any) -> str:
    """A value as a table shows it. Quartiles become "median (lower to upper)", and None becomes "not measured"."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        if len(value) == 3 and all(isinstance(number, float) for number in value):
            low, median, high = value
            return f"{median:.2f} ({low:.2f} to {high:.2f})"
        return ", ".join(map(cell, value))
    if isinstance(value, dict):
        if all(number is None for number in value.values()):
            return NOT_MEASURED
        return ", ".join(f"{cell(number)} {name}" for name, number in value.items())
    return str(value).replace("|", "/").replace("\n", " ")


def verdict(row: Row, peer: str) -> str:
    """Whether the goal was reached: by the median. A missed goal below the upper quartile is "within the noise"."""
    if peer not in row.ratio:
        return NOT_MEASURED
    if {OURS, peer} & set(row.facts.get(LIMITED, ())):
        return NOT_DECIDED
    (_, median, high), goal = row.ratio[peer], row.goals[peer]
    return "reached" if median >= goal else "within the noise" if high >= goal else "missed"


def _verdicts(row: Row) -> str:
    verdicts = []
    for peer, goal in row.goals.items():
        word = verdict(row, peer)
        if word == NOT_DECIDED:
            word += f" against {peer}: {LIMITED}"
        elif word != NOT_MEASURED:
            word += f" (at least {goal:.2f} of {peer})"
        verdicts.append(word)
    return "; ".join(verdicts)


# Shown below a part's table in addition to the state in which the part ended.
_TOLD = ("passed", "failed", "skipped", "not finished", "memory errors", "error")


def of_part(results: Results, part: str) -> str:
    """A part's table, how the part ended (unless it is complete), and the commands that measured it."""
    rows = results.of_part(part)
    ended = results.parts.get(part, {})
    told = [f"{name}: {ended[name]}" for name in _TOLD if name in ended]
    state = ended.get("state", "complete")
    texts = [of_rows(rows)]
    if told or not rows or state != "complete":
        texts.append(", ".join([f"**{state}**", *told]))
    device = results.device_of(part)
    if device.endswith("(dry run)"):
        texts.insert(0, "A dry run: sizes are not those that are named, and times mean nothing.")
    for run in {row.case: results.runs[part, row.case] for row in rows}.values():
        commit = run.get("environment", {}).get("commit", "unknown")
        text = f"`{run.get('command', 'unknown')}`, commit {commit}, {device}"
        if text not in texts:
            texts.append(text)
    return "\n\n".join(filter(None, texts))


def main() -> int:
    """Writes a table <part>.md for every part next to the rows, and the figures. Prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=main.__doc__)
    parser.add_argument("rows", type=Path, help="rows.jsonl, or the folder that it is in")
    parser.add_argument("--out", type=output_folder, help="output folder (default: where the rows are)")
    arguments = parser.parse_args()
    try:
        folder = arguments.rows if arguments.rows.is_dir() else arguments.rows.parent
        write(read(arguments.rows), arguments.out or folder)
    except BrokenPipeError:  # the reader closed the pipe
        sys.stderr.close()
    except (RowsError, OSError) as error:
        parser.error(str(error))
    return 0


def write(results: Results, out: Path, parts: Iterable[str] = ()) -> None:
    """Writes and prints the tables of the given parts (default: all), and draws the figures."""
    from . import figures

    out.mkdir(parents=True, exist_ok=True)
    for part in parts or results.names():
        text = of_part(results, part)
        (out / f"{part}.md").write_text(text + "\n")
        print(f"\n### {part}\n\n{text}")
    figures.draw(results, out)


if __name__ == "__main__":
    sys.exit(main())
