"""torch.func, forward-mode differentiation and batched gradients work in a model with taps as in one without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree

import npc_ext
from npc_ext import NPC
from npc_ext.skipping import certificate, forward

from ..training import same, set_importance

Model = Callable[[], tuple[nn.Module, Tensor]]


def linear() -> tuple[nn.Module, Tensor]:
    """Measured by a measuring ReLU, and by taps at an output and at an input."""
    layers = nn.Linear(6, 40), npc_ext.nn.ReLU(), nn.Linear(40, 40), nn.GELU(), nn.Linear(40, 3)
    return nn.Sequential(*layers), torch.randn(5, 6)


def convolution() -> tuple[nn.Module, Tensor]:
    norm = nn.BatchNorm2d(40, track_running_stats=False)
    layers = (
        nn.Conv2d(1, 40, 3),
        norm,
        nn.ReLU(),
        nn.Conv2d(40, 5, 3),
        npc_ext.nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 3),
    )
    return nn.Sequential(*layers), torch.randn(5, 1, 6, 6)


def attention() -> tuple[nn.Module, Tensor]:
    encoder = nn.TransformerEncoderLayer(8, 2, 40, dropout=0.0, batch_first=True)
    return nn.Sequential(encoder, nn.Linear(8, 3)), torch.randn(5, 4, 8)


def computations(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What can be computed of a model without calling backward()."""
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, values, (x,)).square().sum()

    def of_parameters() -> tuple[Tensor, ...]:
        y = model(x)
        some = torch.eye(2, y.numel()).view(2, *y.shape)
        return torch.autograd.grad(y, list(model.parameters()), some, is_grads_batched=True)

    def dual() -> Tensor | None:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    yield "grad", lambda: grad(loss)(parameters, x)
    yield "grad with respect to the input", lambda: grad(lambda x: model(x).square().sum())(x)
    yield "one gradient per sample", lambda: vmap(grad(loss), (None, 0))(parameters, x.unsqueeze(1))
    yield "vmap", lambda: vmap(model)(x.unsqueeze(1))
    yield "jvp", lambda: jvp(model, (x,), (torch.ones_like(x),))
    yield "jacrev", lambda: jacrev(model)(x)
    yield "hessian", lambda: hessian(lambda x: model(x).square().sum())(x)
    yield "forward mode", dual
    yield "functional.jacobian", lambda: torch.autograd.functional.jacobian(model, x, vectorize=True)
    yield "is_grads_batched", of_parameters


def freeze(model: nn.Module, x: Tensor, optimizer: NPC, neurons: slice) -> None:
    """Freezes neurons of every layer, and takes steps until their gradients are skipped."""
    for layer in optimizer.neurons:
        set_importance(optimizer, layer.name, 3.0, neurons=neurons)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert any(layer.gradients_skipped > 0 for layer in optimizer.plasticity().values())
    optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch.func, under attention
@pytest.mark.parametrize("frozen", [slice(0), slice(20), slice(None)], ids=["none frozen", "some frozen", "all frozen"])
@pytest.mark.parametrize("make", [linear, convolution, attention])
def test_transforms_of_a_tapped_model_give_what_they_give_without_taps(
    make: Model, frozen: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "FEWEST_STEPS_BETWEEN_ISSUES", 2)
    monkeypatch.setattr(certificate, "MOST_STEPS_BETWEEN_ISSUES", 2)
    monkeypatch.setattr(forward, "skipping_pays", lambda *arguments: True)
    model, x = make()
    plain = copy.deepcopy(model)
    optimizer = NPC(model, lr=0.0, delta=0.9999, skip_gradients="rows")
    if frozen != slice(0):
        freeze(model, x, optimizer, frozen)
    for (name, of_tapped), (_, of_plain) in zip(computations(model, x), computations(plain, x), strict=True):
        with sdpa_kernel(SDPBackend.MATH):  # others have no forward mode
            got, want = _pytree.tree_leaves(of_tapped()), _pytree.tree_leaves(of_plain())
        assert len(got) == len(want) > 0, name
        if name == "is_grads_batched" and frozen != slice(0):  # skips gradients, like any backward pass
            assert any(not tensor.any() for tensor in got)
            continue
        assert all(map(torch.equal, got, want)), name


@pytest.mark.parametrize("make", [linear, convolution, attention])
def test_training_is_measured_as_usual_after_transforms(make: Model) -> None:
    model, x = make()
    twin = copy.deepcopy(model)
    optimizers = NPC(model), NPC(twin)
    for _, compute in computations(model, x):
        with sdpa_kernel(SDPBackend.MATH):
            compute()
    assert all(layer.sink.grad is None for layer in optimizers[0].neurons)
    for network, optimizer in zip((model, twin), optimizers, strict=True):
        (network(x) - 1).square().mean().backward()
        assert all(layer.sink.grad.any() for layer in optimizer.neurons)
        optimizer.step()
    assert same(list(model.parameters()), list(twin.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grad", "one gradient per sample", "jvp", "jacrev", "hessian"])
def test_a_compiled_transform_of_a_tapped_model_has_no_graph_breaks(name: str) -> None:
    model, x = linear()
    plain = copy.deepcopy(model)
    optimizer = NPC(model)

    def compiled(model: nn.Module) -> Any:
        compute = dict(computations(model, x))[name]
        return torch.compile(compute, backend="aot_eager", fullgraph=True)()

    assert all(map(torch.equal, _pytree.tree_leaves(compiled(model)), _pytree.tree_leaves(compiled(plain))))
    assert all(layer.sink.grad is None for layer in optimizer.neurons)


def in_a_dual_level(model: nn.Module, x: Tensor) -> None:
    with forward_ad.dual_level():
        model(x)


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda model, x: grad(lambda x: model(x).square().sum())(x),
    "one gradient per sample": lambda model, x: vmap(grad(lambda x: model(x).square().sum()))(x.unsqueeze(1)),
    "forward mode": in_a_dual_level,
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("transformed_first", [True, False])
def test_a_compiled_model_is_measured_before_and_after_transforms(name: str, transformed_first: bool) -> None:
    torch.compiler.reset()
    model, x = linear()
    optimizer = NPC(model)
    compiled: Any = torch.compile(model, backend="eager")
    if transformed_first:
        TRANSFORMS[name](compiled, x)
    for _ in range(2):
        optimizer.zero_grad()
        (compiled(x) - 1).square().mean().backward()
        assert all(layer.sink.grad.any() for layer in optimizer.neurons)
        optimizer.step()
        TRANSFORMS[name](compiled, x)
        assert all(layer.sink.grad is None or not layer.sink.grad.any() for layer in optimizer.neurons)
