"""Numbers of tasks learned in a row: demonstration, experiments, language model, and race."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..continual import race as races
from ..continual import report
from ..continual.experiments import EXPERIMENTS
from ..continual.metrics import Accuracy, average_accuracy, forgetting, forward_transfer
from ..continual.store import Record, Store
from ..tables import markdown, mean_and_error, percent, with_error
from . import provenance
from .provenance import RESULTS

METHODS = {
    "npc": "**NPC**",
    "cpc": "CPC",
    "ewc": "EWC",
    "mas": "MAS",
    "si": "SI",
    "ssl": "SSL",
    "sgd": "SGD with L2",
    "joint": "all tasks at once",
    "single": "a new network for each task",
}
SEQUENCES = {"imnist": "iMNIST", "ifashion": "iFashion-MNIST", "icifar100": "iCIFAR100, 5 tasks"}
ANCHORED = ("ewc", "mas", "si", "ssl")
PAPER = "NPC in the paper, at its size (not run here)"
_BOUNDS = ("joint", "single")
# Changed settings in words.
_SETTINGS = {
    "batch_size=16": "batch size 16",
    "batch_size=128": "batch size 128",
    "channels=[64, 128, 128]": "twice the channels",
    "npc.sigma=erf": "sigma: erf",
    "npc.survive=0.2": "a fifth of the importance survives a task",
    "npc.survive=0.8": "four fifths survive",
    "npc.beta=0.2": "`beta=0.2`",
    "npc.output=all": "output layer normalized over all outputs",
    "npc.output=free": "output layer not protected",
    "npc.measure=before pooling": "measured before pooling (the same sum, up to rounding)",
}


def mean(values: Sequence[float]) -> str:
    """The mean in percent, without its error."""
    return f"{100 * mean_and_error(values)[0]:.1f}"


@dataclass(frozen=True)
class Outcome:
    """The accuracies of one method: a table for each seed."""

    tables: Sequence[Accuracy]

    @property
    def average(self) -> list[float]:
        """Mean accuracy of all tasks after the last one, by seed."""
        return [average_accuracy(table) for table in self.tables]

    @property
    def forgetting(self) -> list[float]:
        """Mean drop from the best accuracy, by seed."""
        return [forgetting(table) for table in self.tables]

    @property
    def last(self) -> list[float]:
        """Accuracy on the last task, by seed."""
        return [float(table[-1][-1] or 0) for table in self.tables]


# ------------------------------------------------------------------------------------------------------- demonstration


@cache
def demos() -> dict[str, dict[str, Any]]:
    """The recorded demonstrations by learning rate, the largest first."""
    found = {}
    for path in RESULTS.glob("demo*/results.json"):
        recorded = json.loads(path.read_text())
        words = shlex.split(recorded["command"])
        found[words[words.index("--lr") + 1] if "--lr" in words else "0.1"] = {**recorded, "folder": path.parent.name}
    return dict(sorted(found.items(), key=lambda item: -float(item[0])))


def demo(lr: str, method: str) -> Outcome:
    """The outcome of one of the demonstration's methods at a learning rate."""
    return Outcome([run["accuracy"] for run in demos()[lr]["runs"][method]])


def demo_table() -> str:
    """Percentages of the demonstration after its last task. The README has this table, too."""
    first, *others = demos()
    rows = []
    for method in demos()[first]["runs"]:
        outcome = demo(first, method)
        averages = [demo(lr, method).average for lr in (first, *others)]
        rows.append([method, *map(percent, [averages[0], outcome.forgetting, outcome.last, *averages[1:]])])
    rates = [f"average, lr {lr}" for lr in others]
    return markdown([f"in %, lr {first}", "average", "forgetting", "last task", *rates], rows)


def demo_forgetting() -> str:
    """Forgetting in the demonstration, by learning rate."""
    rates = list(demos())
    methods = demos()[rates[0]]["runs"]
    rows = [[method, *(percent(demo(lr, method).forgetting) for lr in rates)] for method in methods]
    return markdown(["", *(f"lr {lr}" for lr in rates)], rows)


def demo_sources() -> str:
    """The commands, machine and files of the demonstrations."""
    recorded = demos().values()
    lines = [f"* `{run['command']}`: {provenance.link(run['folder'] + '/results.md')}" for run in recorded]
    where = provenance.machine(run["environment"] for run in recorded)
    return "\n".join([f"Measured on {where}, by", "", *lines])


# --------------------------------------------------------------------------------------------------------- experiments


@cache
def _runs(experiment: str) -> dict[report.Label, list[Record]]:
    records = Store(RESULTS / "continual" / "runs").records()
    return report.grouped([r for r in records if (r.experiment, r.size, r.finished) == (experiment, "small", True)])


def records(experiment: str, method: str, changes: str = "") -> list[Record]:
    """The runs of a method, one for each seed, with the settings that a search chose, or with changed ones."""
    return _runs(experiment)[report.Label(method, changes)]


def of(experiment: str, method: str, changes: str = "") -> Outcome:
    """The outcome of a method."""
    return Outcome([record.accuracy for record in records(experiment, method, changes)])


def average_table() -> str:
    """Average accuracy of all methods on the three sequences."""
    rows = [
        [name, *(percent(of(experiment, method).average) for experiment in SEQUENCES)]
        for method, name in METHODS.items()
    ]
    published = [EXPERIMENTS[experiment].published.get("npc") for experiment in SEQUENCES]
    rows.append([PAPER, *("" if share is None else f"{100 * share:.2f}" for share in published)])
    return markdown(["", *SEQUENCES.values()], rows)


def forgetting_table() -> str:
    """Forgetting of all methods on the three sequences."""
    rows = [
        [name, *(percent(of(experiment, method).forgetting) for experiment in SEQUENCES)]
        for method, name in METHODS.items()
        if method not in _BOUNDS
    ]
    return markdown(["", *SEQUENCES.values()], rows)


def difference(experiment: str, method: str, other: str) -> str:
    """How many points a method's average accuracy is above another's."""
    means = [mean_and_error(of(experiment, name).average)[0] for name in (method, other)]
    return f"{100 * (means[0] - means[1]):.1f}"


def transfer(experiment: str, method: str) -> list[float]:
    """Forward transfer by seed: the gain of all tasks but the first over a new network, when they are learned."""
    single = {record.seed: record for record in records(experiment, "single")}
    return [forward_transfer(r.accuracy, single[r.seed].accuracy) for r in records(experiment, method)]


def settings_table() -> str:
    """NPC on iFashion-MNIST with changed settings, the best first."""
    groups = {label.changes: Outcome([r.accuracy for r in g]) for label, g in _runs("ifashion").items()}
    changed = {label.changes for label in _runs("ifashion") if label.changes}
    chosen = of("ifashion", "npc")
    rows = [["**as chosen by the search**", percent(chosen.average), percent(chosen.forgetting)]]
    for changes in sorted(changed, key=lambda changes: -np.mean(groups[changes].average)):
        outcome = groups[changes]
        rows.append([_SETTINGS[changes], percent(outcome.average), percent(outcome.forgetting)])
    return markdown(["NPC on iFashion-MNIST", "average accuracy", "forgetting"], rows)


def settings_source() -> str:
    """The machine of the runs with changed settings."""
    groups = [group for label, group in _runs("ifashion").items() if label.changes]
    where = provenance.machine(w for group in groups for record in group for w in record.environments)
    return f"Measured on {where}: {provenance.link('continual/report.md')}."


def collapsed(experiment: str, method: str) -> list[int]:
    """The seeds with which the accuracy on the last task is that of chance."""
    chance = 1 / EXPERIMENTS[experiment].classes_per_task
    outcomes = zip(records(experiment, method), of(experiment, method).last, strict=True)
    return [record.seed for record, last in outcomes if last <= chance]


def without_collapsed(experiment: str, method: str) -> list[float]:
    """The average accuracies of the other seeds."""
    gone = collapsed(experiment, method)
    outcomes = zip(records(experiment, method), of(experiment, method).average, strict=True)
    return [average for record, average in outcomes if record.seed not in gone]


def protocol(experiment: str) -> dict[str, Any]:
    """The protocol of an experiment's runs."""
    return records(experiment, "npc")[0].protocol


def hyperparameters(experiment: str, method: str) -> dict[str, Any]:
    """The settings that a method ran with."""
    return records(experiment, method)[0].hyperparameters


def tried(*methods: str) -> str:
    """The range of how many configurations the searches tried of each method, not counting those that diverged."""
    counts = []
    for experiment in SEQUENCES:
        recorded = json.loads((RESULTS / "continual" / "search" / f"{experiment}-small.json").read_text())["methods"]
        for method in methods:
            scores = [configuration["validation accuracy"] for configuration in recorded[method]["tried"]]
            counts.append(sum(score is not None for score in scores))
    return f"{min(counts)} to {max(counts)}"


def experiment_sources() -> str:
    """The commands and the machine of the experiments."""
    lines = []
    for experiment in SEQUENCES:
        methods = dict.fromkeys(label.method for label in _runs(experiment) if not label.changes)
        lines.append("* " + report.command("run", experiment, "small", methods))
    where = [
        w for experiment in SEQUENCES for group in _runs(experiment).values() for r in group for w in r.environments
    ]
    return "\n".join([f"Measured on {provenance.machine(where)}, by", "", *lines])


def activation_table() -> str:
    """The change of hidden activations: of all neurons, and of the most and the least important tenth."""
    rows = []
    for method, name in (("npc", "NPC"), ("sgd", "SGD")):
        columns = zip(*map(report.mean_changes, records("activation", method)), strict=True)
        rows.append([name, *(with_error(column, 3) for column in columns)])
    rows.append(["NPC in the paper, its size and formula", *report.PUBLISHED_CHANGES["npc"]])
    return markdown(["", "all hidden neurons", "most important tenth", "least important tenth"], rows)


def activation_source() -> str:
    """The command and the machine of the activations."""
    where = [w for method in ("npc", "sgd") for record in records("activation", method) for w in record.environments]
    command = report.command("run", "activation", "small", ("npc", "sgd")).strip("`")
    return provenance.source(command, where, "continual/report.md")


# ------------------------------------------------------------------------------------------------------ language model


@cache
def language_model() -> dict[str, Any]:
    """The recorded numbers of the language model."""
    recorded: dict[str, Any] = json.loads((RESULTS / "language_model" / "results.json").read_text())
    return recorded


def perplexities() -> dict[str, tuple[list[float], list[float], list[float]]]:
    """By setting: perplexity on prose before and after the code was learned, and on code afterwards, by seed."""
    curves: dict[str, list[Any]] = {}
    for run in language_model()["runs"]:
        curves.setdefault(_named(run["setting"]), []).append(run["curve"])
    return {
        name: ([c[0][0] for c in repeated], [c[-1][0] for c in repeated], [c[-1][1] for c in repeated])
        for name, repeated in curves.items()
    }


def _named(setting: Mapping[str, Any]) -> str:
    beta = "" if setting["beta"] is None else f", β = {setting['beta']:g}"
    always = ", protected from the first step" if setting["protect_always"] else ""
    return f"{setting['method']}, lr {setting['lr']:g}{beta}{always}"


def perplexity_table() -> str:
    """Perplexity per byte by setting."""
    rows = [[name, *(with_error(values, 2) for values in columns)] for name, columns in perplexities().items()]
    return markdown(["", "prose before", "prose after", "code after"], rows)


def language_model_source() -> str:
    """The command and the machine of the language model."""
    recorded = language_model()
    return provenance.source(recorded["command"], [recorded["environment"]], "language_model/results.md")


# ---------------------------------------------------------------------------------------------------------------- race

_RACE = "continual/race-ifashion-128-512-256"
_ENTRIES = {
    "npc": 'NPC, `skip_gradients="layers"`',
    "skip_frozen=rows": 'NPC, `skip_gradients="rows"`',
    "sgd": "SGD",
}


@cache
def race() -> dict[str, Any]:
    """The recorded race, with its entries named as they are today."""
    recorded: dict[str, Any] = json.loads((RESULTS / f"{_RACE}.json").read_text())
    return {**recorded, "entries": {name: recorded["entries"][old] for old, name in _ENTRIES.items()}}


def race_table() -> str:
    """Total times, times of each task relative to SGD's, skipped gradients and accuracy."""
    return races.table(race())


def race_steps() -> str:
    """Steps of a task in the race, the last smaller batch of each epoch included."""
    protocol = race()["protocol"]
    return str(protocol["epochs"] * -(-protocol["epoch_samples"] // protocol["batch_size"]))


def race_source() -> str:
    """The command and the machine of the race."""
    return provenance.source(race()["command"], [race()["environment"]], f"{_RACE}.md", f"{_RACE}.json")
