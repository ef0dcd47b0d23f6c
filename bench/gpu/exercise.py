"""Compares every kernel with the reference on small tensors, also under compute-sanitizer.

`python -m bench.gpu.exercise DEVICE` runs all exercises, and exits with 1 if one failed. It keeps a row of each, as
collect.py does of tests. With `--counters` it launches the four main kernels on large tensors instead, for a profiler.
"""

from __future__ import annotations

import argparse
import copy
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from npc_ext import CPC, EWC, NPC, SI, NPCAdamW, ops, reference
from npc_ext.columns import Layer, Network

from ..cases import OPTIMIZERS, Steps
from ..rows import OURS
from ..timing import check
from . import collect

SHAPES = [(64, 33), (4, 64), (8, 24, 7, 7), (8, 32, 16, 16), (1, 2, 9000), (300, 3)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STOCHASTIC: dict[str, Any] = {"dtype": torch.bfloat16, "stochastic_rounding": True}
WIDE = 5000  # this many neurons need a separate launch to sum their importance
STEPS_OF_MANY = 2  # with a consolidation between them

Exercise = Callable[[str], None]  # takes the device, and raises AssertionError if a kernel is wrong there


def _eq_2(device: str) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            for last in (False, True):
                n, g = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
                if last:
                    n, g = (tensor.movedim(1, -1).contiguous().movedim(-1, 1) for tensor in (n, g))
                want = reference.importance(n.double(), g.double())
                check("importance", ops.importance(n, g), want, 1e-3)
                gradient, importance = ops.relu_backward_importance(n, g)
                check("relu_backward_importance", importance, want, 1e-3)
                check("ReLU's gradient", gradient, torch.ops.aten.threshold_backward(g, n, 0), 0)


def _layer_step(neurons: int, parameters: int = 1, inputs: int = 70) -> Exercise:
    def step(device: str) -> None:
        for dtype in DTYPES:
            weights, gradients = (
                [torch.randn(neurons, inputs).to(device, dtype) for _ in range(parameters)] for _ in range(2)
            )
            n, g = (torch.randn(16, neurons, device=device) for _ in range(2))
            average, steps = torch.rand(neurons, device=device), torch.zeros(1, dtype=torch.int64, device=device)
            placement = [0] * parameters, [1] * parameters
            exact, exact_gradients = (_on_cpu(tensors) for tensors in (weights, gradients))
            exact_n, exact_g, exact_average = _on_cpu([n, g, average])
            exact_layer = Layer(exact_n, exact_g, exact_average, steps.cpu(), *placement)
            ops.layer_step_(Layer(n, g, average, steps, *placement), Network(weights, gradients))
            reference.layer_step_(exact_layer, Network(exact, exact_gradients))
            check("layer_step_", _flat(weights), _flat(exact), 1e-2)
            check("layer_step_'s importance", average.cpu(), exact_average, 1e-4)

    return step


def _on_cpu(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Exact copies, for the reference. Under memcheck, the CPU is faster."""
    return [tensor.to("cpu", torch.float64, copy=True) for tensor in tensors]


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers of some tensors, on the CPU. They are compared together, because a small tensor may not move."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu().double()


def _cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))


def _wide() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, WIDE), nn.ReLU(), nn.Linear(WIDE, 10))


class _Float32(nn.Linear):
    """A linear layer that stays in float32 when its network is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Float32:
        return super()._apply(lambda tensor: fn(tensor).float(), recurse)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def _two_dtypes() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), _Float32(576, 10))


def twins(
    kind: Any, make: Callable[[], nn.Module] = _cnn, dtype: torch.dtype = torch.float32, **options: Any
) -> Exercise:
    """Returns a check: a few steps with the kernels and with the reference move the weights alike."""

    def train(device: str) -> None:
        model = make().to(device, dtype)
        x, y = torch.randn(8, 3, 8, 8, device=device, dtype=dtype), torch.randint(10, (8,), device=device)
        before, twins = _flat(model.parameters()), [model, copy.deepcopy(model)]
        optimizers = [kind(twins[0], **options), kind(twins[1], **options, backend="reference")]
        for step in range(3):
            for network, optimizer in zip(twins, optimizers, strict=True):
                if step == 1 and hasattr(optimizer, "consolidate"):
                    optimizer.consolidate(*([[(x, y)]] if kind is EWC else []))
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(x), y).backward()
                optimizer.step()
        got, want = (_flat(network.parameters()) - before for network in twins)
        check(kind.__name__, got, want, 1e-2 if dtype == torch.float32 else 3e-2)

    return train


def _many_layers(kind: Any, layers: int, **options: Any) -> Exercise:
    """Returns a check: steps with random gradients move the weights of many layers as the reference does on the CPU.

    Nothing is run forward or backward, which would take most of the time under memcheck.
    """

    def train(device: str) -> None:
        twin = nn.Sequential(*(nn.Linear(5, 5) for _ in range(layers)))
        model = copy.deepcopy(twin).to(device)
        before = _flat(twin.parameters())
        optimizers = [kind(model, **options), kind(twin, **options, backend="reference")]
        for step in range(STEPS_OF_MANY):
            for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                theirs.grad = torch.randn_like(theirs)
                ours.grad = theirs.grad.to(device)
            measured = torch.rand(5)
            for optimizer, importance in zip(optimizers, (measured.to(device), measured), strict=True):
                if step == 1 and hasattr(optimizer, "consolidate"):
                    optimizer.consolidate()
                for layer in getattr(optimizer, "neurons", ()):
                    layer.sink.grad = importance
                optimizer.step()
        check(kind.__name__, _flat(model.parameters()) - before, _flat(twin.parameters()) - before, 1e-2)

    return train


# Under memcheck, time may run out. So what takes long comes last, and at the very end the exercises whose cooperative
# launches have the most blocks: instrumented kernels may need more room than the GPU has, and then it refuses them
# (error 720).
EXERCISES: dict[str, Exercise] = {
    "importance, and ReLU's backward pass with it": _eq_2,
    "layer_step_": _layer_step(33),
    "NPC": twins(NPC, momentum=0.9),
    "NPC, float16": twins(NPC, dtype=torch.float16),
    "NPC, float16, momentum": twins(NPC, dtype=torch.float16, momentum=0.9),
    "NPC, bfloat16": twins(NPC, dtype=torch.bfloat16),
    "NPC, bfloat16, momentum": twins(NPC, dtype=torch.bfloat16, momentum=0.9),
    "NPC, bfloat16 rounded stochastically": twins(NPC, lr=1e-2, **STOCHASTIC),
    "NPC, bfloat16 rounded stochastically, momentum": twins(NPC, lr=1e-2, momentum=0.9, **STOCHASTIC),
    "NPC, bfloat16 and float32": twins(NPC, _two_dtypes, dtype=torch.bfloat16),
    "NPCAdamW": twins(NPCAdamW, lr=1e-4),
    "NPCAdamW, float16": twins(NPCAdamW, dtype=torch.float16, lr=1e-3),
    "NPCAdamW, bfloat16": twins(NPCAdamW, dtype=torch.bfloat16, lr=1e-3),
    "NPCAdamW, bfloat16 rounded stochastically": twins(NPCAdamW, lr=1e-3, **STOCHASTIC),
    "CPC": twins(CPC, lr=1e-2),
    "EWC": twins(EWC, lr=1e-3, strength=0.1),
    "EWC, bfloat16": twins(EWC, dtype=torch.bfloat16, lr=0.05, strength=0.1),
    "EWC, explicit anchors": twins(EWC, lr=1e-3, strength=0.1, implicit=False),
    "SI": twins(SI, lr=1e-3, strength=0.1),
    "SI, float16, momentum": twins(SI, dtype=torch.float16, momentum=0.9, lr=1e-2, strength=0.1),
    "NPC, a wide layer": twins(NPC, _wide),
    # "Many" is more than fit the arguments of one launch.
    "layer_step_, many parameters": _layer_step(33, parameters=120, inputs=3),
    "NPC, many layers": _many_layers(NPC, 75, momentum=0.9),
    "NPCAdamW, many layers": _many_layers(NPCAdamW, 65),
    "SI, many layers": _many_layers(SI, 130, strength=0.1),
    "CPC, many layers": _many_layers(CPC, 115),
    "layer_step_, a wide layer": _layer_step(WIDE),
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


def main() -> int:
    """Runs on the given device. The exit status is 1 if an exercise failed."""
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
        return 0
    torch.zeros(1, device=device)  # a device that refuses this has no kernel to blame
    failed = [name for name, exercise in EXERCISES.items() if not _agrees(name, exercise, device)]
    if failed:
        print(f"{len(failed)} of {len(EXERCISES)} fail: {'; '.join(failed)}", flush=True)
    return int(bool(failed))


def _agrees(name: str, exercise: Exercise, device: str) -> bool:
    """Runs one exercise, and keeps a row of the outcome."""
    facts: dict[str, Any] = {}
    try:
        exercise(device)
    except Exception as error:  # the others run all the same; after an error of the device they fail at once
        traceback.print_exc()
        facts["error"] = f"{type(error).__name__}: {error}"
    agrees = not facts
    print(f"{name}: {facts.get('error', 'agrees with the reference')}", flush=True)
    collect.keep(name, **{"agrees with the reference": agrees}, **facts)
    return agrees


if __name__ == "__main__":
    sys.exit(main())
