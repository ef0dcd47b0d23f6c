"""Importance belongs to gradients: what clears a layer's gradients also clears what was measured with them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from npc_ext import NPC

from ..methods import ALL_OPTIONS, wrapped_sgd
from ..models import paper_cnn
from ..training import batches, everything, importances, same, set_importance, train, weights


def backward(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], reduction: str = "mean") -> None:
    """Adds the gradients of each batch."""
    for x, y in data:
        F.cross_entropy(model(x), y, reduction=reduction).backward()


def measured(optimizer: Any) -> dict[str, Tensor]:
    """What was measured since importance was last cleared."""
    return {layer.name: layer.sink.grad.clone() for layer in optimizer.neurons}


def by_hand(model: nn.Module, optimizer: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def in_place_by_hand(model: nn.Module, optimizer: Any) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


CLEARINGS: dict[str, Any] = {
    "the optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "the optimizer, in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "the model": lambda model, optimizer: model.zero_grad(),
    "the model, in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "the base optimizer": lambda model, optimizer: optimizer.optimizer.zero_grad(),
    "by hand": by_hand,
    "by hand, in place": in_place_by_hand,
}


def gan(model: nn.Module, clear: Any, x: Tensor, y: Tensor) -> None:
    """The gradients of a generator's loss, which reach the discriminator, are thrown away."""
    model(x).sum().backward()
    clear()
    F.cross_entropy(model(x.flip(3)), y).backward()


def late(model: nn.Module, clear: Any, x: Tensor, y: Tensor) -> None:
    """They are thrown away between the forward and the backward pass of the next loss."""
    model(x).sum().backward()
    loss = F.cross_entropy(model(x.flip(3)), y)
    clear()
    loss.backward()


def sam(model: nn.Module, clear: Any, x: Tensor, y: Tensor) -> None:
    """The gradients of the first pass only tell where the second pass evaluates the loss."""
    F.cross_entropy(model(x), y).backward()
    moves = [0.01 * torch.sign(parameter.grad) for parameter in model.parameters()]
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, move in zip(model.parameters(), moves, strict=True):
                parameter.add_(move, alpha=sign)
        if sign == 1:
            clear()
            F.cross_entropy(model(x), y).backward()


def repeated(model: nn.Module, clear: Any, x: Tensor, y: Tensor) -> None:
    """Two backward passes go through one graph."""
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    clear()
    loss.backward()


def in_turn(gradients: Any, model: nn.Module, optimizer: Any, clear: Any, data: list[tuple[Tensor, Tensor]]) -> None:
    """Computes gradients, and clears some of them in between, and takes a step, batch by batch."""
    for x, y in data:
        gradients(model, partial(clear, model, optimizer), x, y)
        optimizer.step()
        clear(model, optimizer)


def with_closure(model: nn.Module, optimizer: Any, clear: Any, data: list[tuple[Tensor, Tensor]]) -> None:
    """A closure is evaluated several times a step."""
    for x, y in data:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            clear(model, optimizer)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)


LOOPS = {
    "gan": partial(in_turn, gan),
    "late": partial(in_turn, late),
    "sam": partial(in_turn, sam),
    "repeated": partial(in_turn, repeated),
    "with_closure": with_closure,
}


def frozen_npc(model: nn.Module) -> NPC:
    optimizer = NPC(model, delta=0.999)
    set_importance(optimizer, "conv1", 10.0)
    return optimizer


METHODS: dict[str, Any] = {
    "NPC": partial(NPC, **{**ALL_OPTIONS, "delta": 0.5}),
    "NPC, frozen": frozen_npc,
    "PlasticityWrapper": partial(wrapped_sgd, lr=0.05, delta=0.5),
}


def run(method: str, loop: str, clearing: str, count: int = 4) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = paper_cnn()
    optimizer = METHODS[method](model)
    LOOPS[loop](model, optimizer, CLEARINGS[clearing], batches(count))
    return model, optimizer


@pytest.mark.parametrize("method", ["NPC", "PlasticityWrapper"])
@pytest.mark.parametrize(
    "clearing", ["the optimizer, in place", "the model", "the model, in place", "by hand", "by hand, in place"]
)
@pytest.mark.parametrize("loop", LOOPS)
def test_whatever_clears_gradients_clears_their_importance(loop: str, clearing: str, method: str) -> None:
    got, want = run(method, loop, clearing), run(method, loop, "the optimizer")
    assert same(everything(*got), everything(*want))


def test_the_base_optimizers_zero_grad_clears_importance_like_the_wrappers() -> None:
    got, want = (run("PlasticityWrapper", "gan", clearing) for clearing in ("the base optimizer", "the optimizer"))
    assert same(everything(*got), everything(*want))


def test_gradients_that_were_skipped_are_cleared_in_place_like_others() -> None:
    got, want = (run("NPC, frozen", "gan", clearing, 40) for clearing in ("the model, in place", "the optimizer"))
    assert same(everything(*got), everything(*want))
    for _, optimizer in (got, want):
        assert optimizer.plasticity()["conv1"].gradients_skipped == 1


def test_gradients_skipped_for_a_loss_that_was_thrown_away_do_not_count() -> None:
    """Options may change after it, as they may after the optimizer's zero_grad()."""
    model, data = paper_cnn(), batches(40)
    optimizer = frozen_npc(model)
    train(model, optimizer, data)
    optimizer.zero_grad()
    backward(model, data[:1])
    model.zero_grad()
    optimizer.param_groups[0]["beta"] = 100.0
    before = weights(model.conv1)
    backward(model, data[:1])
    optimizer.step()
    assert not same(model.conv1, before)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_part_of_the_model_clears_the_importance_of_its_layers_only(set_to_none: bool) -> None:
    model, data = paper_cnn(), batches(2)
    optimizer = NPC(model, delta=0.0, lr=0.0)
    backward(model, data[1:])
    second = measured(optimizer)
    optimizer.zero_grad()
    backward(model, data[:1])
    first = measured(optimizer)
    model.conv2.zero_grad(set_to_none)
    backward(model, data[1:])
    for name, importance in measured(optimizer).items():
        torch.testing.assert_close(importance, second[name] if name == "conv2" else first[name] + second[name])


def test_gradient_accumulation_moves_the_average_once() -> None:
    model, (x, y) = paper_cnn(), batches(1)[0]
    twin = copy.deepcopy(model)
    whole, parts = NPC(model, delta=0.5), NPC(twin, delta=0.5)
    backward(model, [(x, y)], "sum")
    backward(twin, [(x[:4], y[:4]), (x[4:], y[4:])], "sum")
    whole.step()
    parts.step()
    torch.testing.assert_close(importances(whole), importances(parts), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("skip_gradients", ["none", "layers"])
def test_micro_batches_keep_what_was_measured_also_if_clipped(clip: bool, skip_gradients: str) -> None:
    """Gradients that were skipped are zero as cleared ones are, but they were not cleared."""
    model, data = paper_cnn(), batches(3)
    optimizer = NPC(model, delta=0.999, lr=0.0, skip_gradients=skip_gradients)
    for name in ("conv1", "conv2"):
        set_importance(optimizer, name, 10.0)
    train(model, optimizer, batches(40))  # until certificates are in force
    if skip_gradients == "layers":
        assert optimizer.plasticity()["conv1"].gradients_skipped == 1
    parts = []
    for batch in data:
        optimizer.zero_grad()
        backward(model, [batch])
        parts.append(measured(optimizer))
    optimizer.zero_grad()
    for batch in data:
        backward(model, [batch])
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    for name, importance in measured(optimizer).items():
        torch.testing.assert_close(importance, sum(part[name] for part in parts))


class Twice(nn.Module):
    """One layer that is called twice, each time under a checkpoint if `reentrant` is set."""

    reentrant: bool | None = None

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.output = nn.Linear(6, 6), nn.Linear(6, 3)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.hidden(x) if self.reentrant is None else checkpoint(self.hidden, x, use_reentrant=self.reentrant)
        return self.output(x)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_layer_that_is_called_twice_keeps_both_calls_and_drops_both(reentrant: bool | None) -> None:
    """Also where the backward pass computes each call again, and in a nested backward pass if reentrant."""
    results = []
    for passes in ((0,), (1,), (0, 1), (0, None, 1)):
        torch.manual_seed(0)
        model = Twice()
        optimizer = NPC(model)
        model.reentrant = reentrant
        for seed in passes:
            if seed is None:
                model.zero_grad()
                continue
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            model(x).square().sum().backward()
        results.append(measured(optimizer))
    first, second, both, cleared = results
    for name in first:
        torch.testing.assert_close(both[name], first[name] + second[name])
    assert same(cleared, second)
