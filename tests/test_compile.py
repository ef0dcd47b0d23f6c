"""Compiled models are measured and trained as others are, however model and optimizer came together."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import convert_frame
from torch.nn import functional as F

import npc_ext
from npc_ext import CPC, EWC, NPC, NPCAdamW, PlasticityWrapper

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


@pytest.mark.parametrize("batch_first", [True, False])
def test_compiled_attention_is_measured_without_graph_breaks(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
    twin = copy.deepcopy(model)
    plain, optimizer = optimizer_of(twin), optimizer_of(model)
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        target, memory = torch.randn(4, 3, 8, generator=generator), torch.randn(4, 3, 8, generator=generator)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            for one, own in ((compiled, optimizer), (twin, plain)):
                own.zero_grad()
                one(target, memory).sin().square().mean().backward()
                own.step()
    assert {"self_attn.in_proj", "multihead_attn.in_proj"} < optimizer.plasticity().keys()
    assert_alike(optimizer, model, plain, twin)


def steps_of(optimizer: Any, model: nn.Module, count: int) -> None:
    """Whole steps, of which the compiler sees all."""

    def whole() -> None:
        optimizer.zero_grad()
        loss(model, 0).backward()
        optimizer.step()

    compiled = torch.compile(whole, backend=BACKEND)
    for _ in range(count):
        compiled()


@pytest.mark.parametrize(
    ("kind", "scheduled"),
    [(NPC, False), (NPC, True), (NPCAdamW, True), (CPC, False), (EWC, True), (PlasticityWrapper, True)],
)
def test_the_compiler_keeps_out_of_steps(kind: Any, scheduled: bool) -> None:
    """It traces callers up to `step`, and nothing that a step does; hooks and schedulers count each step once."""

    def make(model: nn.Module) -> Any:
        if kind is PlasticityWrapper:
            return PlasticityWrapper(torch.optim.SGD(model.parameters(), lr=0.1), model)
        return kind(model, lr=0.01)

    model, twin = network(), network()
    optimizer, plain = make(model), make(twin)
    called = list[int]()
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100) if scheduled else None
    code = list[str]()
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        compile_one = convert_frame._compile
        patch.setattr(convert_frame, "_compile", lambda c, *a, **k: code.append(c.co_name) or compile_one(c, *a, **k))  # type: ignore[func-returns-value]
        steps_of(optimizer, model, 3)
        if scheduler is not None:
            scheduler.step()  # warns if no step was counted
    assert not [one.message for one in caught if "Dynamo" in str(one.message) or "lr_scheduler" in str(one.message)]
    for _ in range(3):
        plain.zero_grad()
        loss(twin, 0).backward()
        plain.step()
    assert len(called) == 3
    assert not {"_prepare", "_signature", "_make_plans", "_launch", "_take_steps"} & set(code)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p - q).norm() <= TRAJECTORY * q.norm()
