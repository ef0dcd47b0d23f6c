"""The parts that are measured on a CPU. A part yields cases to time, or rows of counts."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from npc_ext import NPC, PlasticityWrapper, ops

from ..cases import OPTIMIZERS, Maker, Steps, eager_importance, importance_case, trainers
from ..certified import SMALL_NETWORKS, Certified, Network
from ..networks import Transformer, cnn, mlp, paper_cnn, resnet18
from ..rows import OURS, Row
from ..timing import Case, check, empty_caches, ignoring_the_set, sets_of
from .calls import calls
from .memory import peak_memory, saved_for_backward
from .methods import OLD_TASKS, Method, state_bytes
from .where import where

# (samples, neurons, positions...): fully connected layers, small maps, the paper's maps, large maps.
IMPORTANCE_SHAPES = [
    *[(16, 512), (64, 512), (256, 512), (256, 4096)],
    *[(64, 512, 2, 2), (64, 256, 4, 4), (64, 512, 7, 7), (64, 512, 8, 8)],
    *[(16, 128, 16, 16), (64, 128, 16, 16), (16, 128, 32, 32), (64, 128, 32, 32), (8, 64, 224, 224)],
]
SMALL_POSITIONS = 64  # up to this many the goal is a factor of 1.5
SCHEDULED = 10**5  # parameters in the case whose learning rate changes at each step
UPDATE_SIZES = [10**3, 10**4, 10**5, 10**6, 10**7, 64 * 10**6]
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
NETWORKS = [
    Network("paper's CNN, batch 64", paper_cnn, (64, 3, 32, 32), 9, has_goals=True),
    Network("ResNet-18, batch 16", resnet18, (16, 3, 32, 32), 9),
    Network("MLP 784-1024-1024-10, batch 256", partial(mlp, 784, 1024), (256, 784), 21),
    Network("transformer of width 128, batch 32 x 32", partial(Transformer, 128), (32, 32, 128), 21),
]

Part = Callable[[bool], Iterator[Case | Row]]


def importance(quick: bool) -> Iterator[Case]:
    """Eq. 2, next to PyTorch's ways to compute it."""

    def vecdot(n: Tensor, g: Tensor) -> Tensor:
        return torch.linalg.vecdot(n.flatten(2), g.flatten(2)).abs().sum(0) if n.ndim > 2 else (n * g).abs().sum(0)

    compiled = torch.compile(eager_importance, dynamic=False)
    torch._dynamo.config.cache_size_limit = 64
    for shape in IMPORTANCE_SHAPES[:: 4 if quick else 1]:
        sets = sets_of(2 * 4 * torch.Size(shape).numel())
        inputs = [(torch.randn(shape), torch.randn(shape)) for _ in range(sets)]
        peers = {"eager": eager_importance, "vecdot": vecdot, "compile": compiled}
        goals = dict.fromkeys(peers, 1.5 if torch.Size(shape[2:]).numel() <= SMALL_POSITIONS else 1.0)
        yield importance_case(" x ".join(map(str, shape)), {OURS: ops.importance, **peers}, inputs, goals=goals)


def update(quick: bool) -> Iterator[Case]:
    """optimizer.step() with nothing frozen, which is the most work for NPC, next to SGD."""
    for kind, label in (("SGD", ""), ("SGD, momentum", ", momentum 0.9")):
        ours, theirs, _ = OPTIMIZERS[kind]
        yield from _updates(quick, label, kind, {OURS: ours, **theirs, "eager NPC": partial(ours, backend="reference")})


def adam(quick: bool) -> Iterator[Case]:
    """The same for NPCAdamW, next to AdamW and to AdamW in a PlasticityWrapper."""
    ours, theirs, _ = OPTIMIZERS["AdamW"]
    yield from _updates(quick, "", "AdamW", {OURS: ours, **theirs, "wrapped AdamW": _wrapped_adamw})


def _wrapped_adamw(model: nn.Module) -> PlasticityWrapper:
    """AdamW in a wrapper. All neurons are protected a little, because only protected ones are copied."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    wrapper = PlasticityWrapper(optimizer, model, alpha=0.9999, beta=2.0)
    for state in wrapper._tracker.state.values():
        if "importance" in state:
            state["importance"].fill_(1.0)
    return wrapper


def _updates(quick: bool, label: str, kind: str, makers: dict[str, Maker]) -> Iterator[Case]:
    """Cases for the steps of optimizers that compute nearly the same weights."""
    fused = next(name for name in makers if name.endswith("fused"))
    moves = sum(OPTIMIZERS[kind][2])
    for size in UPDATE_SIZES[: 3 if quick else None]:
        steps = Steps(size, makers)

        def agrees(name: str, steps: Steps = steps) -> None:
            check(name, steps.moved[name], steps.moved[fused], 2e-4)

        rates = itertools.cycle((1e-3, 9e-4, 8e-4))

        def on_schedule(steps: Steps = steps, rates: Iterator[float] = rates) -> None:
            steps.prepare()
            lr = next(rates)
            for [optimizer] in steps.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = lr

        for schedule, prepare in (("", steps.prepare), (", a schedule", on_schedule)):
            if schedule and size != SCHEDULED:
                continue
            yield Case(
                f"{size:,} parameters{label}{schedule}",
                steps.peers(),
                prepare=prepare,
                check=agrees,
                turns=11 if size > 10**7 else 31,
                seconds_per_turn=0.02,
                goals={fused: 1.0} if size >= 10**4 else {},
                bytes=moves * 4 * steps.parameters,
            )


def step(quick: bool) -> Iterator[Case]:
    """Whole training steps of the paper's CNN, and of a network so small that host time dominates."""
    configurations: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int]] = [
        ("digits CNN, batch 16", lambda: cnn(1, 8, (16, 32), 64, 10), (16, 1, 8, 8), 41),
        ("paper's CNN, batch 16", paper_cnn, (16, 3, 32, 32), 21),
        ("paper's CNN, batch 64", paper_cnn, (64, 3, 32, 32), 15),
    ]
    for label, make, shape, turns in configurations[: 1 if quick else None]:
        images, labels = torch.randn(shape), torch.randint(10, shape[:1])
        steps = trainers(make, images, labels)

        def facts(make: Callable[[], nn.Module] = make, images: Tensor = images) -> dict[str, Any]:
            model = make()
            plain = saved_for_backward(model, images)
            optimizer = NPC(model, lr=1e-3)
            return {
                "saved for backward, of SGD's": saved_for_backward(model, images) / plain,
                "optimizer state, bytes": state_bytes(optimizer),
                "neurons": sum(layer.neurons for layer in optimizer.neurons),
            }

        yield Case(
            label,
            {name: ignoring_the_set(train) for name, train in steps.items()},
            turns=turns,
            seconds_per_turn=0.02,
            goals={} if "digits" in label else {"SGD fused": 1 / 1.03},
            facts=facts,
        )


def methods(quick: bool) -> Iterator[Case]:
    """optimizer.step() of every method on the paper's CNN, by number of old tasks, next to SGD and foreach."""
    for name in ("NPC", "CPC", "EWC", "MAS", "SI", "SSL"):
        for old_tasks in OLD_TASKS[: 1 if quick or name in ("NPC", "CPC") else None]:
            method = Method(name, (lambda: cnn(1, 8, (16, 32), 64, 10)) if quick else paper_cnn, old_tasks)

            def prepare(method: Method = method) -> None:
                method.prepare()
                empty_caches()

            for step in method.peers.values():
                prepare()
                step()
            weights = {peer: next(model.parameters()).detach().clone() for peer, model in method.by_peer().items()}

            def agrees(peer: str, weights: dict[str, Tensor] = weights) -> None:
                if peer.startswith("foreach"):
                    check(peer, weights[peer], weights[OURS])

            parameters = sum(parameter.numel() for parameter in method.models[0].parameters())
            yield Case(
                name if name in ("NPC", "CPC") else f"{name}, {old_tasks} old task{'s' * (old_tasks > 1)}",
                {peer: ignoring_the_set(step) for peer, step in method.peers.items()},
                prepare=prepare,
                check=agrees,
                turns=21,
                seconds_per_turn=0.02,
                goals={"SGD fused": 0.5} if name in ("EWC", "MAS", "SI") else {},
                facts={"state, bytes an element": method.state_bytes / parameters},
            )


def frozen(quick: bool) -> Iterator[Case]:
    """Whole training steps by the share of neurons that are certain not to move, next to SGD."""
    for network in SMALL_NETWORKS[:2] if quick else NETWORKS:
        for share in SHARES[:: 5 if quick else 1]:
            certified = Certified(network, share)

            def facts(certified: Certified = certified) -> dict[str, Any]:
                kept = {peer: saved_for_backward(model, certified.inputs) for peer, model in certified.models.items()}
                peak = {peer: peak_memory(step) for peer, step in certified.steps.items()}
                return {**certified.facts(), "saved for backward, bytes": kept, "peak memory, bytes": peak}

            yield certified.timed(seconds_per_turn=0.1, facts=facts)


def host(quick: bool) -> Iterator[Case]:
    """Time per call where there is almost nothing to compute."""
    n, g = torch.randn(2, 8), torch.randn(2, 8)
    yield Case(
        "importance, 2 x 8",
        {
            OURS: lambda _: ops.importance(n, g),
            "eager": lambda _: (n * g).abs().sum(0),
            "through the dispatcher": lambda _: torch.ops.npc_ext.importance.default(n, g),
        },
    )
    yield next(update(True))
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    tapped = copy.deepcopy(model)
    _holding = NPC(tapped)  # the taps live as long as their optimizer
    x = torch.randn(2, 8)
    yield Case(
        "forward and backward of 2 layers with taps",
        {OURS: lambda _: tapped(x).sum().backward(), "without taps": lambda _: model(x).sum().backward()},
    )


PARTS: dict[str, Part] = {
    part.__name__: part for part in (importance, update, adam, calls, step, methods, frozen, where, host)
}
