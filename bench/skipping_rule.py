"""Whether to compute a part of a layer's rows alone: NPC's fixed rule beside a clock, and beside never doing so.

    python -m bench.skipping_rule --threads 1 --out bench/results/skipping-rule/1-thread

times whole training steps by the share of neurons that are certain not to move. All peers train one model and take
turns; they differ in `skipping_pays` only. The clock times each kind of layer once, as the package did before it had a
rule, and so decides better than any rule could, apart from its own noise.

With one thread, seconds are those of the process's CPU time, which other programs disturb least.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npc_ext import NPC
from npc_ext.skipping import forward
from npc_ext.skipping.gradients import Operation, PartialGradient, skipping_pays
from npc_ext.skipping.rows import Rows

from . import environment
from .networks import Transformer, mlp, paper_cnn, resnet18
from .rows import OURS, Writer, read
from .tables import write
from .timing import Case, HostTimer, measure

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {  # with input shape and turns
    "MLP 784-1024-1024-10, batch 256": (partial(mlp, 784, 1024), (256, 784), 15),
    "transformer of width 128, batch 32 x 32": (partial(Transformer, 128), (32, 32, 128), 15),
    "ResNet-18, batch 16": (resnet18, (16, 3, 32, 32), 7),
    "paper's CNN, batch 64": (paper_cnn, (64, 3, 32, 32), 5),
}
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
_TIMINGS = 5
_clocked: dict[Any, bool] = {}


def clock(operation: Operation, x: Tensor, weight: Tensor, rows: Rows) -> bool:
    """Whether a forward and backward pass with these rows alone is faster than one with all, measured once."""
    key = (operation, x.shape, x.requires_grad, weight.shape, len(rows))
    if key not in _clocked:
        inputs = x.detach().requires_grad_(x.requires_grad), weight.detach().requires_grad_()
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        ways: list[Callable[[], Tensor]] = [
            lambda: PartialGradient.apply(*inputs, None, operation, rows, lambda: None),
            lambda: operation.forward(*inputs, None),
        ]
        seconds = [float("inf")] * 2
        for turn in range(_TIMINGS + 1):  # the first call warms up
            for way, function in enumerate(ways):
                started = time.process_time()
                output = function()
                torch.autograd.grad(output, wanted, output.detach())
                if turn:
                    seconds[way] = min(seconds[way], time.process_time() - started)
        _clocked[key] = seconds[0] < seconds[1]
    return _clocked[key]


def whole(operation: Operation, x: Tensor, weight: Tensor, rows: Rows) -> bool:
    """Only layers of which no row can move."""
    return len(rows) == 0


class CpuTimer(HostTimer):
    """Times the process, not the machine."""

    def seconds(self, case: Case, name: str, first: int, calls: int) -> float:
        """As `Timer` says."""
        started = time.process_time()
        for call in range(first, first + calls):
            case.peers[name](call)
        return (time.process_time() - started) / calls


def case_of(name: str, share: float) -> Case:
    """Training steps of a network, this share of each layer's neurons certified."""
    make, shape, turns = NETWORKS[name]
    model, inputs, labels = make(), torch.randn(shape), torch.randint(10, shape[:1])
    optimizer = NPC(model, lr=1e-3, delta=1 - 1e-6)  # so slow a decay that the share stays
    for layer in optimizer.neurons:
        importance = optimizer.state[layer.parameters[0].parameter]["importance"]
        importance[torch.randperm(layer.neurons)[: round(share * layer.neurons)]] = 10.0

    def step(decides: Callable[..., bool], _: int = 0) -> None:
        forward.skipping_pays = decides
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    step(skipping_pays)
    optimizer._certificates.issue()
    peers = {OURS: skipping_pays, "clock": clock, "whole layers only": whole}
    return Case(f"{name}, {share:.0%}", {peer: partial(step, decides) for peer, decides in peers.items()}, turns=turns)


def main() -> int:
    """Measures all networks, or those whose names contain a word."""
    parser = argparse.ArgumentParser(prog="python -m bench.skipping_rule", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="of the networks those whose names contain this")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    timer = CpuTimer() if arguments.threads == 1 else HostTimer()
    writer = Writer(arguments.out)
    writer.run(" ".join(["python -m bench.skipping_rule", *sys.argv[1:]]), environment.describe())
    for name in NETWORKS:
        for share in SHARES if arguments.only in name else ():
            writer.row(measure("skipping_rule", case_of(name, share), timer))
            write(read(writer.path), arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
