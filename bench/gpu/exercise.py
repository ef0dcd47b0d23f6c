"""Every kernel once, on small tensors, against the float64 reference: what compute-sanitizer looks at."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import Tensor, nn

from npc_ext import NPC, NPCAdamW, ops, reference

from .device import check


def _train_twins(kind: Any, options: dict[str, Any], model: nn.Module, x: Tensor, y: Tensor) -> None:
    """A few steps by the kernels and by the reference come to about the same weights."""
    twins = [copy.deepcopy(model) for _ in range(2)]
    optimizers = [kind(twins[0], **options), kind(twins[1], **options, backend="reference")]
    for _ in range(3):
        for network, optimizer in zip(twins, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
    check(kind.__name__, next(twins[0].parameters()), next(twins[1].parameters()).double(), 1e-2)


def main() -> None:
    """Runs on the device named."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.exercise", description=__doc__)
    parser.add_argument("device", choices=["cuda", "cpu"])
    device = parser.parse_args().device
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in ((64, 33), (4, 64), (8, 24, 7, 7), (8, 32, 16, 16), (1, 2, 9000), (300, 3)):
            for last in (False, True):
                n, g = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
                if last:
                    n, g = (tensor.movedim(1, -1).contiguous().movedim(-1, 1) for tensor in (n, g))
                want = reference.importance(n.double(), g.double())
                check("importance", ops.importance(n, g), want)
                check("relu_backward_importance", ops.relu_backward_importance(n, g)[1], want)
        weight, gradient = (torch.randn(33, 70, device=device).to(dtype) for _ in range(2))
        n, g = torch.randn(16, 33, device=device), torch.randn(16, 33, device=device)
        exact = [weight.double()]
        average, skipped = torch.rand(33, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        exact_average = average.double()
        ops.layer_step_(n, g, [weight], [gradient], [], average, skipped, [0], [1])
        reference.layer_step_(n.double(), g.double(), exact, [gradient.double()], [], exact_average, skipped, [0], [1])
        check("layer_step_", weight, exact[0], 1e-2)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)).to(device)
    x, y = torch.randn(8, 3, 8, 8, device=device), torch.randint(10, (8,), device=device)
    _train_twins(NPC, {"momentum": 0.9}, model, x, y)
    _train_twins(NPCAdamW, {"lr": 1e-4}, model, x, y)
    halves = (copy.deepcopy(model).to(torch.bfloat16), x.to(torch.bfloat16), y)
    _train_twins(NPC, {"lr": 1e-3, "stochastic_rounding": True}, *halves)
    _train_twins(NPCAdamW, {"lr": 1e-4, "stochastic_rounding": True}, *halves)
    print("every kernel agrees with the reference")


if __name__ == "__main__":
    main()
