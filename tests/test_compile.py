"""Compiled models are measured and trained as others are, however model and optimizer came together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import npc_ext
from npc_ext import NPC, ImportanceWarning

from .tolerances import TRAJECTORY

Made = tuple[Any, nn.Module, NPC]
BACKEND = "aot_eager"  # follows taps through autograd as the default does, and takes no C++ compiler


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(128, 16), npc_ext.nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 4),
    )  # fmt: skip


def optimizer_of(model: Any) -> NPC:
    return NPC(model, delta=0.9)


def optimizer_first() -> Made:
    model = network()
    optimizer = optimizer_of(model)
    return torch.compile(model, fullgraph=True, backend=BACKEND), model, optimizer


def compiled_first() -> Made:
    model = network()
    return torch.compile(model, fullgraph=True, backend=BACKEND), model, optimizer_of(model)


def of_what_compile_returned() -> Made:
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    return compiled, model, optimizer_of(compiled)


def in_place() -> Made:
    model = network()
    optimizer = optimizer_of(model)
    model.compile(fullgraph=True, backend=BACKEND)
    return model, model, optimizer


def part_by_part() -> Made:
    model = network()
    optimizer = optimizer_of(model)
    model[0].compile(backend=BACKEND)
    model[5].compile(backend=BACKEND)
    return model, model, optimizer


def after_it_ran() -> Made:
    """Taps come into a model whose compiled code knows nothing of them."""
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    loss(compiled, 0).backward()
    model.load_state_dict(network().state_dict())
    return compiled, model, optimizer_of(model)


def loss(model: Any, seed: int, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(size, 1, 8, 8, generator=generator), torch.randint(4, (size,), generator=generator)
    return F.cross_entropy(model(x), y)


def step(model: Any, optimizer: NPC, seed: int, size: int = 6) -> None:
    optimizer.zero_grad()
    loss(model, seed, size).backward()
    optimizer.step()


def assert_alike(optimizer: NPC, model: nn.Module, plain: NPC, twin: nn.Module) -> None:
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p - q).norm() <= TRAJECTORY * q.norm()
    for name, want in plain.plasticity().items():
        got = optimizer.plasticity()[name].importance
        assert want.importance.any() and (got - want.importance).norm() <= TRAJECTORY * want.importance.norm()


@pytest.mark.parametrize(
    "make", [optimizer_first, compiled_first, of_what_compile_returned, in_place, part_by_part, after_it_ran]
)
def test_it_does_not_matter_how_model_and_optimizer_come_together(make: Callable[[], Made]) -> None:
    """And nothing is compiled again from step to step, as rates change and neurons freeze."""
    twin = network()
    plain = optimizer_of(twin)
    compiled, model, optimizer = make()
    assert [layer.name for layer in optimizer.neurons] == ["0", "5", "8"]
    for seed in range(40):
        step(twin, plain, seed)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            step(compiled, optimizer, seed)
    assert any(layer.frozen > 0 for layer in optimizer.plasticity().values())
    assert_alike(optimizer, model, plain, twin)


@pytest.mark.parametrize("ran_before", [False, True])
def test_micro_batches_of_a_compiled_model_add_up(ran_before: bool) -> None:
    twin = network()
    plain = optimizer_of(twin)
    compiled, model, optimizer = compiled_first()
    for seed in range(0, 6, 2):
        for one, own in ((twin, plain), (model if ran_before and seed == 0 else compiled, optimizer)):
            own.zero_grad()
            loss(one, seed).backward()
            loss(one, seed + 1).backward()
            own.step()
    assert_alike(optimizer, model, plain, twin)


@pytest.mark.parametrize("ran_before", [False, True])
def test_importance_of_compiled_code_does_not_outlive_gradients_that_the_model_clears(ran_before: bool) -> None:
    """It is not noticed in time to measure the next loss alone, but in time to leave both out, and said."""
    compiled, model, optimizer = compiled_first()
    step(model if ran_before else compiled, optimizer, 0)
    before = {name: layer.importance for name, layer in optimizer.plasticity().items()}
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.zero_grad()
    loss(compiled, 1).backward()
    model.zero_grad()
    loss(compiled, 2).backward()
    with pytest.warns(ImportanceWarning, match=r"call optimizer\.zero_grad\(\) instead"):
        optimizer.step()
    for name, layer in optimizer.plasticity().items():
        assert torch.equal(layer.importance, before[name])
    assert not all(torch.equal(p, q) for p, q in zip(weights, model.parameters(), strict=True))


def test_evaluation_and_other_batch_sizes_compile_once_each() -> None:
    twin = network()
    plain = optimizer_of(twin)
    compiled, model, optimizer = optimizer_first()
    for seed in range(12):
        with torch._dynamo.config.patch(error_on_recompile=seed > 3):
            size = 6 if seed % 2 else 4
            step(compiled, optimizer, seed, size)
            step(twin, plain, seed, size)
            for one in (compiled, twin):
                one.eval()
                with torch.no_grad():
                    loss(one, 100 + seed, size)
                one.train()
    assert_alike(optimizer, model, plain, twin)


def test_a_compiled_model_that_lost_its_taps_is_refused() -> None:
    compiled, model, optimizer = optimizer_first()
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    model[6]._taps.clear()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match="no importance was measured"):
        step(compiled, optimizer, 0)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
