"""When it pays to compute only a part of a layer's rows: compares the package's rule with the best choice per layer.

    python -m bench.skipping_rule --out bench/results/skipping-rule

times the forward and backward pass of each weighted layer of some networks, in turns with all rows and with only the
rows of neurons that are not certified. The best choice is what a clock without noise would find. Seconds are CPU
time of one thread, which other programs disturb least; only their ratios, turn by turn, count.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from npc_ext.skipping.gradients import PartialGradient, operation_of, skipping_pays
from npc_ext.skipping.rows import Rows, rows_to_compute

from . import command_line, environment
from .arguments import output_folder
from .networks import Transformer, cnn, mlp, paper_cnn, resnet18
from .tables import markdown

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # with the shape of their input
    "MLP 784-1024-1024-10, batch 256": (partial(mlp, 784, 1024), (256, 784)),
    "MLP 784-1024-1024-10, batch 16": (partial(mlp, 784, 1024), (16, 784)),
    "transformer of width 128, batch 32 x 32": (partial(Transformer, 128), (32, 32, 128)),
    "digits CNN, batch 32": (partial(cnn, 1, 8, (32, 64), 128, 10), (32, 1, 8, 8)),
    "ResNet-18 of width 16, batch 16": (partial(resnet18, 16), (16, 3, 32, 32)),
    "ResNet-18, batch 16": (resnet18, (16, 3, 32, 32)),
    "paper's CNN, batch 8": (paper_cnn, (8, 3, 32, 32)),
    "paper's CNN, batch 64": (paper_cnn, (64, 3, 32, 32)),
}
SHARES = (0.25, 0.5, 0.75, 0.9)
_SECONDS, _FEWEST_TURNS, _MOST_TURNS = 1.0, 7, 41


def layers_of(model: nn.Module, shape: tuple[int, ...]) -> list[tuple[Any, Tensor]]:
    """The weighted layers of a model, each with its input."""
    seen: list[tuple[Any, Tensor]] = []
    for module in model.modules():
        if not isinstance(operation_of(module), str):
            module.register_forward_hook(lambda layer, inputs, _: seen.append((layer, inputs[0])))
    model(torch.randn(shape))
    return [(layer, x.detach().contiguous().requires_grad_(x.requires_grad)) for layer, x in seen]


def timed(layer: Any, x: Tensor, rows: Rows) -> dict[str, Any]:
    """Seconds of a forward and backward pass with all rows, the ratio with only `rows`, and the rule's decision."""
    operation = operation_of(layer)
    assert not isinstance(operation, str)
    arguments = x, layer.weight, layer.bias
    wanted = [tensor for tensor in arguments if tensor is not None and tensor.requires_grad]
    ways: list[Callable[[], Tensor]] = [
        lambda: operation.forward(*arguments),
        lambda: PartialGradient.apply(*arguments, operation, rows, lambda: None),
    ]
    upstream = torch.randn_like(ways[0]())
    samples: tuple[list[float], list[float]] = [], []
    began = time.process_time()
    for turn in range(_MOST_TURNS + 1):
        for way in (0, 1) if turn % 2 else (1, 0):
            started = time.process_time()
            torch.autograd.grad(ways[way](), wanted, upstream)
            samples[way].append(time.process_time() - started)
        if turn >= _FEWEST_TURNS and time.process_time() - began > _SECONDS:
            break
    ratio = median(part / full for full, part in zip(*(way[1:] for way in samples), strict=True))  # the first warms up
    rule = skipping_pays(operation, x, layer.weight, rows)
    shapes = {"weight": list(layer.weight.shape), "input": list(x.shape), "rows": len(rows)}
    return {**shapes, "seconds": median(samples[0]), "in part": ratio, "rule": rule}


def against_the_best(measured: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The time of a network's layers with the rule, and with all rows, divided by the time with the best choices."""
    best = sum(times["seconds"] * min(1, times["in part"]) for times in measured)
    rule = sum(times["seconds"] * (times["in part"] if times["rule"] else 1) for times in measured)
    return rule / best, sum(times["seconds"] for times in measured) / best


def main() -> int:
    """Measures all networks."""
    parser = argparse.ArgumentParser(prog="python -m bench.skipping_rule", description=__doc__)
    parser.add_argument("--out", type=output_folder, required=True, help="folder for the results")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    table = []
    with (out / "layers.jsonl").open("w", encoding="utf-8") as file:
        for name, (make, shape) in NETWORKS.items():
            layers = layers_of(make(), shape)
            for share in SHARES:
                measured = []
                for layer, x in layers:
                    neurons = layer.weight.shape[0]
                    certain = torch.rand(neurons).argsort().argsort() < round(share * neurons)
                    rows = rows_to_compute(certain, whole_only=False)
                    if rows is not None and len(rows) > 0:
                        measured.append(timed(layer, x, Rows(rows, neurons, x.device)))
                        file.write(json.dumps({"network": name, "share": share, **measured[-1]}) + "\n")
                        file.flush()
                table.append([name, f"{share:.0%}", *(f"{ratio:.3f}" for ratio in against_the_best(measured))])
                print(*table[-1], sep="; ", flush=True)
    header = ["network", "share certified", "rule, of the best choice's time", "all rows, of the best choice's time"]
    command = command_line("bench.skipping_rule")
    described = environment.describe()
    (out / "run.json").write_text(json.dumps({"command": command, "environment": described}) + "\n", encoding="utf-8")
    where = ", ".join(f"{key} {value}" for key, value in described.items())
    (out / "layers.md").write_text(f"{markdown(header, table)}\n\n`{command}`: {where}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
