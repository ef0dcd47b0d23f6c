"""Compares every kernel with the reference on small tensors, also under compute-sanitizer.

`python -m bench.gpu.exercise DEVICE` writes a row for each group of kernels to the folder that NPC_BENCH_OUT names.
With `--counters` it launches the four main kernels on large tensors instead, for a profiler.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npc_ext import CPC, EWC, NPC, SI, NPCAdamW, ops, reference
from npc_ext.columns import Layer, Network

from ..cases import OPTIMIZERS, Steps
from ..rows import OURS, Row, Writer
from ..timing import check
from .collect import FOLDER

SHAPES = [(64, 33), (4, 64), (8, 24, 7, 7), (8, 32, 16, 16), (1, 2, 9000), (300, 3)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STOCHASTIC: dict[str, Any] = {"dtype": torch.bfloat16, "stochastic_rounding": True}
WIDE = 5000  # this many neurons need a separate launch to sum their importance


def _eq_2(device: str) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            for last in (False, True):
                n, g = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
                if last:
                    n, g = (tensor.movedim(1, -1).contiguous().movedim(-1, 1) for tensor in (n, g))
                want = reference.importance(n.double(), g.double())
                check("importance", ops.importance(n, g), want, 1e-3)
                check("relu_backward_importance", ops.relu_backward_importance(n, g)[1], want, 1e-3)


def _layer_step(device: str) -> None:
    for dtype in DTYPES:
        for neurons in (33, WIDE):
            weight, gradient = (torch.randn(neurons, 70, device=device).to(dtype) for _ in range(2))
            n, g = torch.randn(16, neurons, device=device), torch.randn(16, neurons, device=device)
            average, steps = torch.rand(neurons, device=device), torch.zeros(1, dtype=torch.int64, device=device)
            layer = Layer(n, g, average, steps, [0], [1])
            exact, exact_average = weight.double(), average.double()
            exact_layer = Layer(n.double(), g.double(), exact_average, steps.clone(), [0], [1])
            ops.layer_step_(layer, Network([weight], [gradient]))
            reference.layer_step_(exact_layer, Network([exact], [gradient.double()]))
            check("layer_step_", weight, exact, 1e-2)
            check("layer_step_'s importance", average, exact_average, 1e-4)


def _cnn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))


def _many_layers() -> nn.Module:
    """A model with more parameters than fit the arguments of one launch."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 9), *(nn.Linear(9, 9) for _ in range(30)), nn.Linear(9, 10))
    for parameter in model.parameters():  # so that gradients reach the first layer
        nn.init.orthogonal_(parameter) if parameter.ndim > 1 else nn.init.zeros_(parameter)
    return model


def _wide() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, WIDE), nn.ReLU(), nn.Linear(WIDE, 10))


class _Float32(nn.Linear):
    """A linear layer that stays in float32 when its network is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Float32:
        return super()._apply(lambda tensor: fn(tensor).float(), recurse)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def _two_dtypes() -> nn.Module:
    return nn.Sequential(*list(_cnn())[:-1], _Float32(576, 10))


def _twins(
    kind: Any, make: Callable[[], nn.Module] = _cnn, dtype: torch.dtype = torch.float32, **options: Any
) -> Callable[[str], None]:
    """Returns a check: a few steps with the kernels and with the reference move the weights alike."""

    def train(device: str) -> None:
        model = make().to(device, dtype)
        x, y = torch.randn(8, 3, 8, 8, device=device, dtype=dtype), torch.randint(10, (8,), device=device)
        before, twins = copy.deepcopy(model), [model, copy.deepcopy(model)]
        optimizers = [kind(twins[0], **options), kind(twins[1], **options, backend="reference")]
        for step in range(3):
            for network, optimizer in zip(twins, optimizers, strict=True):
                if step == 1 and hasattr(optimizer, "consolidate"):
                    optimizer.consolidate(*([[(x, y)]] if kind is EWC else []))
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(x), y).backward()
                optimizer.step()
        for got, want, start in zip(*(network.parameters() for network in (*twins, before)), strict=True):
            check(kind.__name__, got.double() - start, want.double() - start, 1e-2 if dtype == torch.float32 else 0.2)

    return train


EXERCISES: dict[str, Callable[[str], None]] = {
    "importance, and ReLU's backward pass with it": _eq_2,
    "layer_step_, narrow and wide": _layer_step,
    "NPC": _twins(NPC, momentum=0.9),
    "NPC, many layers": _twins(NPC, _many_layers),
    "NPC, a wide layer": _twins(NPC, _wide),
    "NPC, float16": _twins(NPC, dtype=torch.float16),
    "NPC, float16, momentum": _twins(NPC, dtype=torch.float16, momentum=0.9),
    "NPC, bfloat16": _twins(NPC, dtype=torch.bfloat16),
    "NPC, bfloat16, momentum": _twins(NPC, dtype=torch.bfloat16, momentum=0.9),
    "NPC, bfloat16 rounded stochastically": _twins(NPC, lr=1e-3, **STOCHASTIC),
    "NPC, bfloat16 rounded stochastically, momentum": _twins(NPC, lr=1e-3, momentum=0.9, **STOCHASTIC),
    "NPC, bfloat16 and float32": _twins(NPC, _two_dtypes, dtype=torch.bfloat16),
    "NPCAdamW": _twins(NPCAdamW, lr=1e-4),
    "NPCAdamW, many layers": _twins(NPCAdamW, _many_layers, lr=1e-4),
    "NPCAdamW, float16": _twins(NPCAdamW, dtype=torch.float16, lr=1e-4),
    "NPCAdamW, bfloat16": _twins(NPCAdamW, dtype=torch.bfloat16, lr=1e-4),
    "NPCAdamW, bfloat16 rounded stochastically": _twins(NPCAdamW, lr=1e-4, **STOCHASTIC),
    "CPC": _twins(CPC, lr=1e-2),
    "CPC, many layers": _twins(CPC, _many_layers, lr=1e-2),
    "EWC": _twins(EWC, lr=1e-3, strength=0.1),
    "EWC, bfloat16": _twins(EWC, dtype=torch.bfloat16, lr=1e-3, strength=0.1),
    "EWC, explicit anchors": _twins(EWC, lr=1e-3, strength=0.1, implicit=False),
    "SI": _twins(SI, lr=1e-3, strength=0.1),
    "SI, float16, momentum": _twins(SI, dtype=torch.float16, momentum=0.9, lr=1e-3, strength=0.1),
}


def _counted(device: str) -> Iterator[Callable[[], object]]:
    """Launches of the four main kernels on more data than the caches hold."""
    shape = (64, 128, 32, 32) if device == "cuda" else (4, 8, 4, 4)
    n, g = (torch.randn(shape, device=device) for _ in range(2))
    yield lambda: ops.importance(n, g)
    yield lambda: ops.relu_backward_importance(n, g)
    for kind in ("SGD", "SGD, momentum"):
        steps = Steps(3 * 10**7 if device == "cuda" else 10**3, {OURS: OPTIMIZERS[kind][0]}, layers=8, device=device)
        yield lambda steps=steps: steps.measured_peers()[OURS](0)  # type: ignore[misc]


def main() -> None:
    """Runs on the given device."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.exercise", description=__doc__)
    parser.add_argument("device", choices=["cuda", "cpu"])
    parser.add_argument("--counters", action="store_true", help="the four main kernels only, large")
    arguments = parser.parse_args()
    device: str = arguments.device
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    if arguments.counters:
        for function in _counted(device):
            function()
        return
    for name, exercise in EXERCISES.items():
        exercise(device)
        print(f"{name}: agrees with the reference", flush=True)
        if folder := os.environ.get(FOLDER):
            Writer(Path(folder)).row(Row("sanitizer", name, facts={"agrees with the reference": True}))


if __name__ == "__main__":
    main()
