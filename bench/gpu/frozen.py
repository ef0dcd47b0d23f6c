"""Training steps by the share of neurons that are certain not to move, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..micro import frozen as cases
from .device import Device
from .networks import resnet18

NETWORKS = [
    cases.Network("paper's CNN, batch 256", cases.paper_cnn, (256, 3, 32, 32), 0, has_goals=True),
    cases.Network("ResNet-18, batch 256", resnet18, (256, 3, 32, 32), 0),
    cases.Network("MLP 784-1024-1024-10, batch 1024", partial(cases.mlp, 784, 1024), (1024, 784), 0),
]


def frozen(device: Device, quick: bool) -> Iterator[dict[str, Any]]:
    """Whole training steps by the share of neurons that are certain not to move: NPC, lazy NPC and SGD (fused)."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    networks = cases.SMALL_NETWORKS if device.dry else NETWORKS[: 1 if quick else None]
    for network in networks:
        for share in cases.SHARES[:: 5 if quick or device.dry else 1]:
            yield _row(device, network, share)


def _row(device: Device, network: cases.Network, share: float) -> dict[str, Any]:
    case = cases.Case(network, share, device.name)
    peers: dict[str, Callable[[int], object]] = {
        name: lambda _, cycle=cycle: cycle()  # type: ignore[misc]
        for name, cycle in case.cycles.items()
    }
    result = device.compare(peers)
    seconds = {name: result.seconds[name] / cases.STEPS[name] for name in peers}
    # Quartiles turn by turn are of cycles, which differ in their steps.
    low, median, high = (one * cases.STEPS[cases.OURS] / cases.STEPS[cases.SGD] for one in result.ratio[cases.SGD])
    lazy = seconds[cases.LAZY] / seconds[cases.SGD]
    of_ours, of_lazy = (
        1 / cases.GOALS[name][share] if network.has_goals and share in cases.GOALS[name] else None
        for name in (cases.OURS, cases.LAZY)
    )
    return {
        "case": f"{network.name}, {share:.0%}",
        "seconds": seconds,
        "gradients skipped": case.skipped,
        "npc_ext / SGD fused (quartiles)": (1 / high, 1 / median, 1 / low),
        "skip_frozen=False / SGD fused": seconds[cases.UNSKIPPED] / seconds[cases.SGD],
        "lazy / SGD fused": lazy,
        "peak bytes": {name: device.peak_bytes(cycle) for name, cycle in case.cycles.items()},
        "goal": "" if of_ours is None else of_ours,
        "reached": _reached(device, 1 / median, of_ours),
        "lazy goal": "" if of_lazy is None else of_lazy,
        "lazy reached": _reached(device, lazy, of_lazy),
    }


def _reached(device: Device, ratio: float, most: float | None) -> bool | str | None:
    """Whether a goal is reached; empty where there is none, None where a dry run measures nothing."""
    if most is None:
        return ""
    return None if device.dry else ratio <= most
