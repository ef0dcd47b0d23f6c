"""Runs: an experiment's tasks learned in a row by one method from one seed, stored after every task.

All random numbers of a task depend only on the run's seed and the task's number. So a run that was killed and resumed
gives the same numbers as one that was not.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from filelock import Timeout
from torch import nn
from tqdm.auto import tqdm

import npc_ext
from npc_ext.baselines.consolidation import NonFiniteImportanceError

from .. import environment
from . import experiments
from .activation import ActivationChange
from .experiments import EXPERIMENTS, Protocol
from .methods import METHODS
from .store import Record, Store
from .tasks import Task, joint
from .training import Batches, Machine, accuracy_of, is_finite, standard, steps_of, train

# These two measure importance; SGD is then an NPC that never freezes a neuron.
WATCHED = ("npc", "sgd")
_NEVER = 1e12


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        experiment, size, method: names of what to run.
        seed: seed of all random numbers.
        protocol: protocol of the experiment.
        hyperparameters: hyperparameters of the method.
        machine: where and how to compute.
        folder: folder of the data sets; None: the default.
    """

    experiment: str
    size: str
    method: str
    seed: int
    protocol: Protocol
    hyperparameters: dict[str, Any]
    machine: Machine = field(default_factory=Machine)
    folder: str | None = None

    @property
    def name(self) -> str:
        """The name for progress bars and errors."""
        return f"{self.experiment} {self.method} seed {self.seed}"

    def record(self, tasks: list[Task] | None = None) -> Record:
        """The record of the run before anything is learned."""
        settings = {
            "protocol": asdict(self.protocol),
            "method": self.hyperparameters,
            "precision": self.machine.precision,
        }
        names = [task.name for task in tasks or []]
        return Record(self.experiment, self.size, self.method, self.seed, settings, names)


class BusyError(Exception):
    """Another process is working on the run."""


def execute(run: Run, store: Store, *, wait: bool = True, position: int = 0) -> Record:
    """Learns the tasks of a run that are not in the store yet, and returns the run's record.

    Args:
        run: the run.
        store: the store of the results.
        wait: wait while another process works on the same run.
        position: line of the progress bar.

    Raises:
        BusyError: another process is working on the run, and `wait` is False.
        DatasetError: a data set is missing.
        StoreError: the stored files of the run are damaged.
        ValueError: the method is unknown or unfit for the experiment, or the run began with other data.
    """
    try:
        lock = store.lock(run.record()).acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise BusyError(run.name) from None
    with lock:
        record, _ = store.load(run.record())
        return record if record.tasks and record.finished else _learn(run, store, position)


def _learn(run: Run, store: Store, position: int) -> Record:
    experiment = EXPERIMENTS[run.experiment]
    if run.experiment == "activation" and run.method not in WATCHED:
        raise ValueError(f"the experiment activation compares {' and '.join(WATCHED)}, not {run.method}")
    device = torch.device(run.machine.device)
    tasks = [task.to(device) for task in experiments.tasks_of(experiment, run.protocol, run.folder)]
    learned_tasks = [joint(tasks)] * len(tasks) if run.method == "joint" else tasks

    model, optimizer = fresh(run, tasks, 0)
    record, state = _begun(run, store, tasks)
    change = ActivationChange(tasks[0], run.machine) if run.experiment == "activation" else None
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if change is not None:
            change.before = state["activations"]

    epochs = run.protocol.epochs
    options = {"unit": "epoch", "position": position, "leave": False, "dynamic_ncols": True, "mininterval": 1}
    with tqdm(total=len(tasks) * epochs, initial=len(record.accuracy) * epochs, desc=run.name, **options) as bar:
        for number in range(len(record.accuracy), len(tasks)):
            if run.method == "single" and number:
                model, optimizer = fresh(run, tasks, number)
            seed_task(run.seed, number)
            task = learned_tasks[number]

            def on_epoch(loss: float, number: int = number) -> None:
                bar.set_postfix_str(f"task {number + 1}/{len(tasks)}, loss {loss:.3f}", refresh=False)
                bar.update()

            steps, seconds, consolidation_seconds = 0, 0.0, 0.0
            if record.diverged_in is None or run.method == "single":
                batches = training_batches(run, number, task, tasks[number])
                steps, seconds = train(model, optimizer, batches, epochs=epochs, machine=run.machine, on_epoch=on_epoch)
                started = time.perf_counter()
                if not is_finite(model):
                    record.diverged_in = number
                elif number + 1 < len(tasks):
                    try:
                        consolidate(run, optimizer, task)
                    except NonFiniteImportanceError:  # the weights would become non-finite next
                        record.diverged_in = number
                consolidation_seconds = time.perf_counter() - started
            record.steps.append(steps)
            record.seconds.append(round(seconds, 3))
            record.consolidation_seconds.append(round(consolidation_seconds, 3))
            record.accuracy.append(_accuracies(run, model, tasks, number, record))
            if change is not None:
                record.extra |= change.after_task(number, model, optimizer)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            store.save(record, state if change is None else {**state, "activations": change.before})
    return record


def _begun(run: Run, store: Store, tasks: list[Task]) -> tuple[Record, dict[str, Any] | None]:
    """The stored record of the run, with this machine among its environments, and its checkpoint if it has one."""
    unlearned = run.record(tasks)
    record, state = store.load(unlearned)
    if record.tasks != unlearned.tasks:  # for example because the other version of EMNIST is there now
        raise ValueError(
            f"{run.name} was begun with the tasks {'; '.join(record.tasks)}, but the data now make "
            f"{'; '.join(unlearned.tasks)}; name the same data by --data, or another --store"
        )
    device = torch.device(run.machine.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    here = environment.describe() | {"device": name, **asdict(run.machine)}
    if here not in record.environments:
        record.environments.append(here)
    return record, state


def _accuracies(run: Run, model: nn.Module, tasks: list[Task], number: int, record: Record) -> list[float | None]:
    """Accuracy on all tasks. Single networks are tested on their own task only."""
    if run.method != "single":
        return [accuracy_of(model, task, run.machine) for task in tasks]
    before = record.accuracy[-1][:number] if number else []
    return [*before, accuracy_of(model, tasks[number], run.machine), *[None] * (len(tasks) - number - 1)]


def fresh(run: Run, tasks: list[Task], number: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Builds the network and the optimizer for a task from the seed."""
    torch.manual_seed(_mixed(run.seed, number, 0))
    model: nn.Module = experiments.network(EXPERIMENTS[run.experiment], run.protocol, tasks)
    # The type stubs of .to() do not know calls with a memory format only.
    model = model.to(run.machine.device).to(memory_format=run.machine.memory_format())  # type: ignore[call-overload]
    samples = experiments.epoch_samples(run.protocol, EXPERIMENTS[run.experiment], tasks[number], run.folder)
    steps = steps_of(run.protocol.epochs, samples, run.protocol.batch_size)
    if run.experiment == "activation" and run.method == "sgd":
        options = {name: run.hyperparameters[name] for name in ("lr", "weight_decay")}
        delta = METHODS["npc"].paper["delta"]
        return model, npc_ext.NPC(model, **options, beta=_NEVER, delta=max(delta, 0.5 ** (1 / steps)))
    return model, METHODS[run.method].optimizer(model, run.hyperparameters, steps)


def training_batches(run: Run, number: int, learned: Task, task: Task) -> Batches:
    """The training batches of a task, with the samples of `learned`: the task itself, or all tasks joined.

    Raises:
        ValueError: the task has fewer samples than one batch.
    """
    experiment, protocol = EXPERIMENTS[run.experiment], run.protocol
    samples = experiments.epoch_samples(protocol, experiment, task, run.folder)
    steps_of(protocol.epochs, samples, protocol.batch_size)
    return Batches(
        learned,
        batch_size=protocol.batch_size,
        generator=torch.Generator().manual_seed(_mixed(run.seed, number, 2)),
        epoch_samples=samples,
        augmentation=experiments.augmentation(experiment, protocol),
    )


def consolidate(run: Run, optimizer: torch.optim.Optimizer, task: Task, size: int = 100) -> None:
    """Consolidates what was learned of a task, from all its training samples without augmentation."""
    parts = zip(task.train_images.split(size), task.train_labels.split(size), strict=True)
    batches = ((standard(images, task, run.machine), labels - task.classes[0]) for images, labels in parts)
    METHODS[run.method].consolidate(optimizer, batches, lambda outputs: outputs[:, task.outputs])


def _mixed(seed: int, number: int, purpose: int) -> int:
    """A seed for one purpose in one task, distinct for up to a million tasks."""
    return (seed * 1_000_003 + number) * 3 + purpose


def seed_task(seed: int, number: int) -> None:
    """Seeds dropout in a task."""
    torch.manual_seed(_mixed(seed, number, 1))
