"""Where the time of a training step goes, by operations, as PyTorch's profiler sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile

from ..continual.report import markdown
from . import frozen

SHARES = (0.0, 0.75, 1.0)
MOST_OPERATIONS = 12
CYCLES = 5


def where(quick: bool) -> Iterator[dict[str, Any]]:
    """Milliseconds a step that operations take themselves, for SGD and for NPC by the share of certified neurons."""
    network = frozen.SMALL_NETWORKS[0] if quick else frozen.NETWORKS[0]
    columns: dict[str, dict[str, float]] = {}
    for share in SHARES:
        case = frozen.Case(network, share)
        for peer, name in ((frozen.SGD, "SGD fused"), (frozen.OURS, f"npc_ext, {share:.0%} certified")):
            if name not in columns:
                columns[name] = _profiled(case.cycles[peer], frozen.STEPS[peer])
    totals = {name: sum(times.values()) for name, times in columns.items()}
    operations = sorted({one for times in columns.values() for one in times}, key=lambda one: -_most(columns, one))
    for operation in operations[:MOST_OPERATIONS]:
        yield {"case": operation, "milliseconds": {name: times.get(operation, 0.0) for name, times in columns.items()}}
    rest = {
        name: sum(time for one, time in times.items() if one in operations[MOST_OPERATIONS:])
        for name, times in columns.items()
    }
    yield {"case": "all others", "milliseconds": rest}
    yield {"case": f"all, {network.name}", "milliseconds": totals}


def _profiled(cycle: Callable[[], object], steps: int) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(CYCLES):
            cycle()
    averages = profiler.key_averages()
    return {event.key: event.self_cpu_time_total / 1e3 / CYCLES / steps for event in averages}


def _most(columns: dict[str, dict[str, float]], operation: str) -> float:
    return max(times.get(operation, 0.0) for times in columns.values())


def table(rows: list[dict[str, Any]]) -> str:
    """One line per operation."""
    names = list(rows[0]["milliseconds"])
    lines = [[row["case"], *(f"{row['milliseconds'][name]:.1f}" for name in names)] for row in rows]
    return markdown(["operation, ms a step", *names], lines)
