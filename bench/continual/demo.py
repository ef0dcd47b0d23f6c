"""Learns five tasks in a row on scikit-learn's handwritten digits, with SGD, NPC and two controls: `make demo`.

All start with the same learning rate, and none is tuned. NPC has the options that README.md recommends.
Prints a table, and writes the table, figures and all numbers to build/demo.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from npc_ext import NPC, plot_plasticity

from .. import command_line
from ..arguments import output_folder
from ..networks import cnn
from ..tables import markdown, percent, with_error
from . import figures, results
from .controls import FallingSGD, ShuffledNPC
from .metrics import average_accuracy, forgetting
from .tasks import Task, digits
from .training import Batches, accuracy_of, steps_of, train


@dataclass
class Run:
    """The result of learning a sequence of tasks.

    `accuracy[t][k]` is the accuracy on task k after task t. `seconds_per_step` is the mean time of training steps.
    """

    accuracy: list[list[float]]
    steps: int
    seconds_per_step: float


# Of the learning rate from task to task, in the control "SGD, falling rate".
FALL = 0.7


def sgd(model: nn.Module, lr: float, steps: float, seed: int) -> torch.optim.Optimizer:
    """Plain SGD."""
    return torch.optim.SGD(model.parameters(), lr=lr, fused=True)


def falling_sgd(model: nn.Module, lr: float, steps: float, seed: int) -> torch.optim.Optimizer:
    """A control that protects what was learned, without knowing any neuron."""
    return FallingSGD(model, model.get_submodule("output"), lr)


def _recommended(lr: float, steps: float) -> dict[str, Any]:
    return {"lr": lr, "half_life": steps, "layers": {"output": {"normalize": "active"}}}


def npc(model: nn.Module, lr: float, steps: float, seed: int) -> torch.optim.Optimizer:
    """NPC. `steps` is the mean number of steps of a task."""
    return NPC(model, **_recommended(lr, steps))


def shuffled_npc(model: nn.Module, lr: float, steps: float, seed: int) -> torch.optim.Optimizer:
    """A control that protects as many neurons as NPC, but others."""
    return ShuffledNPC(model, "output", seed, **_recommended(lr, steps))


METHODS = {"SGD": sgd, "SGD, falling rate": falling_sgd, "NPC": npc, "NPC, shuffled": shuffled_npc}


def run(
    method: str, seed: int, tasks: Sequence[Task], lr: float, epochs: int, batch_size: int
) -> tuple[Run, torch.optim.Optimizer]:
    """Trains a small CNN in the style of the paper on one task after the other, and tests on all tasks after each.

    The seed sets the initial weights, the order of samples and dropout.
    """
    torch.manual_seed(seed)
    model = cnn(1, 8, (16, 32), 64, classes=sum(len(task.classes) for task in tasks))
    lengths = [steps_of(epochs, len(task.train_labels), batch_size) for task in tasks]
    optimizer = METHODS[method](model, lr, sum(lengths) / len(lengths), seed)
    generator = torch.Generator().manual_seed(seed)
    label = f"{method}, seed {seed}"
    accuracy: list[list[float]] = []
    steps, seconds = 0, 0.0
    options = {"unit": "epoch", "leave": False, "dynamic_ncols": True, "disable": None}
    with tqdm(total=len(tasks) * epochs, desc=label, **options) as bar:
        for number, task in enumerate(tasks, start=1):
            if number > 1 and isinstance(optimizer, FallingSGD):
                optimizer.next_task(FALL)

            def on_epoch(loss: float, number: int = number, task: Task = task) -> None:
                so_far = accuracy_of(model, task)
                bar.set_postfix_str(f"task {number}/{len(tasks)}, loss {loss:.3f}, accuracy {so_far:.1%}")
                bar.update()

            batches = Batches(task, batch_size=batch_size, generator=generator)
            more, spent = train(model, optimizer, batches, epochs=epochs, on_epoch=on_epoch)
            steps, seconds = steps + more, seconds + spent
            accuracy.append([accuracy_of(model, other) for other in tasks])
            bar.write(
                f"{label}: after task {number} of {len(tasks)}, average accuracy of the tasks so far "
                f"{sum(accuracy[-1][:number]) / number:.1%}"
            )
    return Run(accuracy, steps, seconds / steps), optimizer


def table_of(runs: Mapping[str, Sequence[Run]], tasks: Sequence[str]) -> str:
    """A Markdown table over seeds: accuracy of each task after the last, average, forgetting, time per step."""
    rows = []
    for method, repeated in runs.items():
        rows.append(
            [
                method,
                *(percent([run.accuracy[-1][k] for run in repeated]) for k in range(len(tasks))),
                f"**{percent([average_accuracy(run.accuracy) for run in repeated])}**",
                percent([forgetting(run.accuracy) for run in repeated]),
                with_error([1000 * run.seconds_per_step for run in repeated], 2),
            ]
        )
    return markdown(["", *tasks, "average", "forgetting", "ms per step"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demonstration."""
    parser = argparse.ArgumentParser(prog="python -m bench.continual.demo", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of each method (at least 2, default 3)")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of all methods (default 0.1, the paper's)")
    parser.add_argument("--epochs", type=int, default=30, help="passes over each task's samples (default 30)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples per step (default 16)")
    parser.add_argument(
        "--out", type=output_folder, default=Path("build/demo"), help="folder for the results (default build/demo)"
    )
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds is {options.seeds}; a standard error needs at least 2")
    tasks = digits()
    try:
        for task in tasks:
            steps_of(options.epochs, len(task.train_labels), options.batch_size)
    except ValueError as error:
        parser.error(str(error))

    options.out.mkdir(parents=True, exist_ok=True)

    names = [" or ".join(map(str, task.classes)) for task in tasks]
    started = time.perf_counter()
    runs: dict[str, list[Run]] = {method: [] for method in METHODS}
    for seed in range(options.seeds):
        for method in runs:
            result, optimizer = run(method, seed, tasks, options.lr, options.epochs, options.batch_size)
            runs[method].append(result)
            if type(optimizer) is NPC:
                plasticity = plot_plasticity(optimizer)

    table = table_of(runs, [f"{name} (%)" for name in names])
    seconds = time.perf_counter() - started
    print(f"\nAccuracy after the last of five tasks on handwritten digits, {options.seeds} seeds, ± standard error:\n")
    print(table)
    accuracy = {method: [run.accuracy for run in repeated] for method, repeated in runs.items()}
    drawn = {
        "average": figures.average(accuracy),
        "per-task": figures.per_task(accuracy, names),
        "plasticity": plasticity,
    }
    numbers = {"tasks": names, "runs": {method: [asdict(run) for run in repeated] for method, repeated in runs.items()}}
    command = command_line("bench.continual.demo", arguments)
    results.write(options.out, command, seconds, table, drawn, numbers)


if __name__ == "__main__":
    main()
