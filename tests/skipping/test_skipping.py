"""Only gradients that the coming step does not need are skipped."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import npc_ext
from bench import cases
from npc_ext import NPC, ops, reference
from npc_ext.skipping import bound
from npc_ext.skipping.bound import frozen_for, least_importance
from npc_ext.skipping.certificate import CertifiedLayer
from npc_ext.skipping.gradients import operation_of, skipping_pays
from npc_ext.skipping.rows import Rows, rows_to_compute

from ..kernels.arguments import call, one_layer, sgd
from ..models import ManyHeads, Model, ResNet, paper_cnn, vgg
from ..tolerances import U
from ..training import same
from .frozen import Pair, batch, certificates, frozen, loss_of, mlp, set_importances, skipped, steps


def certify(optimizer: NPC, layer: str, certain: Tensor) -> Tensor:
    """Certifies neurons of a layer; returns the rows that are skipped then, (N,) bool."""
    set_importances(optimizer, {layer: certain * 3.0})
    cases.certify(optimizer)
    rows = rows_to_compute(certain, whole_only=False)
    assert rows is not None
    return torch.ones_like(certain).index_fill_(0, rows, False)


def stand_ins(model: nn.Module) -> list[str]:
    """The modules whose forward has been replaced."""
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def certified() -> tuple[Any, NPC]:
    """A small model whose first two layers are certified wholly; needs `often`."""
    return frozen(mlp(), "first", "second")


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
    model = mlp()
    optimizer = NPC(model, delta=0.999, skip_gradients="rows")
    set_importances(optimizer, {"first": torch.linspace(0, 2, 32)})
    steps(model, optimizer, range(2))
    layer = optimizer.plasticity()["first"]
    assert layer.frozen_for.dtype == torch.int64 and layer.frozen_for.shape == (32,)
    assert torch.equal(layer.frozen_for, frozen_for(layer.importance, 0.5, 0.999))
    assert "gradients skipped in the last step: those of 0 neurons" in repr(optimizer)


def test_rows_are_rounded_up_to_few_shapes() -> None:
    certain = torch.ones(256, dtype=torch.bool)
    rows = rows_to_compute(certain, whole_only=False)
    assert rows is not None and len(rows) == 0
    for moving in (1, 31, 32, 33, 100, 224):
        certain = torch.ones(256, dtype=torch.bool).index_fill_(0, torch.randperm(256)[:moving], False)
        rows = rows_to_compute(certain, whole_only=False)
        assert rows is not None and len(rows) == -(-moving // 32) * 32 and len(rows.unique()) == len(rows)
        assert bool(certain[Rows(rows, 256, torch.device("cpu")).skipped()].all())
        assert rows_to_compute(certain, whole_only=True) is None
    assert rows_to_compute(torch.arange(256) < 10, whole_only=False) is None
    assert rows_to_compute(torch.arange(16) < 10, whole_only=False) is None  # 16 rows at least


# -------------------------------------------------------------------------------------------------------------- bits


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}], ids=str)
def test_500_steps_are_bit_identical_where_layers_are_certified_wholly(always: None, options: dict[str, Any]) -> None:
    importance = {"conv1": 2.0, "conv2": 0.0, "hidden": 2.0}
    pair = Pair(paper_cnn(), importance, lr=0.05, delta=0.9999, **options)
    before = pair.model.conv1.weight.detach().clone()
    for start in range(0, 500, 100):
        pair.steps(range(start, start + 100))
        assert pair.same()
        assert pair.skipped() == {"conv1": 1.0, "conv2": 0.0, "hidden": 1.0, "output": 0.0}
    assert torch.equal(before, pair.model.conv1.weight)


def test_under_deterministic_algorithms_no_bit_changes_not_even_of_a_resumed_run() -> None:
    options: dict[str, Any] = {"lr": 0.02, "delta": 0.9995, "momentum": 0.9, "skip_gradients": "rows"}
    importance = {"conv1": 2.0, "conv2": torch.linspace(0, 2, 40), "hidden": torch.linspace(0, 2, 64)}
    pair = Pair(paper_cnn((24, 40), 64), importance, **options)
    torch.use_deterministic_algorithms(True)
    try:
        pair.steps(range(50))
        resumed = copy.deepcopy(pair.model)
        again = NPC(resumed, **options)
        again.load_state_dict(copy.deepcopy(pair.optimizer.state_dict()))
        steps(resumed, again, range(50, 120))
        pair.steps(range(50, 120))
    finally:
        torch.use_deterministic_algorithms(False)
    assert pair.same() and same(pair.model, resumed)
    assert pair.skipped()["conv2"] == pair.skipped()["hidden"] == 0.0


@pytest.mark.parametrize(
    ("make", "neurons", "delta", "count"),
    [
        (lambda: paper_cnn((24, 40), 64), {"conv1": 24, "conv2": 40, "hidden": 64}, 0.9995, 100),
        (lambda: mlp(96, 128), {"first": 96, "second": 128}, 0.9999, 500),
    ],
    ids=["cnn", "mlp"],
)
def test_where_a_part_of_the_rows_is_certified_the_rest_moves_alike_up_to_rounding(
    always: None, make: Callable[[], nn.Module], neurons: dict[str, int], delta: float, count: int
) -> None:
    importance = {layer: torch.linspace(0, 2, number) for layer, number in neurons.items()}
    pair = Pair(make(), importance, lr=0.02, delta=delta, momentum=0.9)
    for start in range(0, count, 100):
        pair.steps(range(start, start + 100))
        assert all(0.3 < pair.skipped()[layer] < 1 for layer in neurons)
        pair.assert_near()


def test_parts_of_layers_that_thaw_again_stay_with_those_that_skip_nothing(often: None, always: None) -> None:
    importance = {"first": torch.linspace(1, 5, 96), "second": torch.linspace(1, 5, 128)}
    pair = Pair(mlp(96, 128), importance, lr=0.02, delta=0.98, beta=1.0, momentum=0.5)
    history = []
    for step in range(300):
        pair.steps([step])
        pair.assert_near()
        history.append(pair.skipped()["first"])
    shares = [share for share in dict.fromkeys(history) if 0 < share < 1]
    assert len(shares) > 2 and history[-1] < max(history)  # they thawed part by part
    moved = (pair.start[0] != pair.model.first.weight).any(1)
    assert bool(moved[48:].any())  # frozen for fifty steps at least


def test_neurons_that_thaw_again_learn_as_if_nothing_had_been_skipped(always: None) -> None:
    """Layers of 16 neurons are skipped wholly or not at all, so that all bits agree."""
    # Some are below beta before 200 steps are over, unless they happen to matter.
    importance = {"first": torch.linspace(1.6, 5, 16), "second": torch.linspace(1.5, 5, 16)}
    pair = Pair(mlp(16, 16), importance, lr=0.05, delta=0.99, beta=0.9, momentum=0.5)
    history = []
    for step in range(300):
        pair.steps([step])
        history.append(pair.skipped()["first"])
    assert pair.same()
    assert max(history) == 1.0 and history[-1] == 0.0
    assert not torch.equal(pair.start[0], pair.model.first.weight)


def test_nothing_is_asked_of_layers_without_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CertifiedLayer, "decide", lambda *arguments: pytest.fail("not the usual forward"))
    model = mlp()
    steps(model, NPC(model, skip_gradients="rows"), range(70))


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


def after_backward(
    make: Callable[[], nn.Module], shape: tuple[int, ...], certain: Tensor, memory_format: torch.memory_format
) -> tuple[Pair, Tensor, float]:
    """A layer with these neurons certified, and its twin, after the same backward pass.

    Also which rows were skipped, and a bound on the rounding of the others.
    """
    pair = Pair(nn.Sequential(make(), nn.Tanh()).to(memory_format=memory_format))
    skipped_rows = certify(pair.optimizer, "0", certain)
    x = torch.randn(shape).to(memory_format=memory_format)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(own) for (model, _), own in zip(pair, inputs, strict=True)]
    assert torch.equal(*outputs)
    upstream = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(upstream)
    assert torch.equal(*(own.grad for own in inputs))
    bound = 4 * upstream.numel() / 40 * U[torch.float32] * float(x.abs().max() * upstream.abs().max())
    return pair, skipped_rows, bound


@pytest.mark.parametrize("moving", [0, 3, 20])
@pytest.mark.parametrize(
    ("make", "shape", "memory_format"),
    [
        (make, shape, memory_format)
        for make, shape in LAYERS
        for memory_format in (torch.preserve_format, torch.channels_last)
        if memory_format is torch.preserve_format or (type(make()) is nn.Conv2d and len(shape) == 4)
    ],
)
def test_every_kind_of_layer(
    always: None, make: Callable[[], nn.Module], shape: tuple[int, ...], moving: int, memory_format: torch.memory_format
) -> None:
    certain = torch.ones(40, dtype=torch.bool).index_fill_(0, torch.arange(moving) * 2, False)
    pair, skipped_rows, bound = after_backward(make, shape, certain, memory_format)
    for (name, got), want in zip(pair.model.named_parameters(), pair.twin.parameters(), strict=True):
        assert got.grad is not None and want.grad is not None and got.grad.stride() == want.grad.stride()
        dim = 1 if "Transpose" in str(pair.model[0]) and name.endswith("weight") else 0
        got_rows, want_rows = got.grad.transpose(0, dim), want.grad.transpose(0, dim)
        assert not got_rows[skipped_rows].any()
        assert bool(((got_rows - want_rows)[~skipped_rows].abs() <= bound).all())
    pair.optimizer.step()
    share = pair.skipped()["0"]
    assert share > 0 and share == pytest.approx(float(skipped_rows.double().mean()))


@pytest.mark.parametrize(("make", "shape"), GROUPED)
@pytest.mark.parametrize("moving", [0, 3])
def test_gradients_of_grouped_convolutions_are_skipped_wholly_or_not_at_all(
    always: None, make: Callable[[], nn.Module], shape: tuple[int, ...], moving: int
) -> None:
    certain = torch.arange(40) >= moving
    pair, _, _ = after_backward(make, shape, certain, torch.preserve_format)
    for got, want in zip(pair.model.parameters(), pair.twin.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad if moving else torch.zeros_like(want))
    pair.optimizer.step()
    assert pair.skipped()["0"] == (0.0 if moving else 1.0)


@contextlib.contextmanager
def saved_storages() -> Iterator[set[int]]:
    """The addresses of the storages that autograd saves for the backward pass."""
    saved = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@pytest.mark.parametrize("training", [True, False])
def test_a_wholly_certified_layer_does_not_keep_its_input(often: None, always: None, training: bool) -> None:
    model, _optimizer = certified()
    x = batch()[0]
    with saved_storages() as saved:
        model.train(training)(x)
    assert (x.data_ptr() not in saved) is training


class Watched(nn.Sequential):
    """Calls `between` with the output of each part. Hooks would keep layers from resting."""

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


# Saved are the measured activation and, if pooling follows it, the indices of the maxima.
@pytest.mark.parametrize(("relu", "saved_tensors"), [(nn.ReLU, 1), (npc_ext.nn.ReLU, 2)])
def test_back_propagation_ends_at_the_tap_of_a_first_layer_that_rests(
    often: None, always: None, relu: type[nn.Module], saved_tensors: int
) -> None:
    """Nothing before the tap is saved; importance, gradients, weights and running statistics are as in the twin."""
    pair, rested = Pair(blocks(relu), {"0.0": 3.0}, lr=0.05, delta=0.9999, momentum=0.9), 0
    for seed in range(12):
        seen: list[tuple[int, bool]] = []
        for model, optimizer in pair:
            optimizer.zero_grad()
            with saved_storages() as saved:
                model.between = lambda x, saved=saved, seen=seen: seen.append((len(saved), x.requires_grad))
                loss = loss_of(model, seed)
            loss.backward()
        assert all(p.requires_grad for p in pair.model.parameters())
        rested += seed >= 6 and seen[0] == (saved_tensors, True)
        assert torch.equal(*(optimizer.neurons["0.0"].sink.grad for _, optimizer in pair))
        if seed >= 6:
            assert all(p.grad is not None and not p.grad.any() for p in pair.model[0].parameters())
        for _, optimizer in pair:
            optimizer.step()
    assert rested == 6 and pair.skipped()["0.0"] == 1.0
    assert pair.same()


def test_a_first_layer_does_not_rest_where_its_input_needs_a_gradient(often: None, always: None) -> None:
    pair, gradients = Pair(blocks(nn.ReLU), {"0.0": 3.0}, lr=0.05, delta=0.9999), []
    pair.steps(range(6))
    for model, _ in pair:
        x = batch()[0].requires_grad_()
        model(x).square().sum().backward()
        gradients.append(x.grad)
    assert pair.skipped()["0.0"] == 1.0
    assert torch.equal(*gradients)


def test_a_resting_layer_wakes_up_with_what_it_rested_for(often: None, always: None) -> None:
    """After a change, in a copy, and when the optimizer is gone, the scales of its normalization learn again."""
    model, optimizer = frozen(blocks(nn.ReLU), "0.0")

    def scale_learns(one: Any) -> bool:
        one.zero_grad()
        loss_of(one).backward()
        return bool(one[0][1].weight.grad.any())

    assert not scale_learns(model) and scale_learns(copy.deepcopy(model))
    set_importances(optimizer, {"0.0": 0.0})
    optimizer.zero_grad()
    assert scale_learns(model)
    set_importances(optimizer, {"0.0": 3.0})
    steps(model, optimizer, range(6))
    assert not scale_learns(model)
    del optimizer
    assert scale_learns(model)


def test_where_it_does_not_pay_to_compute_some_rows_alone_all_are_computed() -> None:
    pair = Pair(mlp())
    certify(pair.optimizer, "first", torch.arange(32) > 3)
    assert torch.equal(*pair.gradients("first", batch()[0]))
    pair.optimizer.step()
    assert pair.skipped()["first"] == 0.0


# The layer, the shape of its input, the rows to compute, and whether it pays.
RULE: list[tuple[nn.Module, tuple[int, ...], int, bool]] = [
    (nn.Linear(784, 1024), (256, 784), 512, False),  # too few rows are skipped for so few positions
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
    some, nobody = (Rows(torch.arange(rows), int(neurons), torch.device("cpu")) for rows in (count, 0))
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


def test_two_runs_from_one_state_are_alike_bit_by_bit_where_parts_of_layers_are_skipped(often: None) -> None:
    def run(model: nn.Module, optimizer: NPC, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            model(torch.randn(256, 128, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()

    options: dict[str, Any] = {"lr": 0.05, "delta": 0.9999, "momentum": 0.9, "skip_gradients": "rows"}
    model = nn.Sequential(nn.Linear(128, 1024), nn.ReLU(), nn.Linear(1024, 3))
    optimizer = NPC(model, **options)
    set_importances(optimizer, {"0": (torch.arange(1024) % 8 > 0) * 3.0})
    run(model, optimizer, range(3))
    resumed = [copy.deepcopy(model) for _ in range(2)]
    for network in resumed:
        own = NPC(network, **options)
        own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(network, own, range(3, 9))
        assert skipped(own)["0"] == 0.875
    assert same(*resumed)


# ------------------------------------------------------------------------------------------------ the training loop


def test_micro_batches_clipping_and_scaling(often: None, always: None) -> None:
    """Clipping sees a gradient of zero where nothing was computed: as if those rows had been cleared."""
    pair = Pair(mlp(), {"first": 3.0, "second": 3.0}, lr=0.05, delta=0.999)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3) for _ in range(2)]
    for step in range(12):
        norms = []
        for (model, optimizer), scaler in zip(pair, scalers, strict=True):
            optimizer.zero_grad()
            for micro in range(3):
                loss = loss_of(model, 3 * step + micro) / 3
                scaler.scale(loss * (math.inf if step == 6 else 1)).backward()
            scaler.unscale_(optimizer)
            if model is pair.twin and step >= 2:
                for parameter in [*model.first.parameters(), *model.second.parameters()]:
                    parameter.grad = torch.zeros_like(parameter)
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
            scaler.step(optimizer)
            scaler.update()
        if step >= 2:
            assert pair.skipped()["first"] == 1.0
            assert torch.equal(*norms) or step == 6
    assert pair.same()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # while the model is searched
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(often: None, reentrant: bool) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        return checkpoint(model.body, x.requires_grad_(), use_reentrant=reentrant)

    pair = Pair(Model(forward, body=mlp()), {"body.first": 3.0, "body.second": 3.0}, lr=0.05, delta=0.999)
    pair.steps(range(12))
    assert pair.same() and pair.skipped()["body.first"] == 1.0


def test_bfloat16_autocast(always: None) -> None:
    pair = Pair(nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(640, 4)))
    certify(pair.optimizer, "0", torch.arange(40) >= 16)
    x = torch.randn(2, 3, 6, 6)
    for model, _ in pair:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        output.float().sum().backward()
    got, want = (model[0].weight.grad for model, _ in pair)
    assert got.dtype == torch.float32 and not got[16:].any()
    assert (got - want)[:16].norm() <= 4 * U[torch.bfloat16] * want.norm()
    pair.optimizer.step()
    assert pair.skipped()["0"] == 0.6


def test_modules_that_are_called_twice_add_up(always: None) -> None:
    pair = Pair(Model(lambda model, x: model.layer(torch.tanh(model.layer(x))), layer=nn.Linear(32, 32)))
    certify(pair.optimizer, "layer", torch.arange(32) >= 16)
    got, want = pair.gradients("layer", torch.randn(6, 32))
    assert not got[16:].any() and torch.allclose(got[:16], want[:16], rtol=1e-5, atol=1e-6)


def test_a_stride_that_is_changed_later_counts(always: None) -> None:
    pair = Pair(nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU()))
    certify(pair.optimizer, "0", torch.arange(40) >= 16)
    x = torch.randn(2, 3, 8, 8)
    for stride in ((2, 2), (1, 2)):
        pair.model[0].stride = pair.twin[0].stride = stride
        assert torch.equal(pair.model(x), pair.twin(x))


def test_a_bias_that_is_not_trained_gets_no_gradient(always: None) -> None:
    for layer, shape in ((nn.Linear(6, 40), (5, 6)), (nn.Conv1d(3, 40, 3), (2, 3, 9))):
        layer.bias.requires_grad_(False)
        pair = Pair(nn.Sequential(layer, nn.Tanh()))
        certify(pair.optimizer, "0", torch.arange(40) >= 16)
        got, want = pair.gradients("0", torch.randn(shape))
        assert layer.bias.grad is None and not got[16:].any()
        assert torch.allclose(got[:16], want[:16], rtol=1e-5, atol=1e-6)


def test_a_gradient_may_be_differentiated_again(always: None) -> None:
    """As for a gradient penalty: that to the input is the same function as ever."""
    gradients = []
    pair = Pair(nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 1)))
    certify(pair.optimizer, "0", torch.ones(32, dtype=torch.bool))
    certify(pair.optimizer, "2", torch.ones(1, dtype=torch.bool))
    x = torch.randn(6, 12)
    for model, _ in pair:
        own = x.clone().requires_grad_()
        (to_input,) = torch.autograd.grad(model(own).sum(), own, create_graph=True)
        to_input.square().sum().backward()
        gradients.append((to_input.detach(), model[0].weight.grad, own.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.allclose(gradients[0][2], gradients[1][2])
    # What reaches the weight through the gradient of the input is there, what reaches it directly is skipped.
    assert gradients[0][1].any()


def test_for_frozen_parameters_everything_is_as_usual(often: None, always: None) -> None:
    model, optimizer = certified()
    model.first.requires_grad_(False)
    optimizer.zero_grad()
    loss_of(model).backward()
    assert model.first.weight.grad is None
    with torch.no_grad():
        assert not model(batch()[0]).requires_grad


def test_a_compiled_model_computes_all_gradients(often: None, always: None) -> None:
    model, optimizer = certified()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for network in (compiled, twin):
        optimizer.zero_grad()
        loss_of(network).backward()
    assert model.first.weight.grad is None  # cleared
    loss_of(compiled).backward()
    assert torch.allclose(model.first.weight.grad, twin.first.weight.grad)
    optimizer.step()


def test_certificates_are_no_reason_to_compile_again(often: None, always: None) -> None:
    from torch._dynamo.testing import CompileCounter

    model, counter = mlp(), CompileCounter()
    optimizer, compiled = NPC(model, delta=0.999, skip_gradients="rows"), torch.compile(model, backend=counter)
    set_importances(optimizer, {"first": 3.0, "second": 3.0})
    steps(compiled, optimizer, range(8))
    assert certificates(optimizer).layers["first"].in_force() and counter.frame_count == 1
    assert skipped(optimizer)["first"] == 0.0  # all were computed


# --------------------------------------------------------------------------------------- what ends a certificate


def test_copies_start_without_certificates_and_go_on_alike(often: None, always: None) -> None:
    model, optimizer = both = certified()
    twins = copy.deepcopy(both), pickle.loads(pickle.dumps(both))
    alone = copy.deepcopy(model)
    assert model.state_dict().keys() == mlp().state_dict().keys()
    loss_of(alone).backward()
    assert alone.first.weight.grad.any()
    assert all(skipped(own)["first"] == 0.0 for _, own in twins)
    steps(model, optimizer, range(50, 56))
    for twin, own in twins:
        steps(twin, own, range(50, 56))
        assert same(model, twin) and skipped(own)["first"] == 1.0
    saved = io.BytesIO()
    torch.save((optimizer.state_dict(), model), saved)
    saved.seek(0)
    torch.load(saved, weights_only=False)


def test_loading_a_state_ends_certificates(often: None, always: None) -> None:
    model, optimizer = certified()
    optimizer.load_state_dict(optimizer.state_dict())
    assert skipped(optimizer)["first"] == 0.0
    steps(model, optimizer, range(6))
    assert skipped(optimizer)["first"] == 1.0


@pytest.mark.parametrize(
    "change",
    [
        lambda optimizer: optimizer.param_groups[0].update(beta=4.0),
        lambda optimizer: optimizer.param_groups[0].update(delta=0.5),
        lambda optimizer: optimizer.param_groups[0].update(delta=None, half_life=1),
        lambda optimizer: set_importances(optimizer, {"first": 0.1, "second": 0.1}),
        lambda optimizer: optimizer.state.clear(),
        lambda optimizer: setattr(optimizer, "state", defaultdict(dict)),
    ],
    ids=["beta", "delta", "half_life", "importance", "state", "another state"],
)
def test_a_change_by_other_code_ends_certificates(often: None, always: None, change: Callable[[NPC], None]) -> None:
    model, optimizer = certified()
    change(optimizer)
    assert skipped(optimizer)["first"] == 0.0
    before = model.first.weight.detach().clone()
    for step in range(8):
        steps(model, optimizer, [step])
        assert model.first.weight.grad.any() and skipped(optimizer)["first"] == 0.0
    assert not torch.equal(before, model.first.weight)


def test_a_change_between_backward_and_step_is_refused_if_it_matters(often: None, always: None) -> None:
    model, optimizer = certified()
    before = copy.deepcopy(model)
    loss_of(model).backward()
    optimizer.param_groups[0]["beta"] = 2.0  # all still above
    optimizer.step()
    assert same(before.first, model.first)
    steps(model, optimizer, range(1))
    model, optimizer = certified()
    before = copy.deepcopy(model)
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.param_groups[0]["beta"] = 4.0
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"layer 'first'.*zero_grad"):
            optimizer.step()
    assert same(before, model)
    steps(model, optimizer, range(1))
    assert not same(before, model)


def test_taking_turns_with_another_optimizer_nothing_is_skipped(often: None, always: None) -> None:
    model, optimizer = certified()
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(8):
        steps(model, other, [step])
        steps(model, optimizer, [step])
        assert step < 1 or skipped(optimizer)["first"] == 0.0


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
    model = mlp()
    optimizer = NPC(model, delta=0.999, skip_gradients="rows")
    set_importances(optimizer, {"first": 3.0})
    issuing = certificates(optimizer)
    layer, clock = issuing.layers["first"], issuing.clock
    between = clock.between
    steps(model, optimizer, range(between - 1))
    monkeypatch.setattr(issuing, "_look", lambda: monkeypatch.setattr(issuing, "_arriving", [Copy(layer, clock.steps)]))
    steps(model, optimizer, range(between // 4))
    assert layer.certificate is None
    if interferes:
        set_importances(optimizer, {"first": 2.9})
    steps(model, optimizer, range(1))
    assert not issuing._arriving and (layer.certificate is None) is interferes
    if layer.certificate is not None:
        assert layer.certificate.until == between + clock.validity()


@pytest.mark.gpu
def test_on_a_gpu_weights_of_certified_neurons_stay_and_others_follow_the_plain_run(always: None) -> None:
    model = Model(lambda model, x: model.body(x.cuda()).cpu(), body=mlp().cuda())
    importance = {"body.first": torch.linspace(0, 2, 32), "body.second": 3.0}
    pair = Pair(model, importance, lr=0.02, delta=0.9999, momentum=0.9)
    pair.steps(range(100))
    assert pair.skipped() == {"body.first": 0.5, "body.second": 1.0, "body.output": 0.0}
    pair.assert_near()


# ---------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "want"),
    [({"skip_gradients": "none"}, []), ({"layers": {"second": {"skip_gradients": "none"}}}, ["first", "output"])],
)
def test_it_can_be_switched_off_altogether_and_for_single_layers(options: dict[str, Any], want: list[str]) -> None:
    model = mlp()
    optimizer = NPC(model, **options)
    assert stand_ins(model) == want and len(optimizer.neurons) == 3


def test_unknown_ways_of_skipping_are_refused() -> None:
    expected = "expected one of 'layers', 'rows', 'none'"
    with pytest.raises(ValueError, match=f"skip_gradients is 'yes'; {expected}"):
        NPC(mlp(), skip_gradients="yes")
    with pytest.raises(ValueError, match=rf"layers\['second'\]: skip_gradients is 'no'; {expected}"):
        NPC(mlp(), layers={"second": {"skip_gradients": "no"}})


@pytest.mark.parametrize(("skip_gradients", "of_a_part"), [("rows", 0.5), ("layers", 0.0)])
def test_parts_of_layers_can_be_left_alone(often: None, always: None, skip_gradients: str, of_a_part: float) -> None:
    model = mlp()
    optimizer = NPC(model, delta=0.999, skip_gradients=skip_gradients)
    set_importances(optimizer, {"first": torch.tensor([3.0] * 20 + [0.0] * 12), "second": 3.0})
    steps(model, optimizer, range(4))
    assert skipped(optimizer) == {"first": of_a_part, "second": 1.0, "output": 0.0}
    rows = str(optimizer.neurons).splitlines()[2:5]
    assert [row.split()[3] for row in rows] == [f"{of_a_part:.0%}", "100%", "0%"]


class OwnLinear(nn.Linear):
    pass


def test_layers_whose_gradients_are_always_computed_say_so() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "own": OwnLinear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    model["even"] = nn.Conv1d(4, 4, 2, padding="same")
    trained = [p for name, p in model.named_parameters() if name != "c.bias"]
    optimizer = NPC(model, params=trained, skip_gradients="rows")
    assert stand_ins(model) == []
    text = str(optimizer.neurons)
    for reason in (
        "its weight is shared",
        "it is of type OwnLinear",
        "not trained by this optimizer",
        "its padding is uneven",
    ):
        assert reason in text
    assert "or none: it is a grouped convolution" in str(
        NPC(nn.Conv1d(4, 4, 1, groups=2), skip_gradients="rows").neurons
    )


def test_a_forward_that_somebody_replaced_is_left_alone() -> None:
    model: Any = mlp()
    model.first.forward = lambda x: x @ model.first.weight.t()
    optimizer = NPC(model, skip_gradients="rows")
    assert isinstance(model.first.forward, FunctionType) and "replaced" in str(optimizer.neurons)


# -------------------------------------------------------------------------------------------------- whole networks


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize(
    ("make", "shape", "layers"),
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
    often: None, always: None, make: Callable[[], nn.Module], shape: tuple[int, ...], layers: tuple[str, ...]
) -> None:
    pair = Pair(make(), dict.fromkeys(layers, 3.0), lr=0.02, delta=0.9999, momentum=0.9)
    for step in range(24):
        x = torch.randn(shape)
        for model, optimizer in pair:
            optimizer.zero_grad()
            output = model(x, step % 2) if isinstance(model, ManyHeads) else model(x)
            output.square().mean().backward()
            optimizer.step()
    assert pair.same()
