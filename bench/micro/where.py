"""Where the time of a training step goes: by operation, from PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.profiler import ProfilerActivity, profile

from ..certified import SGD, SMALL_NETWORKS, Certified, Network
from ..networks import paper_cnn
from ..rows import OURS, Row

NETWORK = Network("paper's CNN, batch 64", paper_cnn, (64, 3, 32, 32), 9)
SHARES = (0.0, 0.75, 1.0)
MOST_OPERATIONS = 12
STEPS = 10


def where(quick: bool) -> Iterator[Row]:
    """Self time of each operation in ms per step, for SGD and for NPC by the share of certified neurons."""
    network = SMALL_NETWORKS[0] if quick else NETWORK
    columns: dict[str, dict[str, float]] = {}
    for share in SHARES:
        certified = Certified(network, share, peers=(SGD,))
        for peer, name in ((SGD, SGD), (OURS, f"{OURS}, {share:.0%} certified")):
            if name not in columns:
                columns[name] = _profiled(certified.steps[peer])
    totals = {name: sum(times.values()) for name, times in columns.items()}
    operations = sorted({one for times in columns.values() for one in times}, key=lambda one: -_most(columns, one))
    rest = {
        name: sum(time for one, time in times.items() if one in operations[MOST_OPERATIONS:])
        for name, times in columns.items()
    }
    yield from (
        _row(one, {name: times.get(one, 0.0) for name, times in columns.items()})
        for one in operations[:MOST_OPERATIONS]
    )
    yield _row("all others", rest)
    yield _row(f"all, {network.name}", totals)


def _row(operation: str, milliseconds: dict[str, float]) -> Row:
    return Row("where", operation, facts={f"{name}, ms a step": time for name, time in milliseconds.items()})


def _profiled(step: Callable[[], object]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
    averages = profiler.key_averages()
    return {event.key: event.self_cpu_time_total / 1e3 / STEPS for event in averages}


def _most(columns: dict[str, dict[str, float]], operation: str) -> float:
    return max(times.get(operation, 0.0) for times in columns.values())
