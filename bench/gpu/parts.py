"""The parts that are measured in one process on a GPU. A part yields cases to time, or rows of counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from npc_ext import NPC, ops, reference
from npc_ext.kernels import native

from ..cases import OPTIMIZERS, Steps, eager_importance, importance_case, on_sets, tf32, trainers, training
from ..certified import SGD, SMALL_NETWORKS, UNSKIPPED, Certified, Network
from ..networks import cnn, mlp, paper_cnn, resnet18
from ..rows import OURS, Row
from ..timing import Case, HostTimer, Later, check, ignoring_the_set, measure
from .ceiling import MIXES, Ceiling
from .device import Device

LARGE = 64 * 2**20  # bytes; goals relative to the ceiling hold from this size on
# The most important come first: time may run out before the last.
SHAPES = [
    (256, 128, 32, 32),
    (4096, 4096),
    (256, 128, 16, 16),
    (512, 256, 14, 14),
    (512, 512, 7, 7),
    (64, 64, 224, 224),
    (256, 512),
]
DECISIVE_SHAPES = [(4096, 4096), (512, 512, 7, 7), (256, 128, 16, 16), (64, 64, 224, 224)]
RELU_SHAPES = [(256, 128, 32, 32), (256, 128, 16, 16), (512, 512, 7, 7), (256, 512)]
SIZES = [10**8, 10**6, 10**7, 5 * 10**8, 10**5, 10**4]
MOST_SETS = 24  # sets of optimizers; more would take longer to build than to measure
SHARES = (0.0, 0.75, 1.0)
TINY_SHAPES = [(16, 32), (4, 8, 4, 4)]

Part = Callable[[Device], Iterator[Later | Row]]


def load(device: Device) -> Iterator[Row]:
    """Loads the kernels for this GPU, or builds them just in time."""
    found = native.status()
    if found.module is None:
        raise RuntimeError(found.reason)
    if not device.dry:
        if reason := native.why_not_on(0):
            raise RuntimeError(reason)
        ones = torch.ones(4, 8, device=device.name)
        check("the first launch", ops.importance(ones, ones), torch.full((8,), 4.0, device=device.name))
    facts = {
        "origin": found.origin.split(":")[0],
        "architectures": getattr(found.module, "cuda_archs", "none"),
        "seconds to load": device.seconds_to_load,
    }
    yield Row("load", "kernels", facts=facts)


# --------------------------------------------------------------------------------------------------------- kernels


def importance(device: Device) -> Iterator[Later]:
    """Eq. 2, next to eager PyTorch and to the ceiling of reading its two inputs."""
    for shape in TINY_SHAPES if device.dry else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for last in (False, True) if len(shape) > 2 else (False,):
                yield _importance(device, shape, dtype, last)


def _importance(
    device: Device,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    last: bool = False,
    *,
    turns: int = 11,
    alone: bool = False,
) -> Later:
    """The case of eq. 2 for one shape. `alone`: without peers."""
    name = f"{_shown(shape)}, {str(dtype)[6:]}{', channels last' if last else ''}"

    def make() -> Case:
        numbers = torch.Size(shape).numel()
        bytes_ = 2 * numbers * dtype.itemsize
        inputs = [_pair(device, shape, dtype, last) for _ in range(device.sets_of(bytes_))]
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3
        if alone:
            return importance_case(name, {OURS: ops.importance}, inputs, tolerance, turns=turns)
        ceiling = Ceiling(device, 2, 0, numbers * dtype.itemsize // 4, len(inputs))
        goals = {ceiling.name: 0.9} if bytes_ >= LARGE else {}
        functions: dict[str, Any] = {OURS: ops.importance, "eager": eager_importance}
        case = importance_case(name, functions, inputs, tolerance, turns=turns, goals=goals)
        return replace(case, peers={**case.peers, ceiling.name: ceiling})

    return Later(name, make)


def relu(device: Device) -> Iterator[Later]:
    """ReLU's backward pass with importance, next to the same without it and to the ceiling of its traffic."""
    for shape in TINY_SHAPES if device.dry else RELU_SHAPES:
        yield Later(_shown(shape), partial(_relu, device, shape))


def _relu(device: Device, shape: Sequence[int]) -> Case:
    numbers = torch.Size(shape).numel()
    # The gradient that is computed has the same memory in all calls.
    inputs = [_pair(device, shape, torch.float32, False) for _ in range(device.sets_of(8 * numbers))]
    ceiling = Ceiling(device, 2, 1, numbers, len(inputs), in_place=False)

    def without(y: Tensor, g: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(g, y, 0)

    def agrees(name: str) -> None:
        if name == OURS:
            gradient, importance = ops.relu_backward_importance(*inputs[0])
            check(name, gradient, without(*inputs[0]))
            check(name, importance, reference.importance(inputs[0][0].double(), inputs[0][1].double()))
        elif name == ceiling.name:
            ceiling.check()

    return Case(
        _shown(shape),
        {
            OURS: on_sets(ops.relu_backward_importance, inputs),
            "without importance": on_sets(without, inputs),
            ceiling.name: ceiling,
        },
        sets=len(inputs),
        check=agrees,
        turns=11,
        goals={"without importance": 1 / 1.03} if 12 * numbers >= LARGE else {},
        bytes=12 * numbers,
    )


def update(device: Device) -> Iterator[Later]:
    """optimizer.step() with nothing frozen and with 90 % frozen, next to torch's and to the ceiling of its traffic."""
    for size in [10**3] if device.dry else SIZES:
        for kind in OPTIMIZERS:
            for frozen in (0.0, 0.9):
                if size <= 10**8 or (kind == "SGD" and not frozen):
                    yield _update(device, size, kind, frozen)


def _update(device: Device, size: int, kind: str, frozen: float = 0.0, *, turns: int = 9, alone: bool = False) -> Later:
    """The case of one optimizer's step. `alone`: without peers."""
    name = f"{size:,} parameters, {kind}{', 90 % frozen, scattered' if frozen else ''}"

    def make() -> Case:
        ours, theirs, (reads, writes) = OPTIMIZERS[kind]
        bytes_ = (reads + writes) * 4 * size
        # All that is written is also read. Of frozen rows, neither happens.
        touched = round((1 - frozen) * reads * 4 * size)
        # Issuing certificates reads from the device, which would stall the queue.
        makers: dict[str, Any] = {OURS: partial(ours, skip_gradients="none"), **({} if alone else theirs)}
        sets = device.sets_of(touched)
        cold = sets <= MOST_SETS
        sets = sets if cold else 1
        steps = Steps(size, makers, layers=8, device=device.name, sets=sets)
        if frozen:
            steps.freeze(frozen)
        peers: dict[str, Any] = steps.measured_peers()
        fused = next((peer for peer in peers if peer.endswith("fused")), OURS)
        goals = {fused: 1.0} if fused != OURS and not frozen else {}
        ceiling = None
        if not alone and not frozen:  # frozen rows are not read, so there is no such ceiling
            ceiling = Ceiling(device, reads, writes, steps.parameters, sets)
            peers[ceiling.name] = ceiling
            goals |= {ceiling.name: 0.9} if bytes_ >= LARGE else {}

        def agrees(peer: str) -> None:
            if peer in steps.moved:
                check(peer, steps.moved[peer], steps.moved[fused])
            elif ceiling is not None:
                ceiling.check()

        return Case(
            name,
            peers,
            sets=sets,
            check=agrees,
            turns=turns,
            goals=goals,
            bytes=None if frozen else bytes_,
            facts={} if cold else {"caches": "warm"},
        )

    return Later(name, make)


def host(device: Device) -> Iterator[Later]:
    """Time until a step returns, next to torch's, whether or not the GPU has finished."""
    timer = HostTimer(before=device.synchronize, most_calls=20)  # the device is idle before each call

    def make(name: str, kind: str, layers: int) -> Row:
        ours, theirs, _ = OPTIMIZERS[kind]
        steps = Steps(layers * 64 * 64, {OURS: ours, **theirs}, layers=layers, device=device.name)
        return measure("host", Case(name, steps.measured_peers(), turns=11), timer, 2 if device.dry else None)

    for layers in (2,) if device.dry else (8, 128):
        for kind in OPTIMIZERS:
            name = f"{kind}, {2 * layers} parameters of {layers} layers"
            yield Later(name, partial(make, name, kind, layers))


# -------------------------------------------------------------------------------------------------------- decisive


def decisive(device: Device) -> Iterator[Later | Row]:
    """The most important measurements: bandwidth, eq. 2, large updates, a training step, launches."""
    for part, cases in (
        ("copies", _copies(device)),
        ("importance", few_importance(device)),
        ("update", few_updates(device)),
    ):
        yield from (replace(case, part=part) for case in cases)
    with tf32():
        yield from (
            replace(case, part="step") for case in _training_steps(device, "paper's CNN, batch 256", paper_cnn, 256)
        )
    yield from _launches(device)  # last: a profiler may slow down later work


def few_importance(device: Device, *, alone: bool = False) -> Iterator[Later]:
    """Eq. 2 in four shapes."""
    for shape in TINY_SHAPES if device.dry else DECISIVE_SHAPES:
        yield _importance(device, shape, turns=5, alone=alone)


def few_updates(device: Device, *, alone: bool = False) -> Iterator[Later]:
    """Updates of 10^8 parameters, with and without momentum."""
    for kind in ("SGD", "SGD, momentum"):
        yield _update(device, 10**3 if device.dry else 10**8, kind, turns=5, alone=alone)


def _copies(device: Device) -> Iterator[Later]:
    """The ceilings themselves, and torch's copy of 1 GB next to ours."""
    numbers = 10**3 if device.dry else 2**28

    def copy() -> Case:
        source, target = (torch.randn(numbers, device=device.name) for _ in range(2))
        ceiling = Ceiling(device, 1, 1, numbers, 2, in_place=False)
        return Case(
            f"copy of {4 * numbers:,} bytes",
            {ceiling.name: ceiling, "torch's copy": ignoring_the_set(partial(target.copy_, source))},
            sets=2,
            check=lambda name: ceiling.check(),
            turns=5,
            bytes=8 * numbers,
        )

    def moving(reads: int, writes: int) -> Case:
        ceiling = Ceiling(device, reads, writes, numbers // 4, 2)
        bytes_ = 4 * (reads + writes) * (numbers // 4)
        name = f"{reads} read, {writes} written"
        return Case(name, {ceiling.name: ceiling}, sets=2, check=lambda name: ceiling.check(), turns=5, bytes=bytes_)

    yield Later(f"copy of {4 * numbers:,} bytes", copy)
    for reads, writes in MIXES:
        yield Later(f"{reads} read, {writes} written", partial(moving, reads, writes))


def _launches(device: Device) -> Iterator[Later]:
    """Kernels that each operation launches, and a step of a common and of a wide network."""
    from npc_ext import columns  # not above: older revisions are measured, too

    n, g = _pair(device, (2, 8) if device.dry else (64, 128, 16, 16), torch.float32, False)
    neurons = n.shape[1]
    weight, gradient = (torch.randn(neurons, 64, device=device.name) for _ in range(2))
    average = torch.zeros(neurons, device=device.name)
    nonfinite_steps = torch.zeros(1, dtype=torch.int64, device=device.name)
    layer = columns.Layer(n, g, average, nonfinite_steps, [0], [1])
    operations: dict[str, Callable[[], object]] = {
        "importance": lambda: ops.importance(n, g),
        "relu_backward_importance": lambda: ops.relu_backward_importance(n, g),
        "layer_step_": lambda: ops.layer_step_(layer, columns.Network([weight], [gradient])),
    }

    def count(name: str, function: Callable[[], object]) -> Row:
        return Row("launches", name, facts={"launches": device.launches(function)})

    for name, function in operations.items():
        yield Later(name, partial(count, name, function), part="launches")
    wide = 16 if device.dry else 128_000
    networks = {
        "NPC.step(), paper's CNN": (_paper(device), (3, 32, 32)),
        f"NPC.step(), a layer of {wide:,} neurons": (nn.Sequential(nn.Linear(16, wide)).to(device.name), (16,)),
    }
    for name, (model, shape) in networks.items():
        optimizer = NPC(model, lr=1e-3, skip_gradients="none")
        x = torch.randn(2, *shape, device=device.name)
        train = training(model, optimizer, x, torch.zeros(2, dtype=torch.int64, device=device.name))
        for _ in range(3):
            train()
        measured = [(layer, layer.sink.detach() + 1) for layer in optimizer.neurons]

        def step(measured: Any = measured, optimizer: NPC = optimizer) -> None:
            for layer, sums in measured:
                layer.sink.grad = sums
            optimizer.step()

        yield Later(name, partial(count, name, step), part="launches")


# -------------------------------------------------------------------------------------------------- training steps


def step(device: Device) -> Iterator[Later]:
    """Whole training steps of NPC and of fused SGD, eager and in a CUDA graph, in TF32 and bfloat16."""
    networks: list[tuple[str, Callable[[], nn.Module], int]] = [
        ("paper's CNN, batch 256", paper_cnn, 256),
        ("paper's CNN, batch 64", paper_cnn, 64),
        ("ResNet-18, batch 256", resnet18, 256),
    ]
    with tf32():
        for label, make, batch in networks[: 1 if device.dry else None]:
            for autocast in (False, True):
                yield from _training_steps(device, label, make, batch, autocast)


# A step launches about a hundred kernels, and the device's queue holds about a thousand, so a turn has few steps.
_SECONDS_OF_STEPS = 0.002


def _training_steps(
    device: Device, label: str, make: Callable[[], nn.Module], batch: int, autocast: bool = False
) -> Iterator[Later]:
    label += ", bf16" if autocast else ""

    def case(graph: bool) -> Case:
        x, y = _batch(device, batch)
        steps = trainers(_tiny_cnn if device.dry else make, x, y, autocast)
        facts = {} if graph else {"bytes beyond the model's": {n: device.peak_bytes(step) for n, step in steps.items()}}
        run = {name: device.capture(train) if graph else train for name, train in steps.items()}
        return Case(
            label + (", in a graph" if graph else ""),
            {name: ignoring_the_set(train) for name, train in run.items()},
            turns=9,
            seconds_per_turn=_SECONDS_OF_STEPS,
            goals={SGD: 1 / 1.01 if graph else 1 / 1.03},
            facts=facts,
        )

    yield Later(label, partial(case, False))
    yield Later(label + ", in a graph", partial(case, True))


def frozen(device: Device) -> Iterator[Later]:
    """Whole training steps that skip rows, by the share of certified neurons, which are scattered at random."""
    networks = [
        Network("paper's CNN, batch 256", paper_cnn, (256, 3, 32, 32), 9, has_goals=True),
        Network("ResNet-18, batch 256", resnet18, (256, 3, 32, 32), 9),
        Network("MLP 784-1024-1024-10, batch 1024", partial(mlp, 784, 1024), (1024, 784), 9),
    ]

    def make(network: Network, share: float) -> Case:
        certified = Certified(network, share, device.name, (SGD, UNSKIPPED))
        return certified.timed(seconds_per_turn=_SECONDS_OF_STEPS, facts=certified.facts)

    with tf32():
        for network in SMALL_NETWORKS[:1] if device.dry else networks:
            for share in SHARES:
                yield Later(f"{network.name}, {share:.0%}", partial(make, network, share))


def reduce_overhead(device: Device) -> Iterator[Later]:
    """Training steps under torch.compile(mode="reduce-overhead"); eager in a dry run."""
    yield from _compiled_steps(device, "reduce-overhead")


def compiled(device: Device) -> Iterator[Later]:
    """Training steps under torch.compile, and eq. 2 next to a compiled peer."""
    yield from _compiled_steps(device, "default")
    shape = TINY_SHAPES[0] if device.dry else (256, 128, 32, 32)

    def make() -> Case:
        inputs = [_pair(device, shape, torch.float32, False) for _ in range(2)]
        function = eager_importance if device.dry else torch.compile(eager_importance, dynamic=False)
        peers = {OURS: on_sets(ops.importance, inputs), "compiled": on_sets(function, inputs)}
        return Case(f"importance, {_shown(shape)}", peers, sets=2, bytes=8 * torch.Size(shape).numel())

    yield Later(f"importance, {_shown(shape)}", make)


def _compiled_steps(device: Device, mode: str) -> Iterator[Later]:
    """Times ours alone first: compiling is slow, and time may run out before the peer is compiled."""

    def make(name: str, peers: tuple[str, ...]) -> Case:
        # All these models share their code, and Dynamo compiles the same code only a few times.
        torch.compiler.reset()
        x, y = _batch(device, 256)
        steps = {}
        for peer in peers:
            model = _paper(device)
            optimizer = (
                NPC(model, lr=1e-3) if peer == OURS else torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)
            )
            network: Any = model if device.dry else torch.compile(model, mode=mode, fullgraph=True)
            steps[peer] = ignoring_the_set(training(network, optimizer, x, y))
        goals = {SGD: 1 / 1.03} if SGD in peers else {}
        return Case(name, steps, turns=9, seconds_per_turn=_SECONDS_OF_STEPS, goals=goals)

    label = f"paper's CNN, batch 256, {mode}"
    with tf32():
        for name, peers in ((f"{label}, alone", (OURS,)), (label, (OURS, SGD))):
            yield Later(name, partial(make, name, peers))


# ---------------------------------------------------------------------------------------------------------- shared


def _pair(device: Device, shape: Sequence[int], dtype: torch.dtype, last: bool) -> tuple[Tensor, Tensor]:
    def one() -> Tensor:
        made = torch.randn(tuple(shape), device=device.name).to(dtype)
        return made.contiguous(memory_format=torch.channels_last) if last else made

    return one(), one()


def _batch(device: Device, size: int) -> tuple[Tensor, Tensor]:
    size = 2 if device.dry else size
    return torch.randn(size, 3, 32, 32, device=device.name), torch.randint(10, (size,), device=device.name)


def _tiny_cnn() -> nn.Module:
    return cnn(3, 32, (8, 8, 8), 16, 10)


def _paper(device: Device) -> nn.Module:
    return (_tiny_cnn() if device.dry else paper_cnn()).to(device.name)


def _shown(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


PARTS: dict[str, Part] = {
    part.__name__: part
    for part in (load, importance, relu, update, host, decisive, step, frozen, reduce_overhead, compiled)
}
