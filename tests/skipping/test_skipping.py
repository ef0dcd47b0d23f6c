"""Gradients that are left out are those that nobody needs."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import npc_ext
from bench import cases
from npc_ext import NPC, ops, reference
from npc_ext.skipping import bound, certificate, forward
from npc_ext.skipping.bound import frozen_for, least_importance
from npc_ext.skipping.certificate import CertifiedLayer
from npc_ext.skipping.gradients import operation_of, skipping_pays
from npc_ext.skipping.rows import Rows, rows_to_compute

from ..kernels.arguments import call, one_layer, sgd
from ..models import ManyHeads, ResNet, paper_cnn, vgg
from ..tolerances import TRAJECTORY, U


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are left out whether it pays or not."""
    monkeypatch.setattr(forward, "skipping_pays", lambda *arguments: True)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates are issued every second step, for four steps."""
    monkeypatch.setattr(certificate, "FEWEST_STEPS_BETWEEN_ISSUES", 2)
    monkeypatch.setattr(certificate, "MOST_STEPS_BETWEEN_ISSUES", 2)


def certify(optimizer: NPC, layer: str, certain: Tensor) -> Tensor:
    """Certifies neurons of a layer; returns the rows that are left out then, (N,) bool."""
    set_importance(optimizer, **{layer: certain.float() * 3})
    cases.certify(optimizer)
    rows = rows_to_compute(certain, whole_only=False)
    assert rows is not None
    return torch.ones_like(certain).index_fill_(0, rows, False)


def set_importance(optimizer: NPC, **layers: float | Tensor) -> None:
    for name, importance in layers.items():
        key = optimizer.neurons[name].parameters[0].parameter
        optimizer.state[key]["importance"].copy_(torch.as_tensor(importance))


def stand_ins(model: nn.Module) -> list[str]:
    """The modules whose forward has been replaced."""
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def batch(seed: int = 0, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: Any) -> None:
    for seed in seeds:
        x, y = batch(seed)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def pair(model: nn.Module, **options: Any) -> tuple[nn.Module, NPC, nn.Module, NPC]:
    """The same twice, with and without skipping."""
    twin = copy.deepcopy(model)
    return model, NPC(model, **options), twin, NPC(twin, **{**options, "skip_frozen": False})


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def skipped(optimizer: NPC) -> dict[str, float]:
    return {name: layer.gradients_skipped for name, layer in optimizer.plasticity().items()}


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 32), npc_ext.nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))


def small_steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, start: int = 0) -> None:
    for seed in range(start, start + count):
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def certified(model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, NPC]:
    """A small model whose first two layers are certified wholly; needs `often` and `always`."""
    model = small() if model is None else model
    optimizer = NPC(model, delta=0.999, **options)
    set_importance(optimizer, **{"0": 3.0, "2": 3.0})
    small_steps(model, optimizer, 4)
    assert skipped(optimizer) == {"0": 1.0, "2": 1.0, "4": 0.0}
    return model, optimizer


# -------------------------------------------------------------------------------------------------------- certificate


@dataclass
class Start:
    """Importance just above the bound (by so many ulps) and well above it, and any sequence of measurements.

    The worst is that only the last neuron, which is not certified, matters: the others lose what they can in each step.
    """

    beta: float
    delta: float
    steps: int
    ulps: list[int]
    larger: float
    seed: int
    quiet: float
    worst: bool
    sigma: str


STARTS = st.builds(
    Start,
    beta=st.floats(0.01, 2),
    delta=st.one_of(st.floats(-8, -0.3).map(lambda e: 1 - 10**e), st.sampled_from([1 - 2e-4, 1 - 1e-3, 0.0, 1e-3])),
    steps=st.integers(0, 100),
    ulps=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    larger=st.floats(1, 3),
    seed=st.integers(0, 2**31),
    quiet=st.floats(0, 1),
    worst=st.booleans(),
    sigma=st.sampled_from(["sigmoid", "erf"]),
)


@pytest.mark.slow
@settings(max_examples=200)
@given(start=STARTS, native=st.booleans())
def test_no_certified_neuron_ever_moves(start: Start, native: bool) -> None:
    assume(least_importance(start.beta, start.delta, start.steps) <= 1e30)
    run_from(start, ops.update_ if native else reference.update_)


@pytest.mark.parametrize("case", range(12))
def test_no_certified_neuron_ever_moves_whichever_kernel_is_used(device: str, case: int) -> None:
    """Fewer cases: where the CUDA kernels run on the CPU, each of their threads is one of the CPU's."""
    draw = random.Random(case)
    constants = draw.uniform(0.01, 2), 1 - 10 ** draw.uniform(-6, -0.3), draw.randrange(30)
    ulps, larger = [draw.randrange(4) for _ in range(3)], draw.uniform(1, 3)
    start = Start(*constants, ulps, larger, case, draw.random(), case % 2 == 0, draw.choice(["sigmoid", "erf"]))
    run_from(start, ops.update_, device, most_steps=40)


def run_from(start: Start, update: Callable[..., None], device: str = "cpu", most_steps: int = 120) -> None:
    beta, delta = start.beta, start.delta
    least = least_importance(beta, delta, start.steps)
    barely = [torch.tensor(least)] * (1 + len(start.ulps))
    for at, count in enumerate([0, *start.ulps]):
        for _ in range(count):
            barely[at] = torch.nextafter(barely[at], torch.tensor(math.inf))
    average = torch.stack([*barely, torch.tensor(least * start.larger), torch.tensor(0.0)])
    certain = frozen_for(average, beta, delta)
    assert bool((certain[: len(barely)] >= start.steps - 1).all())  # just above the bound for so many steps
    certain[average >= least] = certain[average >= least].clamp(min=start.steps)
    assert certain[-1] == 0
    neurons, generator = len(average), torch.Generator().manual_seed(start.seed)
    average, weight = average.to(device), torch.ones(neurons, 2, device=device)
    options = sgd(1, momentum=0.9, weight_decay=0.01) | {"beta": [beta], "delta": [delta], "sigma": [start.sigma]}
    for step in range(min(int(certain.max()), most_steps)):
        measured = torch.rand(neurons, generator=generator) * (torch.rand(neurons, generator=generator) > start.quiet)
        if start.worst:
            measured = torch.eye(neurons)[-1]
        arguments = one_layer(average, [weight], [torch.ones_like(weight)], measured.to(device)) | options
        call(update, {**arguments, "momentum_buffers": [torch.ones_like(weight)]})
        still = (certain > step).to(device)
        assert bool((weight[still] == 1).all()), (average, certain, step)
        rate = reference.learning_rate(average, 0.1, 0.5, beta, start.sigma)
        assert bool((rate[still] == 0).all())


def test_how_long_neurons_stay_is_what_the_decay_says() -> None:
    importance = torch.tensor([0.0, 0.4, 0.5, 1.0, 4.0, math.inf, math.nan])
    want = [0, 0, 0, int(math.log(2) / -math.log(0.99)), int(math.log(8) / -math.log(0.99)), bound.LONGEST, 0]
    assert frozen_for(importance, 0.5, 0.99).tolist() == want
    assert frozen_for(importance, 0.5, 0.0)[:5].tolist() == [0] * 5
    # Next to 1 the rounding of each step counts, which nothing else would wear down.
    assert frozen_for(torch.tensor([0.5001]), 0.5, 1 - 1e-12).item() < math.log(1.0002) / 2**-23


def test_plasticity_says_for_how_long() -> None:
    _, optimizer = certified_slowly()
    layer = optimizer.plasticity()["0"]
    assert layer.frozen_for.dtype == torch.int64 and layer.frozen_for.shape == (32,)
    assert torch.equal(layer.frozen_for, frozen_for(layer.importance, 0.5, 0.999))
    assert "weight gradients skipped at the moment: those of 0 neurons" in repr(optimizer)


def certified_slowly() -> tuple[nn.Module, NPC]:
    model = small()
    optimizer = NPC(model, delta=0.999)
    set_importance(optimizer, **{"0": torch.linspace(0, 2, 32)})
    small_steps(model, optimizer, 2)
    return model, optimizer


def test_rows_are_rounded_up_to_few_shapes() -> None:
    certain = torch.ones(256, dtype=torch.bool)
    rows = rows_to_compute(certain, whole_only=False)
    assert rows is not None and len(rows) == 0
    for moving in (1, 31, 32, 33, 100, 224):
        certain = torch.ones(256, dtype=torch.bool).index_fill_(0, torch.randperm(256)[:moving], False)
        rows = rows_to_compute(certain, whole_only=False)
        assert rows is not None and len(rows) == -(-moving // 32) * 32 and len(rows.unique()) == len(rows)
        assert bool(certain[Rows(rows, 256, torch.device("cpu")).left_out()].all())
        assert rows_to_compute(certain, whole_only=True) is None
    assert rows_to_compute(torch.arange(256) < 10, whole_only=False) is None
    assert rows_to_compute(torch.arange(16) < 10, whole_only=False) is None  # 16 rows at least


# -------------------------------------------------------------------------------------------------------------- bits


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}], ids=str)
def test_500_steps_are_bit_identical_where_layers_are_certified_wholly(always: None, options: dict[str, Any]) -> None:
    model, optimizer, twin, plain = pair(paper_cnn(), lr=0.05, delta=0.9999, **options)
    for one in (optimizer, plain):
        set_importance(one, conv1=2.0, conv2=0.0, hidden=2.0)
    before = model.get_submodule("conv1").weight.detach().clone()
    for start in range(0, 500, 100):
        steps(model, optimizer, range(start, start + 100))
        steps(twin, plain, range(start, start + 100))
        assert same(model, twin)
        assert skipped(optimizer) == {"conv1": 1.0, "conv2": 0.0, "hidden": 1.0, "output": 0.0}
        assert torch.equal(optimizer.plasticity()["conv1"].importance, plain.plasticity()["conv1"].importance)
    assert torch.equal(before, model.get_submodule("conv1").weight)


def test_under_deterministic_algorithms_no_bit_changes_not_even_of_a_resumed_run() -> None:
    options = {"lr": 0.02, "delta": 0.9995, "momentum": 0.9}
    model, optimizer, twin, plain = pair(paper_cnn((24, 40), 64), **options)
    for one in (optimizer, plain):
        set_importance(one, conv1=2.0, conv2=torch.linspace(0, 2, 40), hidden=torch.linspace(0, 2, 64))
    torch.use_deterministic_algorithms(True)
    try:
        steps(model, optimizer, range(50))
        resumed = copy.deepcopy(model)
        again = NPC(resumed, **options)  # type: ignore[arg-type]
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for network, own in ((model, optimizer), (resumed, again)):
            steps(network, own, range(50, 120))
        steps(twin, plain, range(120))
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(model, twin) and same(model, resumed)
    assert skipped(optimizer)["conv2"] == skipped(optimizer)["hidden"] == 0.0


def test_where_a_part_of_the_rows_is_certified_the_rest_moves_alike_up_to_rounding(always: None) -> None:
    """Other shapes take other orders of summation: the same bound as for any other order over 100 steps."""
    options = {"lr": 0.02, "delta": 0.9995, "momentum": 0.9}
    model, optimizer, twin, plain = pair(paper_cnn((24, 40), 64), **options)
    for one in (optimizer, plain):
        set_importance(
            one, conv1=torch.linspace(0, 2, 24), conv2=torch.linspace(0, 2, 40), hidden=torch.linspace(0, 2, 64)
        )
    before = [p.detach().clone() for p in model.parameters()]
    steps(model, optimizer, range(100))
    steps(twin, plain, range(100))
    assert all(skipped(optimizer)[name] > 0.3 for name in ("conv1", "conv2", "hidden"))
    for got, want, start in zip(model.parameters(), twin.parameters(), before, strict=True):
        assert (got - want).norm() <= TRAJECTORY * want.norm()
        untouched = (want == start).flatten(1).all(1) if want.ndim > 1 else want == start
        assert torch.equal(got[untouched], start[untouched])


def three_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 96), nn.ReLU(), nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 3))


def test_500_steps_with_a_part_of_the_rows_stay_with_those_that_skip_nothing(always: None) -> None:
    model, optimizer, twin, plain = pair(three_layers(), lr=0.02, delta=0.9999, momentum=0.9)
    for one in (optimizer, plain):
        set_importance(one, **{"0": torch.linspace(0, 2, 96), "2": torch.linspace(0, 2, 128)})
    before = [p.detach().clone() for p in model.parameters()]
    for start in range(0, 500, 100):
        small_steps(model, optimizer, 100, start)
        small_steps(twin, plain, 100, start)
        assert all(0.3 < skipped(optimizer)[name] < 1 for name in ("0", "2"))
        for got, want, first in zip(model.parameters(), twin.parameters(), before, strict=True):
            assert (got - want).norm() <= TRAJECTORY * want.norm()
            untouched = (want == first).flatten(1).all(1) if want.ndim > 1 else want == first
            assert torch.equal(got[untouched], first[untouched])


def test_parts_of_layers_that_thaw_again_stay_with_those_that_skip_nothing(often: None, always: None) -> None:
    model, optimizer, twin, plain = pair(three_layers(), lr=0.02, delta=0.98, beta=1.0, momentum=0.5)
    for one in (optimizer, plain):
        set_importance(one, **{"0": torch.linspace(1, 5, 96), "2": torch.linspace(1, 5, 128)})
    before, history = model[0].weight.detach().clone(), []  # type: ignore[index]
    for step in range(300):
        small_steps(model, optimizer, 1, step)
        small_steps(twin, plain, 1, step)
        history.append(skipped(optimizer)["0"])
        for got, want in zip(model.parameters(), twin.parameters(), strict=True):
            assert (got - want).norm() <= TRAJECTORY * want.norm()
    shares = [share for share in dict.fromkeys(history) if 0 < share < 1]
    assert len(shares) > 2 and history[-1] < max(history)  # they thawed part by part
    moved = (before != model[0].weight).any(1)  # type: ignore[index]
    assert bool(moved[48:].any())  # frozen for fifty steps at least


def test_neurons_that_thaw_again_learn_as_if_nothing_had_been_skipped(always: None) -> None:
    """Layers of 16 neurons are left out wholly or not at all, so that all bits agree."""
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    model, optimizer, twin, plain = pair(model, lr=0.05, delta=0.99, beta=0.6, momentum=0.5)
    for one in (optimizer, plain):
        # Some are below beta before 200 steps are over, unless they happen to matter.
        set_importance(one, **{"0": torch.linspace(1.6, 5, 16), "2": torch.linspace(1.5, 5, 16)})
    history = []
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(300):
        small_steps(model, optimizer, 1, step)
        small_steps(twin, plain, 1, step)
        history.append(skipped(optimizer)["0"])
    assert same(model, twin)
    assert max(history) == 1.0 and history[-1] == 0.0
    assert not torch.equal(before[0], model[0].weight)  # type: ignore[index]


def test_nothing_is_asked_of_layers_without_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CertifiedLayer, "decide", lambda *arguments: pytest.fail("not the usual forward"))
    model = small()
    small_steps(model, NPC(model), 70)


# ----------------------------------------------------------------------------------------------------- kinds of layers

LAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Linear(6, 40), (5, 6)),
    (lambda: nn.Linear(6, 40, bias=False), (5, 3, 6)),
    (lambda: nn.Conv1d(3, 40, 3), (2, 3, 9)),
    (lambda: nn.Conv2d(3, 40, 3, stride=2, padding=1, dilation=2, bias=False), (2, 3, 9, 9)),
    (lambda: nn.Conv2d(3, 40, 3, padding="same"), (2, 3, 6, 6)),
    (lambda: nn.Conv2d(3, 40, 3, padding="valid"), (2, 3, 6, 6)),
    (lambda: nn.Conv2d(3, 40, 3, padding=1, padding_mode="circular"), (2, 3, 6, 6)),
    (lambda: nn.Conv2d(3, 40, 3, padding="same", padding_mode="reflect"), (2, 3, 6, 6)),
    (lambda: nn.Conv2d(3, 40, 1), (3, 6, 6)),
    (lambda: nn.Conv3d(2, 40, 3, padding=1), (2, 2, 4, 4, 4)),
    (lambda: nn.ConvTranspose1d(3, 40, 3, stride=2, output_padding=1), (2, 3, 5)),
    (lambda: nn.ConvTranspose2d(3, 40, 3, padding=1), (2, 3, 5, 5)),
    (lambda: nn.ConvTranspose3d(2, 40, 2), (1, 2, 3, 3, 3)),
]


GROUPED: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Conv2d(4, 40, 3, groups=4), (2, 4, 6, 6)),
    (lambda: nn.ConvTranspose2d(4, 40, 3, groups=2), (2, 4, 5, 5)),
]


def twins(
    make: Callable[[], nn.Module], shape: tuple[int, ...], certain: Tensor, memory_format: torch.memory_format
) -> tuple[nn.Module, nn.Module, Tensor, float, float]:
    """A layer with these neurons certified and one without skipping, after the same backward pass.

    Also which rows were left out, the share of that which the optimizer shows, and a bound on the others' rounding.
    """
    model, optimizer, twin, _ = pair(nn.Sequential(make(), nn.Tanh()))
    left_out = certify(optimizer, "0", certain)
    x, model, twin = (one.to(memory_format=memory_format) for one in (torch.randn(shape), model, twin))  # type: ignore[call-overload]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [one(own) for one, own in zip((model, twin), inputs, strict=True)]
    assert torch.equal(*outputs)
    upstream = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(upstream)
    assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]
    bound = 4 * upstream.numel() / 40 * U[torch.float32] * float(x.abs().max() * upstream.abs().max())
    before = copy.deepcopy([parameter.grad for parameter in model.parameters()])
    optimizer.step()
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        parameter.grad = gradient
    return model, twin, left_out, skipped(optimizer)["0"], bound


@pytest.mark.parametrize("moving", [0, 3, 20])
@pytest.mark.parametrize(
    ("make", "shape", "memory_format"),
    [
        *((make, shape, torch.preserve_format) for make, shape in LAYERS),
        *(
            (make, shape, torch.channels_last)
            for make, shape in LAYERS
            if type(make()) is nn.Conv2d and len(shape) == 4
        ),
    ],
)
def test_every_kind_of_layer(
    always: None,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    moving: int,
    memory_format: torch.memory_format,
) -> None:
    certain = torch.ones(40, dtype=torch.bool).index_fill_(0, torch.arange(moving) * 2, False)
    model, twin, left_out, share, bound = twins(make, shape, certain, memory_format)
    assert share == pytest.approx(float(left_out.double().mean()))
    assert share > 0
    for (name, got), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert got.grad is not None and want.grad is not None and got.grad.stride() == want.grad.stride()
        dim = 1 if "Transpose" in str(model[0]) and name.endswith("weight") else 0  # type: ignore[index]
        got_rows, want_rows = got.grad.transpose(0, dim), want.grad.transpose(0, dim)
        assert not got_rows[left_out].any()
        assert bool(((got_rows - want_rows)[~left_out].abs() <= bound).all())


@pytest.mark.parametrize(("make", "shape"), GROUPED)
@pytest.mark.parametrize("moving", [0, 3])
def test_gradients_of_grouped_convolutions_are_left_out_wholly_or_not_at_all(
    always: None, make: Callable[[], nn.Module], shape: tuple[int, ...], moving: int
) -> None:
    certain = torch.arange(40) >= moving
    model, twin, _, share, _ = twins(make, shape, certain, torch.preserve_format)
    assert share == (0.0 if moving else 1.0)
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad if moving else torch.zeros_like(want))  # type: ignore[arg-type]


def test_a_wholly_certified_layer_does_not_keep_its_input(often: None, always: None) -> None:
    model, optimizer = certified()
    assert optimizer
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    x = torch.randn(6, 12)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert x.data_ptr() not in kept
    model.eval()
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert x.data_ptr() in kept


class Watched(nn.Sequential):
    """Calls `between` after each of its parts, with what that returned: hooks would keep layers from resting."""

    between: Callable[[Tensor], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = part(x)
            if self.between is not None:
                self.between(x)
        return x


def blocks(relu: type[nn.Module]) -> Watched:
    first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), relu(), nn.MaxPool2d(2))
    return Watched(first, nn.Conv2d(8, 8, 3), relu(), nn.Flatten(), nn.Linear(32, 10))


# What is measured, and where pooling comes behind it, the indices of that.
@pytest.mark.parametrize(("relu", "to_keep"), [(nn.ReLU, 1), (npc_ext.nn.ReLU, 2)])
def test_back_propagation_ends_at_the_tap_of_a_first_layer_that_rests(
    often: None, always: None, relu: type[nn.Module], to_keep: int
) -> None:
    """Nothing before the tap is kept; importance, gradients, weights and running statistics are as without."""
    model, skipping, twin, plain = pair(blocks(relu), lr=0.05, delta=0.9999, momentum=0.9)
    for one in (skipping, plain):
        set_importance(one, **{"0.0": 3.0})
    first, rested = model[0], 0
    for seed in range(12):
        (x, y), kept, seen = batch(seed), set[int](), list[tuple[int, bool]]()

        def pack(tensor: Tensor, kept: set[int] = kept) -> Tensor:
            kept.add(tensor.untyped_storage().data_ptr())
            return tensor

        for one, own in ((model, skipping), (twin, plain)):
            one.between = lambda tensor, kept=kept, seen=seen: seen.append((len(kept), tensor.requires_grad))
            own.zero_grad()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = one(x)
            F.cross_entropy(output, y).backward()
        assert all(p.requires_grad for p in model.parameters())
        rested += seed >= 6 and seen[0] == (to_keep, True)
        assert torch.equal(skipping.neurons["0.0"].sink.grad, plain.neurons["0.0"].sink.grad)  # type: ignore[arg-type]
        if seed >= 6:
            assert all(p.grad is not None and not p.grad.any() for p in first.parameters())  # type: ignore[operator]
        skipping.step()
        plain.step()
    assert rested == 6 and skipped(skipping)["0.0"] == 1.0
    assert same(model, twin)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_a_first_layer_does_not_rest_where_its_input_needs_a_gradient(often: None, always: None) -> None:
    model, skipping, twin, plain = pair(blocks(nn.ReLU), lr=0.05, delta=0.9999)
    for one in (skipping, plain):
        set_importance(one, **{"0.0": 3.0})
    gradients = []
    for one, own in ((model, skipping), (twin, plain)):
        steps(one, own, range(6))
        x = batch()[0].requires_grad_()
        one(x).square().sum().backward()
        gradients.append(x.grad)
    assert skipped(skipping)["0.0"] == 1.0
    assert torch.equal(*gradients)  # type: ignore[arg-type]


def test_a_resting_layer_wakes_up_with_what_it_rested_for(often: None, always: None) -> None:
    """Somebody's change, a copy, the end of the optimizer: scales of its normalization learn again."""
    model = blocks(nn.ReLU)
    optimizer = NPC(model, lr=0.05, delta=0.9999)
    set_importance(optimizer, **{"0.0": 3.0})
    x, y = batch()

    def scale_learns(one: nn.Module) -> bool:
        one.zero_grad()
        F.cross_entropy(one(x), y).backward()
        return bool(one[0][1].weight.grad.any())  # type: ignore[index]

    steps(model, optimizer, range(6))
    assert not scale_learns(model) and scale_learns(copy.deepcopy(model))
    set_importance(optimizer, **{"0.0": 0.0})
    optimizer.zero_grad()
    assert scale_learns(model)
    set_importance(optimizer, **{"0.0": 3.0})
    steps(model, optimizer, range(6))
    assert not scale_learns(model)
    del optimizer
    assert scale_learns(model)


def test_a_change_after_a_resting_layers_backward_pass_is_refused(often: None, always: None) -> None:
    model = blocks(nn.ReLU)
    optimizer = NPC(model, lr=0.05, delta=0.9999)
    set_importance(optimizer, **{"0.0": 3.0})
    steps(model, optimizer, range(6))
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()  # after the forward pass, as some write it
    loss.backward()
    set_importance(optimizer, **{"0.0": 0.0})
    with pytest.raises(RuntimeError, match=r"layer '0\.0': gradients were left out of neurons that could not move"):
        optimizer.step()


def test_where_it_does_not_pay_to_compute_some_rows_alone_all_are_computed() -> None:
    model, optimizer, twin, _ = pair(small())
    certify(optimizer, "0", torch.arange(32) > 3)
    x = torch.randn(6, 12)
    for one in (model, twin):
        one(x).sum().backward()
    assert torch.equal(model[0].weight.grad, twin[0].weight.grad)  # type: ignore[index]
    optimizer.step()
    assert skipped(optimizer)["0"] == 0.0


# The layer, the shape of its input, the rows to compute, and whether it pays.
RULE: list[tuple[nn.Module, tuple[int, ...], int, bool]] = [
    (nn.Linear(784, 1024), (256, 784), 512, False),  # too few rows are left out for so few positions
    (nn.Linear(784, 1024), (256, 784), 256, True),
    (nn.Linear(784, 1024), (16, 784), 128, False),  # to write the gradient takes as long
    (nn.Linear(128, 512), (32, 32, 128), 384, False),
    (nn.Linear(128, 512), (32, 32, 128), 64, True),
    (nn.Linear(128, 512), (0, 128), 64, False),
    (nn.Conv2d(128, 512, 3, padding=1), (64, 128, 16, 16), 384, True),
    (nn.Conv2d(128, 512, 3, padding=1, stride=16), (64, 128, 16, 16), 384, False),
    (nn.Conv2d(16, 32, 3, padding=1), (16, 16, 16, 16), 16, False),
    (nn.ConvTranspose2d(128, 512, 3), (64, 128, 16, 16), 384, True),
]


@pytest.mark.parametrize(("layer", "shape", "count", "want"), RULE)
def test_whether_it_pays_follows_from_the_shapes(
    layer: nn.Module, shape: tuple[int, ...], count: int, want: bool
) -> None:
    layer, operation = layer.to("meta"), operation_of(layer)
    assert not isinstance(operation, str)
    x = torch.empty(shape, device="meta")
    neurons = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    some, nobody = (Rows(torch.arange(rows), int(neurons), torch.device("cpu")) for rows in (count, 0))  # type: ignore[arg-type]
    assert not skipping_pays(operation, x, layer.weight, nobody)  # what other devices do was never tried
    x = torch.empty(shape)
    assert skipping_pays(operation, x, layer.weight, some) is want
    assert skipping_pays(operation, x, layer.weight, nobody)
    torch.use_deterministic_algorithms(True)
    try:
        assert not skipping_pays(operation, x, layer.weight, some)
        assert skipping_pays(operation, x, layer.weight, nobody)
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_runs_from_one_state_are_alike_bit_by_bit_where_parts_of_layers_are_left_out(often: None) -> None:
    def run(model: nn.Module, optimizer: NPC, count: int, start: int = 0) -> None:
        for seed in range(start, start + count):
            optimizer.zero_grad()
            model(torch.randn(256, 128, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()

    options: dict[str, Any] = {"lr": 0.05, "delta": 0.9999, "momentum": 0.9}
    model = nn.Sequential(nn.Linear(128, 1024), nn.ReLU(), nn.Linear(1024, 3))
    optimizer = NPC(model, **options)
    set_importance(optimizer, **{"0": (torch.arange(1024) % 8 > 0) * 3.0})
    run(model, optimizer, 3)
    resumed = [copy.deepcopy(model) for _ in range(2)]
    for one in resumed:
        own = NPC(one, **options)
        own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(one, own, 6, 3)
        assert skipped(own)["0"] == 0.875
    assert same(*resumed)


# ------------------------------------------------------------------------------------------------ the training loop


def test_micro_batches_clipping_and_scaling(often: None, always: None) -> None:
    """Clipping sees a gradient of zero where nothing was computed: as if those rows had been cleared."""
    model, optimizer, twin, plain = pair(small(), lr=0.05, delta=0.999)
    for one in (optimizer, plain):
        set_importance(one, **{"0": 3.0, "2": 3.0})
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3) for _ in range(2)]
    norms = []
    for step in range(12):
        for one, own, scaler in zip((model, twin), (optimizer, plain), scalers, strict=True):
            own.zero_grad()
            for micro in range(3):
                x = torch.randn(4, 12, generator=torch.Generator().manual_seed(3 * step + micro))
                loss = one(x).square().mean() / 3
                scaler.scale(loss * (math.inf if step == 6 else 1)).backward()
            scaler.unscale_(own)
            if one is twin and step >= 2:
                for index in (0, 2):
                    for parameter in one[index].parameters():  # type: ignore[index]
                        parameter.grad = torch.zeros_like(parameter)
            norms.append(nn.utils.clip_grad_norm_(one.parameters(), 0.01))
            scaler.step(own)
            scaler.update()
        if step >= 2:
            assert skipped(optimizer)["0"] == 1.0
            assert torch.equal(norms[-1], norms[-2]) or step == 6
    assert same(model, twin)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # while the model is searched
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(often: None, reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x.requires_grad_(), use_reentrant=reentrant)

    model, optimizer, twin, plain = pair(Checkpointed(), lr=0.05, delta=0.999)
    for one in (optimizer, plain):
        set_importance(one, **{"body.0": 3.0, "body.2": 3.0})
    small_steps(model, optimizer, 12)
    small_steps(twin, plain, 12)
    assert same(model, twin) and skipped(optimizer)["body.0"] == 1.0


def test_bfloat16_autocast(always: None) -> None:
    model, optimizer, twin, _ = pair(nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(640, 4)))
    certify(optimizer, "0", torch.arange(40) >= 16)
    x = torch.randn(2, 3, 6, 6)
    for one in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            output = one(x)
        output.float().sum().backward()
    got, want = (one[0].weight.grad for one in (model, twin))  # type: ignore[index]
    assert got.dtype == torch.float32 and not got[16:].any()
    assert (got - want)[:16].norm() <= 4 * U[torch.bfloat16] * want.norm()
    optimizer.step()
    assert skipped(optimizer)["0"] == 0.6


def test_modules_that_are_called_twice_add_up(always: None) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model, optimizer, twin, _ = pair(Twice())
    certify(optimizer, "layer", torch.arange(32) >= 16)
    x = torch.randn(6, 32)
    for one in (model, twin):
        one(x).sum().backward()
    got, want = (one.layer.weight.grad for one in (model, twin))
    assert not got[16:].any() and torch.allclose(got[:16], want[:16], rtol=1e-5, atol=1e-6)


def test_a_stride_that_is_changed_later_counts(always: None) -> None:
    model, optimizer, twin, _ = pair(nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU()))
    certify(optimizer, "0", torch.arange(40) >= 16)
    x = torch.randn(2, 3, 8, 8)
    for stride in ((2, 2), (1, 2)):
        model[0].stride = twin[0].stride = stride  # type: ignore[index]
        assert torch.equal(model(x), twin(x))


def test_a_bias_that_is_not_trained_gets_no_gradient(always: None) -> None:
    for layer, shape in ((nn.Linear(6, 40), (5, 6)), (nn.Conv1d(3, 40, 3), (2, 3, 9))):
        layer.bias.requires_grad_(False)
        model, optimizer, twin, _ = pair(nn.Sequential(layer, nn.Tanh()))
        certify(optimizer, "0", torch.arange(40) >= 16)
        x = torch.randn(shape)
        for one in (model, twin):
            one(x).sum().backward()
        got, want = (one[0].weight.grad for one in (model, twin))  # type: ignore[index]
        assert layer.bias.grad is None and not got[16:].any()
        assert torch.allclose(got[:16], want[:16], rtol=1e-5, atol=1e-6)


def test_a_gradient_may_be_differentiated_again(always: None) -> None:
    """As for a gradient penalty: that to the input is the same function as ever."""
    gradients = []
    model, optimizer, twin, _ = pair(nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 1)))
    certify(optimizer, "0", torch.ones(32, dtype=torch.bool))
    certify(optimizer, "2", torch.ones(1, dtype=torch.bool))
    x = torch.randn(6, 12)
    for one in (model, twin):
        own = x.clone().requires_grad_()
        (to_input,) = torch.autograd.grad(one(own).sum(), own, create_graph=True)
        to_input.square().sum().backward()
        gradients.append((to_input.detach(), one[0].weight.grad, own.grad))  # type: ignore[index]
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.allclose(gradients[0][2], gradients[1][2])
    # What reaches the weight through the gradient of the input is there, what reaches it directly is left out.
    assert gradients[0][1].any()


def test_in_eval_mode_and_for_frozen_parameters_everything_is_as_usual(often: None, always: None) -> None:
    model, optimizer = certified()
    model.eval()
    model(torch.randn(6, 12)).sum().backward()
    assert model[0].weight.grad.any()  # type: ignore[index]
    model.train()
    model[0].requires_grad_(False)  # type: ignore[index]
    optimizer.zero_grad()
    model(torch.randn(6, 12)).sum().backward()
    assert model[0].weight.grad is None  # type: ignore[index]
    with torch.no_grad():
        assert not model(torch.randn(6, 12)).requires_grad


def test_a_compiled_model_computes_all_gradients(often: None, always: None) -> None:
    model, optimizer = certified()
    twin = copy.deepcopy(model)
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(6, 12)
    for one in (compiled, twin):
        optimizer.zero_grad()
        one(x).square().sum().backward()
    assert model[0].weight.grad is None  # cleared  # type: ignore[index]
    compiled(x).square().sum().backward()
    assert torch.allclose(model[0].weight.grad, twin[0].weight.grad)  # type: ignore[index]
    optimizer.step()


def test_certificates_are_no_reason_to_compile_again(often: None, always: None) -> None:
    from torch._dynamo.testing import CompileCounter

    model, counter = small(), CompileCounter()
    optimizer, compiled = NPC(model, delta=0.999), torch.compile(model, backend=counter)
    set_importance(optimizer, **{"0": 3.0, "2": 3.0})
    for step in range(8):
        small_steps(compiled, optimizer, 1, step)
    assert optimizer._certificates.layers["0"].in_force() and counter.frame_count == 1
    assert skipped(optimizer)["0"] == 0.0  # all were computed


# --------------------------------------------------------------------------------------- what ends a certificate


def copies(model: nn.Module, optimizer: NPC) -> Iterator[tuple[nn.Module, NPC]]:
    yield copy.deepcopy((model, optimizer))
    yield pickle.loads(pickle.dumps((model, optimizer)))


def test_copies_start_without_certificates_and_go_on_alike(often: None, always: None) -> None:
    model, optimizer = certified()
    twins = list(copies(model, optimizer))
    alone = copy.deepcopy(model)
    assert model.state_dict().keys() == small().state_dict().keys()
    alone(torch.randn(6, 12)).sum().backward()
    assert alone[0].weight.grad.any()  # type: ignore[index]
    assert all(skipped(own)["0"] == 0.0 for _, own in twins)
    small_steps(model, optimizer, 6, 50)
    for twin, own in twins:
        small_steps(twin, own, 6, 50)
        assert same(model, twin) and skipped(own)["0"] == 1.0
    saved = io.BytesIO()
    torch.save((optimizer.state_dict(), model), saved)
    saved.seek(0)
    torch.load(saved, weights_only=False)


def test_loading_a_state_ends_certificates(often: None, always: None) -> None:
    model, optimizer = certified()
    optimizer.load_state_dict(optimizer.state_dict())
    assert skipped(optimizer)["0"] == 0.0
    small_steps(model, optimizer, 6)
    assert skipped(optimizer)["0"] == 1.0


@pytest.mark.parametrize(
    "change",
    [
        lambda optimizer, model: optimizer.param_groups[0].update(beta=4.0),
        lambda optimizer, model: optimizer.param_groups[0].update(delta=0.5),
        lambda optimizer, model: set_importance(optimizer, **{"0": 0.1, "2": 0.1}),
        lambda optimizer, model: optimizer.state.clear(),
    ],
    ids=["beta", "delta", "importance", "state"],
)
def test_what_somebody_else_changes_ends_certificates(
    often: None, always: None, change: Callable[[NPC, nn.Module], None]
) -> None:
    model, optimizer = certified()
    change(optimizer, model)
    assert skipped(optimizer)["0"] == 0.0
    before = model[0].weight.detach().clone()  # type: ignore[index]
    small_steps(model, optimizer, 1)
    assert model[0].weight.grad.any()  # type: ignore[index]
    small_steps(model, optimizer, 7)
    assert not torch.equal(before, model[0].weight)  # type: ignore[index]
    assert skipped(optimizer)["0"] == 0.0


def test_a_change_between_backward_and_step_is_refused_if_it_matters(often: None, always: None) -> None:
    model, optimizer = certified()
    before = copy.deepcopy(model)
    model(torch.randn(6, 12)).sum().backward()
    optimizer.param_groups[0]["beta"] = 2.0  # all still above
    optimizer.step()
    assert torch.equal(before[0].weight, model[0].weight)  # type: ignore[index]
    small_steps(model, optimizer, 1)
    model, optimizer = certified()
    before = copy.deepcopy(model)
    optimizer.zero_grad()
    model(torch.randn(6, 12)).sum().backward()
    optimizer.param_groups[0]["beta"] = 4.0
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"layer '0'.*zero_grad"):
            optimizer.step()
    assert same(before, model)
    small_steps(model, optimizer, 1)
    assert not same(before, model)


def test_another_optimizer_on_the_same_weights_gets_its_gradients(often: None, always: None) -> None:
    model, optimizer = certified()
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    small_steps(model, other, 1)
    before = model[0].weight.detach().clone()  # type: ignore[index]
    small_steps(model, other, 1)
    assert not torch.equal(before, model[0].weight)  # type: ignore[index]
    # Taking turns with another, ours never leaves anything out.
    for step in range(8):
        small_steps(model, other, 1, step)
        small_steps(model, optimizer, 1, step)
        assert step < 1 or skipped(optimizer)["0"] == 0.0


class Copy:
    """Importance on its way from a GPU, whose part the CPU plays."""

    def __init__(self, layer: CertifiedLayer, step: int) -> None:
        importance = layer.importance()
        assert importance is not None
        self.layer, self.importance, self.step = layer, importance.clone(), step

    def issue(self) -> None:
        self.layer.issue(self.importance, self.step)


@pytest.mark.parametrize("interferes", [False, True])
def test_importance_that_arrives_later_counts_from_when_it_was_sent(
    monkeypatch: pytest.MonkeyPatch, interferes: bool
) -> None:
    model = small()
    optimizer = NPC(model, delta=0.999)
    set_importance(optimizer, **{"0": 3.0})
    certificates = optimizer._certificates
    layer, clock = certificates.layers["0"], certificates.clock
    between = clock.between
    small_steps(model, optimizer, between - 1)
    monkeypatch.setattr(
        certificates, "_look", lambda: monkeypatch.setattr(certificates, "_arriving", [Copy(layer, clock.steps)])
    )
    small_steps(model, optimizer, between // 4)
    assert layer.certificate is None
    if interferes:
        set_importance(optimizer, **{"0": 2.9})
    small_steps(model, optimizer, 1)
    assert not certificates._arriving and (layer.certificate is None) is interferes
    if layer.certificate is not None:
        assert layer.certificate.until == between + clock.validity()


@pytest.mark.gpu
def test_on_a_gpu_weights_of_certified_neurons_stay_and_others_follow_the_plain_run(always: None) -> None:
    options = {"lr": 0.02, "delta": 0.9999, "momentum": 0.9}
    model, optimizer, twin, plain = pair(small().cuda(), **options)
    for one in (optimizer, plain):
        set_importance(one, **{"0": torch.linspace(0, 2, 32), "2": 3.0})
    before = [p.detach().clone() for p in model.parameters()]
    for seed in range(100):
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed)).cuda()
        for network, own in ((model, optimizer), (twin, plain)):
            own.zero_grad()
            network(x).square().mean().backward()
            own.step()
    assert skipped(optimizer) == {"0": 0.5, "2": 1.0, "4": 0.0}
    for got, want, start in zip(model.parameters(), twin.parameters(), before, strict=True):
        assert (got - want).norm() <= TRAJECTORY * want.norm()
        untouched = (want == start).flatten(1).all(1) if want.ndim > 1 else want == start
        assert torch.equal(got[untouched], start[untouched])


def test_a_second_optimizer_on_the_same_model(often: None, always: None) -> None:
    model, optimizer = certified()
    second = NPC(model, delta=0.999).load_importance(None)
    small_steps(model, second, 6)
    assert skipped(second)["0"] == 0.0 and model[0].weight.grad.any()  # type: ignore[index]
    second.neurons.detach()
    small_steps(model, optimizer, 6)
    assert skipped(optimizer)["0"] == 1.0
    optimizer.neurons.detach()
    assert stand_ins(model) == []


def test_an_optimizer_that_is_gone_leaves_nothing_out(often: None, always: None) -> None:
    model, optimizer = certified()
    del optimizer
    model(torch.randn(6, 12)).sum().backward()
    assert model[0].weight.grad.any()  # type: ignore[index]


# ---------------------------------------------------------------------------------------------------------- options


def test_it_can_be_switched_off_altogether_and_for_single_layers() -> None:
    for options, want in (({"skip_frozen": False}, []), ({"layers": {"2": {"skip_frozen": False}}}, ["0", "4"])):
        model, places = small(), dict[str, Any](options)
        optimizer = NPC(model, **places)
        assert stand_ins(model) == want and len(optimizer.neurons) == 3
    with pytest.raises(ValueError, match="skip_frozen is 'yes'; expected one of True, False, 'layers'"):
        NPC(small(), skip_frozen="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layers\['2'\]: skip_frozen is 'no'; expected one of True, False, 'layers'"):
        NPC(small(), layers={"2": {"skip_frozen": "no"}})


@pytest.mark.parametrize(("skip_frozen", "of_a_part"), [(True, 0.5), ("layers", 0.0)])
def test_parts_of_layers_can_be_left_alone(often: None, always: None, skip_frozen: Any, of_a_part: float) -> None:
    model = small()
    optimizer = NPC(model, delta=0.999, skip_frozen=skip_frozen)
    set_importance(optimizer, **{"0": torch.tensor([3.0] * 20 + [0.0] * 12), "2": 3.0})
    small_steps(model, optimizer, 4)
    assert skipped(optimizer) == {"0": of_a_part, "2": 1.0, "4": 0.0}
    rows = str(optimizer.neurons).splitlines()[2:5]
    assert [row.split()[3] for row in rows] == [f"{of_a_part:.0%}", "100%", "0%"]


class OwnLinear(nn.Linear):
    pass


def test_layers_whose_gradients_are_always_computed_say_so() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "own": OwnLinear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    model["even"] = nn.Conv1d(4, 4, 2, padding="same")
    trained = [p for name, p in model.named_parameters() if name != "c.bias"]
    optimizer = NPC(model, params=trained)
    assert stand_ins(model) == []
    text = str(optimizer.neurons)
    for reason in (
        "its weight is shared",
        "it is a OwnLinear",
        "not trained by this optimizer",
        "its padding is uneven",
    ):
        assert reason in text
    assert "or none: it is a grouped convolution" in str(NPC(nn.Conv1d(4, 4, 1, groups=2)).neurons)


def test_a_forward_that_somebody_replaced_is_left_alone() -> None:
    model = small()
    model[0].forward = lambda x: x @ model[0].weight.t()  # type: ignore[method-assign, index, assignment]
    optimizer = NPC(model)
    assert isinstance(model[0].forward, FunctionType) and "replaced" in str(optimizer.neurons)


# -------------------------------------------------------------------------------------------------- whole networks


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize(
    ("make", "shape", "frozen"),
    [
        (ResNet, (4, 3, 8, 8), ("stem", "blocks.0.conv1", "blocks.0.conv2")),
        (ResNet, (4, 3, 8, 8), ("blocks.1.conv1", "fc")),
        (vgg, (4, 3, 8, 8), ("0.0", "0.3", "2.0")),
        (ManyHeads, (5, 6), ("features.0", "heads.0")),
        (ManyHeads, (5, 6), ("features.0", "heads.0", "heads.1")),
        (encoder, (3, 5, 16), ("layers.0.linear1", "layers.0.linear2", "layers.1.linear1")),
    ],
)
def test_wholly_certified_layers_of_a_network_change_nothing_in_the_others(
    often: None,
    always: None,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    frozen: tuple[str, ...],
) -> None:
    model, optimizer, twin, plain = pair(make(), lr=0.02, delta=0.9999, momentum=0.9)
    for one in (optimizer, plain):
        set_importance(one, **dict.fromkeys(frozen, 3.0))
    for step in range(24):
        x = torch.randn(shape)
        for network, own in ((model, optimizer), (twin, plain)):
            own.zero_grad()
            output = network(x, step % 2) if isinstance(network, ManyHeads) else network(x)
            output.square().mean().backward()
            own.step()
    assert same(model, twin)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    for name, layer in plain.plasticity().items():
        assert torch.equal(optimizer.plasticity()[name].importance, layer.importance)
