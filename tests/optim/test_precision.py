"""Mixed precision: steps that a scaler skips change nothing, and autocast measures the importance of float32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npc_ext import CPC, EWC, MAS, NPC, SI, SSL, NPCAdamW, PlasticityWrapper

from ..models import normalized_cnn
from ..training import images

OPTIONS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
OPTIMIZERS: dict[str, Any] = {
    "NPC": lambda model: NPC(model, delta=0.5, **OPTIONS),
    "NPCAdamW": lambda model: NPCAdamW(model, lr=0.01, delta=0.5),
    "CPC": lambda model: CPC(model, delta=0.5, **OPTIONS),
    "EWC": lambda model: consolidated(EWC(model, strength=0.1, **OPTIONS)),
    "MAS": lambda model: consolidated(MAS(model, strength=0.1, **OPTIONS)),
    "SI": lambda model: SI(model, strength=0.1, **OPTIONS),
    "SSL": lambda model: consolidated(SSL(model, strength=0.1, sparsity=0.0, **OPTIONS)),
}


def network() -> nn.Sequential:
    return normalized_cnn(6, 12)


def consolidated(optimizer: Any) -> Any:
    optimizer.consolidate([images(99)], progress=False)
    return optimizer


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and all that the optimizer keeps, counters of steps without finite importance included."""
    result = {}
    for name, parameter in model.named_parameters():
        own = {"": parameter, **optimizer.state.get(parameter, {})}
        result.update(
            {f"{name} {key}": value.detach().clone() for key, value in own.items() if isinstance(value, Tensor)}
        )
    for name, layer in optimizer.plasticity().items() if hasattr(optimizer, "plasticity") else ():
        result[f"{name} nonfinite_steps"] = torch.tensor(layer.nonfinite_steps)
    return result


CLEARINGS: dict[str, Any] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "model": lambda model, optimizer: model.zero_grad(),
    "model, in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize(
    ("bad", "clearing"),
    [((0,), "model"), ((3,), "optimizer"), ((3,), "model, in place"), ((2, 3, 4), "model")],
    ids=["first", "middle", "middle, in place", "several"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_that_a_scaler_skips_never_happened(
    name: str, bad: tuple[int, ...], clearing: str, unscaled: bool
) -> None:
    """A run with bad batches ends where a run without them ends, to the last bit, whoever clears the gradients."""
    ends = []
    for seeds in (range(7), [seed for seed in range(7) if seed not in bad]):
        model = network()
        torch.manual_seed(0)
        optimizer = OPTIMIZERS[name](model)
        scaler = torch.amp.GradScaler("cpu")
        for seed in seeds:
            x, y = images(seed)
            CLEARINGS[clearing](model, optimizer)
            before = everything(model, optimizer)
            scaler.scale(F.cross_entropy(model(x), y) * (math.inf if seed in bad else 1.0)).backward()
            if unscaled:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update(2.0**10)
            after = everything(model, optimizer)  # momentum buffers of zeros may have come
            assert all(torch.equal(value, after[name]) for name, value in before.items()) is (seed in bad)
        ends.append(everything(model, optimizer))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_that_are_not_cleared_after_an_overflow_let_nothing_change(name: str) -> None:
    """They stay infinite, so every later step is skipped; cleared at last, they leave nothing behind."""
    ends = []
    for seeds in (range(5), (0, 4)):
        model = network()
        optimizer = OPTIMIZERS[name](model)
        scaler = torch.amp.GradScaler("cpu")
        before = everything(model, optimizer)
        for seed in seeds:
            x, y = images(seed)
            if seed in (0, 4):
                model.zero_grad()
                before = everything(model, optimizer)
            scaler.scale(F.cross_entropy(model(x), y) * (math.inf if seed == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update(2.0**10)
            if seed == 0:
                for parameter in model.parameters():
                    parameter.grad = None
                before = everything(model, optimizer)
            elif seed in (1, 2, 3):
                after = everything(model, optimizer)
                assert all(torch.equal(value, after[key]) for key, value in before.items())
        ends.append(everything(model, optimizer))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.parametrize("name", [*OPTIMIZERS, "wrapper"])
def test_a_scaler_and_lightning_treat_our_optimizers_as_any_other(name: str) -> None:
    """Lightning clips only for optimizers of which this is false, as its `_optimizer_handles_unscaling` asks it."""
    model = network()
    optimizer = (
        PlasticityWrapper(torch.optim.SGD(model.parameters()), model) if name == "wrapper" else OPTIMIZERS[name](model)
    )
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_measures_what_float32_measures(dtype: torch.dtype) -> None:
    """Importance is float32, and off by a few units of the shorter mantissa of activations and gradients."""
    importance = []
    for enabled in (False, True):
        model = network()
        optimizer = NPC(model, lr=0.0, delta=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=enabled)
        for seed in range(5):
            x, y = images(seed)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=enabled):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        importance.append({name: layer.importance for name, layer in optimizer.plasticity().items()})
    for name, want in importance[0].items():
        got = importance[1][name]
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 8 * torch.finfo(dtype).eps * want.norm()
        assert not torch.equal(got, want)
