"""Models that torch.compile replays as CUDA graphs. They take long to compile, so these tests run last on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._triton import has_triton

from npc_ext import NPC

from ..tolerances import TRAJECTORY
from .test_gpu import batch, model, scratch

pytestmark = pytest.mark.gpu

COMPILED: list[tuple[dict[str, Any], int]] = [
    ({"mode": "reduce-overhead"}, 2),
    ({"backend": "cudagraphs"}, 1),
    ({"backend": "cudagraphs"}, 2),
]


@pytest.mark.parametrize(("options", "micro_batches"), COMPILED, ids=str)
def test_a_model_compiled_into_cuda_graphs_trains_as_the_eager_one(options: dict[str, Any], micro_batches: int) -> None:
    """Accumulated gradients need memory outside of the graphs, as torch documents: graphs overwrite theirs."""
    if "mode" in options and not has_triton():
        pytest.skip("Inductor needs Triton")
    torch._dynamo.reset()
    ours, twin = model(), model()
    optimizer, plain = NPC(ours, lr=0.05, delta=0.9), NPC(twin, lr=0.05, delta=0.9)
    compiled = torch.compile(ours, **options)
    kept = []
    for step in range(12):
        data = [batch() for _ in range(micro_batches)]
        for each in (optimizer, plain):
            each.zero_grad(set_to_none=micro_batches == 1)
        if micro_batches > 1:
            for parameter in ours.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for layer in optimizer.neurons:
                layer.sink.grad = torch.full_like(layer.sink, -0.0)
        for x, y in data:
            torch.compiler.cudagraph_mark_step_begin()
            F.cross_entropy(compiled(x), y).backward()
            F.cross_entropy(twin(x), y).backward()
        optimizer.step()
        plain.step()
        kept.append(scratch())
        for got, want in zip(ours.parameters(), twin.parameters(), strict=True):
            assert (got - want).norm() <= TRAJECTORY * want.norm(), step
    assert kept[-1] == kept[5], "once captured, nothing is allocated"
    for name, want in plain.plasticity().items():
        importance = optimizer.plasticity()[name].importance
        assert want.importance.any()
        assert (importance - want.importance).norm() <= TRAJECTORY * want.importance.norm()
