"""The host's cost of a step: counts of launches, collective calls and allocations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from npc_ext import NPC
from npc_ext.kernels import launch, native

from ..models import paper_cnn

pytestmark = pytest.mark.skipif(native.status().module is None, reason="the compiled kernels are missing")


def trained(**options: Any) -> tuple[nn.Module, NPC]:
    model = paper_cnn()
    optimizer = NPC(model, delta=0.999, **options)
    for _ in range(40):  # until after the first certificates
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
    launched, usual = list[str](), launch._launch

    def counted(kernel: str, *arguments: Any) -> None:
        launched.append(kernel)
        usual(kernel, *arguments)

    def collective(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a single process makes no collective call")

    monkeypatch.setattr(launch, "_launch", counted)
    monkeypatch.setattr(torch.distributed, "all_reduce", collective)
    step(model, optimizer)
    assert launched == ["importance"] * len(optimizer.neurons) + ["update"]


def allocations(function: Callable[[], object]) -> list[int]:
    """The bytes of each allocation. Memory that is freed, for example by the garbage collector, does not count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
        probe = torch.empty(1000)
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert changes.pop() == probe.untyped_storage().nbytes()
    return [change for change in changes if change > 0]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("frozen", [False, True])
def test_steps_of_the_optimizer_allocate_nothing_until_certificates_are_issued(momentum: float, frozen: bool) -> None:
    model, optimizer = trained(momentum=momentum)
    if frozen:
        for layer in optimizer.neurons:
            optimizer.state[layer.parameters[0].parameter]["importance"][: layer.neurons // 2] = 3.0
    clock, issued = optimizer._certificates.clock, 0
    neurons = sum(layer.neurons for layer in optimizer.neurons)
    for _ in range(2 * clock.between):
        optimizer.zero_grad()
        backward(model)
        allocated = allocations(optimizer.step)
        if clock.issues():  # masks and indices of neurons
            issued += 1
            assert sum(allocated) <= 32 * neurons
        else:
            assert allocated == []
    assert issued == 2
