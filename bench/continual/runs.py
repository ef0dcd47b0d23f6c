"""One run: an experiment's tasks learned in a row by one method from one seed, kept after every task.

Everything random in a task is seeded from the run's seed and the task's number alone, so a run that was killed and goes
on from its last task comes to the same numbers as one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from filelock import Timeout
from torch import Tensor, nn
from tqdm.auto import tqdm

import npc_ext
from npc_ext.baselines.consolidation import NonFiniteImportanceError

from .. import environment
from . import experiments
from .activation import Watch
from .experiments import EXPERIMENTS, Protocol
from .methods import METHODS
from .store import Record, Store
from .tasks import Task, joint
from .training import Batches, Machine, accuracy_of, is_finite, standard, steps_of, train

# SGD as an NPC that never consolidates, where the experiment is about the importance that NPC measures.
_WATCHED = ("npc", "sgd")
_NEVER = 1e12


@dataclass(frozen=True)
class Run:
    """What to run, and where.

    Attributes:
        experiment, size, method, seed: names, and the seed of all that is random.
        protocol: of the experiment.
        hyperparameters: of the method.
        machine: how to compute.
        folder: of the data sets; None: their default.
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
        """As progress and errors call it."""
        return f"{self.experiment} {self.method} seed {self.seed}"

    def record(self, tasks: list[Task] | None = None) -> Record:
        """The run's record with nothing learned yet."""
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
    """Learns what is not learned yet of a run, and returns its record.

    Args:
        run: what to do.
        store: where its results are kept, and looked for first.
        wait: for another process that is working on the same run.
        position: the line of the progress bar.

    Raises:
        BusyError: another process is working on it, and `wait` is off.
        DatasetError: a data set is missing.
        StoreError: what the store holds of the run is damaged.
        ValueError: the method does not exist or cannot do the experiment, or the run was begun with other data.
    """
    lock = store.lock(run.record())
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise BusyError(run.name) from None
    try:
        record, _ = store.load(run.record())
        if record.tasks and record.finished:
            return record
        return _learn(run, store, position)
    finally:
        lock.release()


def _learn(run: Run, store: Store, position: int) -> Record:
    experiment, method = EXPERIMENTS[run.experiment], METHODS[run.method]
    if run.experiment == "activation" and run.method not in _WATCHED:
        raise ValueError(f"the experiment activation compares {' and '.join(_WATCHED)}, not {run.method}")
    device = torch.device(run.machine.device)
    tasks = [task.to(device) for task in experiments.tasks_of(experiment, run.protocol, run.folder)]
    learned_tasks = [joint(tasks)] * len(tasks) if run.method == "joint" else tasks

    model, optimizer = fresh(run, tasks, 0)
    unlearned = run.record(tasks)
    record, state = store.load(unlearned)
    if record.tasks != unlearned.tasks:  # as where one of EMNIST's forms was there first, and now there is the other
        raise ValueError(
            f"{run.name} was begun with the tasks {'; '.join(record.tasks)}, but the data now make "
            f"{'; '.join(unlearned.tasks)}; name the same data by --data, or another --store"
        )
    watch = Watch(tasks[0], run.machine) if run.experiment == "activation" else None
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if watch is not None:
            watch.load(state["watch"])
    here = environment.describe() | {"device": _device_name(device), **asdict(run.machine)}
    if here not in record.environments:
        record.environments.append(here)

    total = len(tasks) * run.protocol.epochs
    with tqdm(
        total=total,
        initial=len(record.accuracy) * run.protocol.epochs,
        desc=run.name,
        unit="epoch",
        position=position,
        leave=False,
        dynamic_ncols=True,
        mininterval=1,
    ) as bar:
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
                steps, seconds = train(
                    model,
                    optimizer,
                    training_batches(run, number, task, tasks[number]),
                    epochs=run.protocol.epochs,
                    machine=run.machine,
                    on_epoch=on_epoch,
                )
                started = time.perf_counter()
                if not is_finite(model):
                    record.diverged_in = number
                elif method.consolidate is not None and number + 1 < len(tasks):
                    try:
                        method.consolidate(optimizer, batches_of(task, run), outputs_of(task))
                    except NonFiniteImportanceError:  # the weights were about to be
                        record.diverged_in = number
                consolidation_seconds = time.perf_counter() - started
            record.steps.append(steps)
            record.seconds.append(round(seconds, 3))
            record.consolidation_seconds.append(round(consolidation_seconds, 3))
            record.accuracy.append(_accuracies(run, model, tasks, number, record))
            if watch is not None:
                record.extra |= watch.after_task(number, model, optimizer)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            store.save(record, state if watch is None else {**state, "watch": watch.state()})
    return record


def _accuracies(run: Run, model: nn.Module, tasks: list[Task], number: int, record: Record) -> list[float | None]:
    """On all tasks; of single networks, what each came to on its own task so far."""
    if run.method != "single":
        return [accuracy_of(model, task, run.machine) for task in tasks]
    before = record.accuracy[-1][:number] if number else []
    return [*before, accuracy_of(model, tasks[number], run.machine), *[None] * (len(tasks) - number - 1)]


def fresh(run: Run, tasks: list[Task], number: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network and the optimizer before a task, from the seed."""
    torch.manual_seed(_mixed(run.seed, number, 0))
    model: nn.Module = experiments.network(EXPERIMENTS[run.experiment], run.protocol, tasks)
    # The types of .to() do not know that a memory format may come alone.
    model = model.to(run.machine.device).to(memory_format=run.machine.memory_format())  # type: ignore[call-overload]
    samples = experiments.epoch_samples(run.protocol, EXPERIMENTS[run.experiment], tasks[number], run.folder)
    steps = steps_of(run.protocol.epochs, samples, run.protocol.batch_size)
    if run.experiment == "activation" and run.method == "sgd":
        own = {name: run.hyperparameters[name] for name in ("lr", "weight_decay")}
        delta = METHODS["npc"].paper["delta"]
        return model, npc_ext.NPC(model, **own, beta=_NEVER, delta=max(delta, 0.5 ** (1 / steps)))
    return model, METHODS[run.method].optimizer(model, run.hyperparameters, steps)


def training_batches(run: Run, number: int, learned: Task, task: Task) -> Batches:
    """The batches for a task, of the samples of `learned`: the task itself, or all tasks joined.

    Raises:
        ValueError: the task is learned with less than a batch.
    """
    experiment, protocol = EXPERIMENTS[run.experiment], run.protocol
    samples = experiments.epoch_samples(protocol, experiment, task, run.folder)
    steps_of(protocol.epochs, samples, protocol.batch_size)
    return Batches(
        learned,
        batch_size=protocol.batch_size,
        generator=generator_of(run.seed, number),
        epoch_samples=samples,
        augmentation=experiments.augmentation(experiment, protocol),
    )


def batches_of(task: Task, run: Run, size: int = 100) -> Iterator[tuple[Tensor, Tensor]]:
    """All training samples as they are, with labels relative to the task's first."""
    for images, labels in zip(task.train_images.split(size), task.train_labels.split(size), strict=True):
        yield standard(images, task, run.machine), labels - task.classes[0]


def outputs_of(task: Task) -> Callable[[Tensor], Tensor]:
    """The network's outputs for a task's own classes."""
    return lambda outputs: outputs[:, task.outputs]


def _mixed(seed: int, number: int, purpose: int) -> int:
    """A seed for one purpose in one task: different ones for all seeds up to a million tasks."""
    return (seed * 1_000_003 + number) * 3 + purpose


def seed_task(seed: int, number: int) -> None:
    """Decides dropout in a task."""
    torch.manual_seed(_mixed(seed, number, 1))


def generator_of(seed: int, number: int) -> torch.Generator:
    """Decides order, crops and flips in a task."""
    return torch.Generator().manual_seed(_mixed(seed, number, 2))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
