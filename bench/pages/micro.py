"""Numbers of the micro-benchmarks: times, ratios and bytes of kernels and steps on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from ..figures import NETWORK, SHARE
from ..rows import OURS, Results, Row, read
from ..skipping_rule import against_the_best
from ..tables import duration, markdown, verdict
from . import provenance
from .provenance import RESULTS

SGD, ADAMW = "SGD fused", "AdamW fused"
MOMENTUM = ", momentum 0.9"
_PEAK, _SAVED = "peak memory, bytes", "saved for backward, bytes"
_PAPER = "paper's CNN, batch 64"


@cache
def results() -> Results:
    """All rows."""
    return read(RESULTS / "micro")


def row(part: str, case: str) -> Row:
    """The row of a case."""
    return results().rows[part, case]


def source(part: str) -> str:
    """The command, the machine and the file of a part."""
    runs = [results().runs[part, row.case] for row in results().of_part(part)]
    (command,) = {run["command"] for run in runs}
    return provenance.source(command, [run["environment"] for run in runs], f"micro/{part}.md")


def machine() -> str:
    """The machine on which most parts were measured, and its versions (without the commits)."""
    ours = results().runs["update", "1,000 parameters"]["environment"]
    return provenance.hardware_and_versions([ours])


# ------------------------------------------------------------------------------------------------------------- numbers


def time(row: Row, peer: str = OURS) -> str:
    """The median time of ours, or of a peer."""
    return duration(row.seconds[peer])


def ratio(row: Row, peer: str) -> str:
    """The median of a peer's time divided by ours."""
    return f"{row.ratio[peer][1]:.2f}"


def spread(row: Row, peer: str) -> str:
    """Median and quartiles of a peer's time divided by ours."""
    low, median, high = row.ratio[peer]
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def relative(row: Row, peer: str = SGD) -> str:
    """The median of our time divided by a peer's."""
    return f"{1 / row.ratio[peer][1]:.2f}"


def relative_quartiles(row: Row, peer: str = SGD) -> str:
    """The quartiles of our time divided by a peer's."""
    low, _, high = row.ratio[peer]
    return f"{1 / high:.2f} to {1 / low:.2f}"


def difference(row: Row, peer: str, share: float = 1) -> str:
    """How much longer ours takes than a peer, times a share."""
    return duration(share * (row.seconds[OURS] - row.seconds[peer]))


def tap_overhead() -> str:
    """The time that a measured layer adds to the forward and backward pass."""
    return difference(row("host", "forward and backward of 2 layers with taps"), "without taps", 1 / 2)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _span(numbers: list[float], digits: int = 1) -> str:
    ends = dict.fromkeys(f"{end:.{digits}f}" for end in (min(numbers), max(numbers)))
    return " to ".join(ends)


# -------------------------------------------------------------------------------------------------------------- tables


def compared(part: str, peers: Mapping[str, str], first: str, *, having: str = "", lacking: str = "\0") -> str:
    """A table of a part: our time, ratios with quartiles, and whether the goal was reached.

    Args:
        part: the part.
        peers: heading of the ratio's column by peer. The goal's column is about the first peer.
        first: heading of the first column.
        having: only cases whose name contains this, which is left out.
        lacking: only cases whose name does not contain this.
    """
    chosen = [row for row in results().of_part(part) if having in row.case and lacking not in row.case]
    goal = next(iter(peers))
    lines = []
    for row in chosen:
        met = verdict(row, goal) if goal in row.goals else ""
        lines.append([row.case.replace(having, ""), time(row), *(spread(row, peer) for peer in peers), met])
    return markdown([first, "time", *peers.values(), "goal"], lines)


def importance_table() -> str:
    """`importance` next to the fastest peer, by the activation's shape."""
    lines = []
    for row in results().of_part("importance"):
        ((fastest, goal),) = row.goals.items()
        lines.append([row.case, time(row), spread(row, fastest), f"{goal:g}", verdict(row, fastest)])
    return markdown(["activation", "`importance`", "fastest peer / `importance`", "goal", ""], lines)


def _method(name: str) -> list[Row]:
    """The rows of a method, by the number of old tasks."""
    return [row for row in results().of_part("methods") if row.case.split(",")[0] == name]


def methods_table() -> str:
    """optimizer.step() of all methods, relative to fused SGD's and to the same method in foreach operations."""
    lines = []
    for name in ("NPC", "CPC", "EWC", "MAS", "SI", "SSL"):
        rows = _method(name)
        against = [row.ratio["foreach"][1] for row in rows if "foreach" in row.ratio]
        goals = dict.fromkeys(verdict(row, SGD) for row in rows if SGD in row.goals)
        times = _span([1 / row.ratio[SGD][1] for row in rows])
        lines.append([name, times, _span(against) if against else "", ", ".join(goals)])
    return markdown(["", "method / fused SGD", "foreach / method", "goal"], lines)


def anchors_table() -> str:
    """Methods with one anchor, next to foreach operations with an anchor for each old task."""
    peer = "foreach, an anchor per task"
    anchored = {name: [row for row in _method(name) if peer in row.ratio] for name in ("EWC", "MAS", "SSL")}
    lines = [[name, *(f"{row.ratio[peer][1]:.1f}" for row in rows)] for name, rows in anchored.items()]
    return markdown(["", *(row.case.split(", ")[1] for row in anchored["EWC"])], lines)


def state_table() -> str:
    """Bytes of state for each weight."""
    lines = []
    for name in ("NPC", "CPC", "EWC", "MAS", "SI", "SSL"):
        size = _method(name)[0].facts["state, bytes an element"]
        lines.append([name, f"{size:.3g}"])
    return markdown(["", "bytes for each weight"], lines)


# ------------------------------------------------------------------------------------------------------ frozen neurons


def frozen() -> dict[str, list[Row]]:
    """The rows of steps with certified neurons: by network, in order of the share."""
    networks: dict[str, list[Row]] = {}
    for row in results().of_part("frozen"):
        networks.setdefault(row.facts[NETWORK], []).append(row)
    return networks


def frozen_at(share: float) -> Row:
    """The row of the paper's CNN with a share of its neurons certified."""
    (found,) = (row for row in frozen()[_PAPER] if row.facts[SHARE] == share)
    return found


def unfrozen() -> str:
    """The time of a step relative to SGD's while nothing is frozen: least to most of the other networks."""
    rows = [rows[0] for network, rows in frozen().items() if network != _PAPER]
    assert not any(row.facts[SHARE] for row in rows)
    return _span([1 / row.ratio[SGD][1] for row in rows], 2)


def frozen_table() -> str:
    """The time of a step relative to SGD's, by share and network; in parentheses if nothing is skipped."""

    def shown(row: Row) -> str:
        (unskipped,) = (peer for peer in row.seconds if peer not in (OURS, SGD))
        return f"{relative(row)} ({row.seconds[unskipped] / row.seconds[SGD]:.2f})"

    return _by_share(shown)


def peak_table() -> str:
    """Peak memory of a step relative to SGD's, by share and network."""
    return _by_share(lambda row: f"{row.facts[_PEAK][OURS] / row.facts[_PEAK][SGD]:.2f}")


def most_peak() -> str:
    """How much more than SGD a step needs at most, in percent."""
    peaks = [row.facts[_PEAK] for rows in frozen().values() for row in rows]
    return f"{100 * max(peak[OURS] / peak[SGD] for peak in peaks) - 100:.0f}"


def saved_table() -> str:
    """Memory kept for the backward pass relative to SGD's, by share and network."""
    return _by_share(lambda row: f"{row.facts[_SAVED][OURS] / row.facts[_SAVED][SGD]:.2f}")


def _by_share(shown: Callable[[Row], str]) -> str:
    networks = frozen()
    lines = [[_percent(rows[0].facts[SHARE]), *map(shown, rows)] for rows in zip(*networks.values(), strict=True)]
    return markdown(["certified", *networks], lines)


def frozen_goals() -> Iterator[tuple[str, str, str, str, str]]:
    """Of each goal for certified neurons: share, the most time relative to SGD's, measured, quartiles, verdict."""
    for row in frozen()[_PAPER]:
        if SGD in row.goals:
            goal = f"{1 / row.goals[SGD]:.2f}"
            yield _percent(row.facts[SHARE]), goal, relative(row), relative_quartiles(row), verdict(row, SGD)


def saved(peer: str = OURS) -> str:
    """Megabytes that the paper's CNN keeps for its backward pass if nothing is certified."""
    return f"{frozen_at(0).facts[_SAVED][peer] / 1e6:.2f} MB"


_ALL, _PARTIAL, _CONVOLUTIONS = "all, paper's CNN, batch 64", "_PartialGradientBackward", "aten::convolution_backward"
_SHOWN = 6


def profile(case: str = _ALL) -> list[float]:
    """Milliseconds of an operation in a step: of SGD, and of NPC with 0, 75 and 100 % certified."""
    return list(row("where", case).facts.values())


def convolutions() -> list[float]:
    """Milliseconds of the convolutions' backward passes, as in `profile`."""
    return profile(_CONVOLUTIONS)


def gathering() -> list[float]:
    """Milliseconds of gathering rows, as in `profile`."""
    return profile(_PARTIAL)


def profile_table() -> str:
    """The operations that take most of a step."""
    rows = results().of_part("where")
    kept = [*rows[:_SHOWN], row("where", _PARTIAL), row("where", _ALL)]
    header = ["milliseconds in a step", "SGD", *(f"NPC, {share} certified" for share in ("0 %", "75 %", "100 %"))]
    names = {_PARTIAL: "gathering rows", _ALL: "**all**"}
    return markdown(
        header, [[names.get(r.case, f"`{r.case}`"), *(f"{value:.0f}" for value in r.facts.values())] for r in kept]
    )


def rule() -> dict[tuple[str, float], tuple[float, float]]:
    """By network and share: time with the rule, and with all rows, relative to the best choice."""
    measured: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for line in (RESULTS / "skipping-rule" / "layers.jsonl").read_text().splitlines():
        layer = json.loads(line)
        measured.setdefault((layer["network"], layer["share"]), []).append(layer)
    return {case: against_the_best(layers) for case, layers in measured.items()}


def rule_loss(least: float = 0) -> str:
    """How much longer the rule takes at most than the best choice, from a share on, in percent."""
    return f"{100 * max(rule for (_, share), (rule, _) in rule().items() if share >= least) - 100:.1f}"


def whole_loss(least: float = 0) -> str:
    """How much longer computing all rows takes at most than the best choice, from a share on, in percent."""
    return f"{100 * max(full for (_, share), (_, full) in rule().items() if share >= least) - 100:.0f}"


def rule_source() -> str:
    """The command and the machine of the rule."""
    run = json.loads((RESULTS / "skipping-rule" / "run.json").read_text())
    return provenance.source(run["command"], [run["environment"]], "skipping-rule/layers.md")


# --------------------------------------------------------------------------------------------------------------- calls


def calls(case: str, fact: str) -> Any:
    """A count of a step of the paper's CNN."""
    return row("calls", case).facts[fact]
