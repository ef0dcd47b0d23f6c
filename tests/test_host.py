"""What a step costs the host, counted: launches, collective calls and allocations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from npc_ext import NPC, _launch, _native

from .models import paper_cnn

pytestmark = pytest.mark.skipif(_native.status().module is None, reason="the compiled kernels are missing")


def trained(**options: Any) -> tuple[nn.Module, NPC]:
    model = paper_cnn()
    optimizer = NPC(model, delta=0.999, **options)
    for _ in range(40):  # past the first certificates
        step(model, optimizer)
    return model, optimizer


def backward(model: nn.Module) -> None:
    torch.manual_seed(0)
    F.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.tensor([0, 1, 2, 3])).backward()


def step(model: nn.Module, optimizer: NPC) -> None:
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def test_a_training_step_is_a_launch_for_each_layer_and_one_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(momentum=0.9)
    launched, usual = list[str](), _launch._launch

    def counted(kernel: str, *arguments: Any) -> None:
        launched.append(kernel)
        usual(kernel, *arguments)

    def collective(*arguments: Any, **options: Any) -> None:
        raise AssertionError("one process calls no other")

    monkeypatch.setattr(_launch, "_launch", counted)
    monkeypatch.setattr(torch.distributed, "all_reduce", collective)
    step(model, optimizer)
    assert launched == ["importance"] * len(optimizer.neurons) + ["update"]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_of_the_optimizer_allocates_nothing(momentum: float) -> None:
    model, optimizer = trained(momentum=momentum)
    optimizer.zero_grad()
    backward(model)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
        probe = torch.empty(1000)
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert changes == [probe.untyped_storage().nbytes()]
