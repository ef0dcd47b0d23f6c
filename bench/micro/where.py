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
    most = {
        operation: max(times.get(operation, 0.0) for times in columns.values())
        for times in columns.values()
        for operation in times
    }
    operations = sorted(most, key=lambda operation: -most[operation])
    rows = {operation: [operation] for operation in operations[:MOST_OPERATIONS]}
    rows |= {"all others": operations[MOST_OPERATIONS:], f"all, {network.name}": operations}
    for name, added in rows.items():
        facts = {
            f"{peer}, ms a step": sum(times.get(operation, 0.0) for operation in added)
            for peer, times in columns.items()
        }
        yield Row("where", name, facts=facts)


def _profiled(step: Callable[[], object]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
    averages = profiler.key_averages()
    return {event.key: event.self_cpu_time_total / 1e3 / STEPS for event in averages}
