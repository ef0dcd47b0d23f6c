"""Stochastic rounding of bfloat16 weights: one of the two neighbours, right on average, the same in every run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npc_ext import NPC, NPCAdamW, ops, reference

from .arguments import call, copied, network, no_layers, sgd

CASES: list[tuple[str, dict[str, Any]]] = [
    ("update_", {}),
    ("update_", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "channels_last": True}),
    ("update_", {"momentum": 0.9}),
    ("adam_update_", {"weight_decay": 0.01, "channels_last": True}),
]


@pytest.mark.parametrize(("operation", "options"), CASES, ids=str)
def test_kernels_round_as_the_reference_does(operation: str, options: dict[str, Any], device: str) -> None:
    """The same bits, unless float32 results differ in the last place and a random number falls between them."""
    arguments = network(operation, torch.bfloat16, **options, stochastic_rounding=True, device=device)
    want, nearest = copied(arguments), copied(arguments) | {"seeds": []}
    call(getattr(ops, operation), arguments)
    call(getattr(reference, operation), want)
    call(getattr(reference, operation), nearest)
    pairs = list(zip(arguments["parameters"], want["parameters"], strict=True))
    same = torch.cat([(got == exact).flatten() for got, exact in pairs])
    assert same.double().mean() > 0.999
    differ = torch.cat(
        [(got != near).flatten() for got, near in zip(arguments["parameters"], nearest["parameters"], strict=True)]
    )
    assert 0.05 < differ.double().mean() < 0.5
    assert all(int(count) == int(before) for count, before in zip(arguments["steps"], want["steps"], strict=True))


def one_update(value: Tensor, gradient: Tensor, steps: Tensor, seed: int) -> None:
    arguments = {"parameters": [value], "gradients": [gradient], "steps": [steps], "seeds": [seed]}
    call(ops.update_, {**arguments, **no_layers(1, str(value.device)), **sgd(1, 1.0)})


@pytest.mark.parametrize("share", [1 / 128, 0.25, 0.5, 0.99])
def test_values_are_right_on_average_and_never_beyond_a_neighbour(share: float, device: str) -> None:
    """From 1, of which the next bfloat16 below is 1 / 256 away: the mean of n coins is off by less than 5 sigma."""
    count = 40_000
    value = torch.ones(count, dtype=torch.bfloat16, device=device)
    one_update(value, torch.full_like(value, share / 256), torch.zeros((), device=device), seed=3)
    assert set(value.tolist()) == {1.0, 1 - 1 / 256}
    moved = (value != 1).double()
    sigma = (share * (1 - share) / count) ** 0.5
    assert abs(float(moved.mean()) - share) < 5 * sigma
    neighbours = float((moved[1:] * moved[:-1]).mean())  # no element knows of the next one's
    assert abs(neighbours - share**2) < 5 * (share**2 * (1 - share**2) * 3 / count) ** 0.5


def test_small_steps_add_up(device: str) -> None:
    """A hundred steps of a hundredth of the distance to the next bfloat16: lost when rounded to the nearest."""
    steps = torch.zeros((), device=device)
    value = torch.ones(1000, dtype=torch.bfloat16, device=device)
    for _ in range(100):
        one_update(value, torch.full_like(value, 0.01 / 256), steps, seed=0)
    assert steps == 100
    assert abs(float((1 - value.float()).mean()) * 256 - 1) < 5 * 1000**-0.5


def test_random_bits_depend_on_seed_step_and_element(device: str) -> None:
    def rounded(seed: int, steps: int) -> Tensor:
        value = torch.ones(1000, dtype=torch.bfloat16, device=device)
        one_update(value, torch.full_like(value, 0.5 / 256), torch.tensor(float(steps), device=device), seed)
        return value

    first = rounded(0, 0)
    assert torch.equal(first, rounded(0, 0))
    for other in (rounded(1, 0), rounded(0, 1), rounded(1, 1)):
        assert 0.4 < float((first != other).double().mean()) < 0.6


def test_values_that_are_not_finite_stay_so(device: str) -> None:
    value = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.0], dtype=torch.bfloat16, device=device)
    one_update(value, torch.zeros_like(value), torch.zeros((), device=device), seed=0)
    assert value[:2].tolist() == [torch.inf, -torch.inf] and bool(value[2].isnan()) and value[3] == 3.0


@pytest.mark.parametrize("kind", [NPC, NPCAdamW])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_bfloat16_model_learns_at_rates_that_the_nearest_value_loses(kind: Any, backend: str) -> None:
    def train(stochastic_rounding: bool) -> tuple[float, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4)).to(torch.bfloat16)
        options = {"lr": 1e-2 if kind is NPC else 1e-4, "delta": 0.9999, "backend": backend}
        optimizer = kind(model, stochastic_rounding=stochastic_rounding, **options)
        x, y = torch.randn(64, 20).to(torch.bfloat16), torch.randint(4, (64,))
        for _ in range(150):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
            optimizer.step()
        return loss.item(), optimizer

    (nearest, plain), (at_random, optimizer) = train(False), train(True)
    assert at_random < nearest - 0.02
    importances = [state["importance"] for state in optimizer.state.values() if "importance" in state]
    assert all(average.dtype == torch.float32 for average in importances)
    assert kind is NPCAdamW or not any("step" in state for state in plain.state.values())


def test_a_model_without_bfloat16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stochastic_rounding is on, but the parameters are torch\.float32"):
        NPC(nn.Sequential(nn.Linear(3, 3)), stochastic_rounding=True)
