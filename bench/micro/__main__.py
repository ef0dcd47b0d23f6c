"""Micro-benchmarks, each against its peers in the same run: `make bench`.

Prints Markdown tables and writes them with all numbers to bench/results/micro.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from npc_ext import NPC, NPCAdamW, PlasticityWrapper, ops, reference

from .. import environment
from ..continual.networks import cnn
from ..continual.report import markdown
from . import calls as calls_part
from . import frozen as frozen_part
from . import where as where_part
from .memory import peak_memory
from .methods import OLD_TASKS, Case, paper_cnn
from .timing import Comparison, compare, empty_caches, sets_of

# (samples, neurons, positions...): fully connected layers, small maps, the paper's maps, large maps.
IMPORTANCE_SHAPES = [
    *[(16, 512), (64, 512), (256, 512), (256, 4096)],
    *[(64, 512, 2, 2), (64, 256, 4, 4), (64, 512, 7, 7), (64, 512, 8, 8)],
    *[(16, 128, 16, 16), (64, 128, 16, 16), (16, 128, 32, 32), (64, 128, 32, 32), (8, 64, 224, 224)],
]
# What the part "frozen" says of memory, and the key of its rows.
_MEMORY = {"kept for backward": "saved for backward, bytes", "peak of a step": "peak memory, bytes"}
SMALL_POSITIONS = 64  # up to here the goal is a factor of 1.5
SCHEDULED = 10**5  # parameters of the case in which the learning rate changes at each step
UPDATE_SIZES = [10**3, 10**4, 10**5, 10**6, 10**7, 64 * 10**6]

Row = dict[str, Any]


def importance(quick: bool) -> Iterator[Row]:
    """Eq. 2 against PyTorch's ways to compute it."""

    def eager(n: Tensor, g: Tensor) -> Tensor:
        product = n * g
        return (product.flatten(2).sum(2) if product.ndim > 2 else product).abs().sum(0)

    def vecdot(n: Tensor, g: Tensor) -> Tensor:
        return torch.linalg.vecdot(n.flatten(2), g.flatten(2)).abs().sum(0) if n.ndim > 2 else (n * g).abs().sum(0)

    compiled = torch.compile(eager, dynamic=False)
    torch._dynamo.config.cache_size_limit = 64
    for shape in IMPORTANCE_SHAPES[:: 4 if quick else 1]:
        count = sets_of(2 * 4 * torch.Size(shape).numel())
        inputs = [(torch.randn(shape), torch.randn(shape)) for _ in range(count)]
        peers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "npc_ext": ops.importance,
            "eager": eager,
            "vecdot": vecdot,
            "compile": compiled,
        }
        want = reference.importance(inputs[0][0].double(), inputs[0][1].double())
        for name, function in peers.items():
            _check(name, function(*inputs[0]), want)
        result = compare({name: _on(function, inputs) for name, function in peers.items()}, sets=count)
        goal = 1.5 if torch.Size(shape[2:]).numel() <= SMALL_POSITIONS else 1.0
        yield _row(" x ".join(map(str, shape)), result, goal, 2 * 4 * torch.Size(shape).numel())


def update(quick: bool) -> Iterator[Row]:
    """optimizer.step() with nothing frozen, which is the most work NPC can have, against SGD."""
    for momentum in (0.0, 0.9):
        options: dict[str, Any] = {"lr": 1e-3, "momentum": momentum}
        makers: dict[str, _Maker] = {
            "npc_ext": partial(NPC, beta=_PLASTIC, **options),
            "SGD fused": _of_parameters(torch.optim.SGD, fused=True, **options),
            "SGD foreach": _of_parameters(torch.optim.SGD, foreach=True, **options),
            "eager NPC": partial(NPC, beta=_PLASTIC, backend="reference", **options),
        }
        label = f", momentum {momentum}" if momentum else ""
        yield from _updates(quick, label, makers, "SGD fused", 3 + 2 * bool(momentum))


def adam(quick: bool) -> Iterator[Row]:
    """The same for NPCAdamW against AdamW, and against AdamW in a PlasticityWrapper."""
    makers: dict[str, _Maker] = {
        "npc_ext": partial(NPCAdamW, lr=1e-3, beta=_PLASTIC),
        "AdamW fused": _of_parameters(torch.optim.AdamW, lr=1e-3, fused=True),
        "AdamW foreach": _of_parameters(torch.optim.AdamW, lr=1e-3, foreach=True),
        "wrapped AdamW": _wrapped_adamw,
    }
    yield from _updates(quick, "", makers, "AdamW fused", 7)


_PLASTIC = 1e9  # a beta so large that every neuron learns at full rate
_Maker = Callable[[nn.Module], Any]


def _of_parameters(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> _Maker:
    return lambda model: kind(model.parameters(), **options)


def _wrapped_adamw(model: nn.Module) -> PlasticityWrapper:
    """With neurons that are all protected, if by little, because others are not copied."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    wrapper = PlasticityWrapper(optimizer, model, alpha=0.9999, beta=2.0)
    for state in wrapper._tracker.state.values():
        if "importance" in state:
            state["importance"].fill_(1.0)
    return wrapper


def _updates(quick: bool, label: str, makers: dict[str, _Maker], against: str, moves: int) -> Iterator[Row]:
    """Steps of optimizers that come to about the same weights; `moves` counts numbers moved for each weight."""
    for size in UPDATE_SIZES[: 3 if quick else None]:
        width = max(int((size / 4) ** 0.5), 1)
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
        models = dict(zip(makers, [model, *(copy.deepcopy(model) for _ in makers)], strict=False))
        optimizers = {name: make(models[name]) for name, make in makers.items()}
        measured = torch.rand(width)
        measuring = [one for one in optimizers.values() if hasattr(one, "neurons")]

        def prepare(optimizers: list[Any] = measuring, measured: Tensor = measured) -> None:
            for optimizer in optimizers:
                for layer in optimizer.neurons:
                    layer.sink.grad = measured

        prepare()
        for name, optimizer in optimizers.items():
            for parameter in models[name].parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        want = next(models[against].parameters()).double()
        for name, one in models.items():
            _check(name, next(one.parameters()), want)
        steps = {name: _ignoring_the_set(optimizer.step) for name, optimizer in optimizers.items()}
        turns = 11 if size > 10**7 else 31
        result = compare(steps, prepare=prepare, turns=turns, seconds_per_turn=0.02)
        goal = 1.0 if size >= 10**4 else None
        yield _row(f"{size:,} parameters{label}", result, goal, moves * 4 * size, against)
        if size == SCHEDULED:
            rates = itertools.cycle((1e-3, 9e-4, 8e-4))

            def on_schedule(
                prepare: Callable[[], None] = prepare,
                rates: Iterator[float] = rates,
                optimizers: dict[str, Any] = optimizers,
            ) -> None:
                prepare()
                lr = next(rates)
                for optimizer in optimizers.values():
                    for group in optimizer.param_groups:
                        group["lr"] = lr

            result = compare(steps, prepare=on_schedule, turns=turns, seconds_per_turn=0.02)
            yield _row(f"{size:,} parameters{label}, a schedule", result, goal, moves * 4 * size, against)


def step(quick: bool) -> Iterator[Row]:
    """The whole training step of the paper's CNN, and of a network so small that only host time counts."""
    configurations: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int]] = [
        ("digits CNN, batch 16", lambda: cnn(1, 8, (16, 32), 64, 10), (16, 1, 8, 8), 41),
        ("paper's CNN, batch 16", lambda: cnn(3, 32, (128, 512, 256), 512, 100), (16, 3, 32, 32), 21),
        ("paper's CNN, batch 64", lambda: cnn(3, 32, (128, 512, 256), 512, 100), (64, 3, 32, 32), 15),
    ]
    for label, make, shape, turns in configurations[: 1 if quick else None]:
        model = make()
        twin = copy.deepcopy(model)
        optimizers = [NPC(model, lr=1e-3), torch.optim.SGD(twin.parameters(), lr=1e-3, fused=True)]
        images, labels = torch.randn(shape), torch.randint(10, shape[:1])

        def train(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor = images, y: Tensor = labels) -> None:
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()

        steps = {
            "npc_ext": _ignoring_the_set(partial(train, model, optimizers[0])),
            "SGD fused": _ignoring_the_set(partial(train, twin, optimizers[1])),
        }
        result = compare(steps, turns=turns, seconds_per_turn=0.02)
        goal = None if "digits" in label else 1 / 1.03
        row = _row(label, result, goal, None)
        row["saved for backward, bytes"] = {"npc_ext": _saved(model, images), "SGD fused": _saved(twin, images)}
        state = [value for of_one in optimizers[0].state.values() for value in of_one.values()]
        row["optimizer state, bytes"] = sum(value.numel() * value.element_size() for value in state)
        row["neurons"] = sum(layer.neurons for layer in optimizers[0].neurons)  # type: ignore[attr-defined]
        yield row


def methods(quick: bool) -> Iterator[Row]:
    """optimizer.step() of every method on the paper's CNN, by the number of old tasks, against SGD and foreach."""
    for name in ("NPC", "CPC", "EWC", "MAS", "SI", "SSL"):
        for old_tasks in OLD_TASKS[: 1 if quick or name in ("NPC", "CPC") else None]:
            case = Case(name, (lambda: cnn(1, 8, (16, 32), 64, 10)) if quick else paper_cnn, old_tasks)
            steps = list(case.peers.items())

            def prepare(case: Case = case) -> None:
                if case.prepare:
                    case.prepare()
                empty_caches()

            for _, one in steps:
                prepare()
                one()
            for index, (peer, _) in enumerate(steps):
                if peer.startswith("foreach"):
                    got, want = (next(case.models[at].parameters()) for at in (index, 0))
                    _check(peer, got, want.double())
            timed = {peer: _ignoring_the_set(one) for peer, one in steps}
            result = compare(timed, prepare=prepare, turns=21, seconds_per_turn=0.02)
            label = name if name in ("NPC", "CPC") else f"{name}, {old_tasks} old task{'s' * (old_tasks > 1)}"
            goal = 0.5 if name in ("EWC", "MAS", "SI") else None
            row = _row(label, result, goal, None, "SGD fused")
            row["state, bytes"] = case.state
            row["parameters"] = sum(parameter.numel() for parameter in case.models[0].parameters())
            yield row


def frozen(quick: bool) -> Iterator[Row]:
    """The whole training step by the share of neurons that are certain not to move, against SGD."""
    for network in frozen_part.SMALL_NETWORKS if quick else frozen_part.NETWORKS:
        for share in frozen_part.SHARES[:: 5 if quick else 1]:
            case = frozen_part.Case(network, share)
            timed = {peer: _ignoring_the_set(cycle) for peer, cycle in case.cycles.items()}
            result = compare(timed, turns=network.turns, seconds_per_turn=0.1, units=frozen_part.STEPS)
            goals = {peer: of.get(share) for peer, of in frozen_part.GOALS.items()} if network.has_goals else {}
            label = f"{network.name}, {share:.0%}"
            row = _row(label, result, goals.get(frozen_part.OURS), None, frozen_part.SGD)
            row["lazy goal"] = goals.get(frozen_part.LAZY)
            row |= {"network": network.name, "share": share, "gradients skipped": case.skipped}
            row["saved for backward, bytes"] = {peer: _saved(model, case.inputs) for peer, model in case.models.items()}
            row["peak memory, bytes"] = {peer: peak_memory(cycle) for peer, cycle in case.cycles.items()}
            yield row


def host(quick: bool) -> Iterator[Row]:
    """Time per call where there is next to nothing to compute."""
    n, g = torch.randn(2, 8), torch.randn(2, 8)
    result = compare(
        {
            "npc_ext": lambda _: ops.importance(n, g),
            "eager": lambda _: (n * g).abs().sum(0),
            "through the dispatcher": lambda _: torch.ops.npc_ext.importance.default(n, g),
        }
    )
    yield _row("importance, 2 x 8", result, None, None)
    yield from (row for row in update(True) if row["case"] == f"{10**3:,} parameters")
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    tapped = copy.deepcopy(model)
    _holding = NPC(tapped)  # taps go with their optimizer
    x = torch.randn(2, 8)
    passes = {
        "npc_ext": lambda _: tapped(x).sum().backward(),
        "without taps": lambda _: model(x).sum().backward(),
    }
    yield _row("forward and backward of 2 layers with taps", compare(passes), None, None)


def _on(function: Callable[[Tensor, Tensor], Tensor], inputs: list[tuple[Tensor, Tensor]]) -> Callable[[int], Tensor]:
    return lambda index: function(*inputs[index])


def _ignoring_the_set(function: Callable[[], object]) -> Callable[[int], object]:
    return lambda _: function()


def _check(name: str, got: Tensor, want: Tensor) -> None:
    """A peer that computes something else is no peer."""
    error = (got.double() - want).norm() / want.norm()
    if not error < 1e-4:
        raise AssertionError(f"{name} is off by {error:.2g} of what it should compute")


def _saved(model: nn.Module, images: Tensor) -> int:
    """Bytes of distinct memory that the forward pass keeps for the backward pass, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)
    del output
    return sum(kept.values())


def _row(case: str, result: Comparison, goal: float | None, moved: int | None, against: str = "") -> Row:
    low, median, high = result.ratio[against] if against else result.fastest_peer()
    row: Row = {
        "case": case,
        "seconds": result.seconds,
        "peer / npc_ext (quartiles)": result.ratio,
        "against": against or next(name for name, ratio in result.ratio.items() if ratio[1] == median),
        "ratio": [low, median, high],
        "goal": goal,
    }
    if moved:
        row["GB/s"] = moved / result.seconds["npc_ext"] / 1e9
    return row


def _table(rows: list[Row]) -> str:
    """One line per case: what was counted, or our time, how many times longer peers take, and if the goal is met."""
    if "launches" in rows[0]:
        return calls_part.table(rows)
    if "milliseconds" in rows[0]:
        return where_part.table(rows)
    peers = list(dict.fromkeys(peer for row in rows for peer in row["peer / npc_ext (quartiles)"]))
    header = ["case", "npc_ext", "GB/s", *(f"{peer}, times as long" for peer in peers), "goal"]
    with_state = any("state, bytes" in row for row in rows)
    header = [*header[:-1], "state, bytes an element", "goal"] if with_state else header
    with_saved = any("share" in row for row in rows)
    header = (
        [*header[:-1], *(f"{what}, of SGD's ({', '.join(frozen_part.KEPT)})" for what in _MEMORY), "goal"]
        if with_saved
        else header
    )
    lines = []
    for row in rows:
        ratios = [row["peer / npc_ext (quartiles)"].get(peer) for peer in peers]
        cells = ["" if r is None else f"{r[1]:.2f} ({r[0]:.2f} to {r[2]:.2f})" for r in ratios]
        moved = f"{row['GB/s']:.0f}" if "GB/s" in row else ""
        if with_state:
            cells.append(f"{row['state, bytes']['npc_ext'] / row['parameters']:.2f}")
        if with_saved:
            for key in _MEMORY.values():
                of = row[key]
                cells.append(", ".join(f"{of[peer] / of[frozen_part.SGD]:.2f}" for peer in frozen_part.KEPT))
        lines.append([row["case"], _duration(row["seconds"]["npc_ext"]), moved, *cells, _verdict(row)])
    return markdown(header, lines)


def _duration(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.2f} {unit}"
    return f"{seconds * 1e6:.1f} µs"


def _verdict(row: Row) -> str:
    """Reached if the median is; where the quartiles straddle the goal, the run cannot tell, and the table says so."""
    if row["goal"] is None:
        return ""
    _, median, high = row["ratio"]
    word = "reached" if median >= row["goal"] else "within the noise" if high >= row["goal"] else "missed"
    verdict = f"{word} (at least {row['goal']:.2f} of {row['against']})"
    if row.get("lazy goal"):
        ratio = row["seconds"][frozen_part.SGD] / row["seconds"][frozen_part.LAZY]
        verdict += f"; lazy: {'reached' if ratio >= row['lazy goal'] else 'missed'} (at least {row['lazy goal']:.2f})"
    return verdict


PARTS = {
    "importance": importance,
    "update": update,
    "adam": adam,
    "calls": calls_part.calls,
    "step": step,
    "methods": methods,
    "frozen": frozen,
    "where": where_part.where,
    "host": host,
}


def main() -> None:
    """Runs the parts asked for and writes what they measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.micro", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--quick", action="store_true", help="a few small cases, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("bench/results/micro"), help="folder for the results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m bench.micro", *sys.argv[1:]])
    for part in arguments.only:
        started = time.perf_counter()
        rows = list(tqdm(PARTS[part](arguments.quick), desc=part, unit="case", leave=False))
        table = _table(rows)
        print(f"\n### {part}: {PARTS[part].__doc__}\n\n{table}")
        result = {
            "command": command,
            "seconds": time.perf_counter() - started,
            "environment": environment.describe(),
            "rows": rows,
        }
        (arguments.out / f"{part}.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.out / f"{part}.md").write_text(f"{table}\n\n`{command}`\n")
        if part == "frozen":
            frozen_part.draw(rows, arguments.out)


if __name__ == "__main__":
    main()
