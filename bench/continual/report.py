"""The report: tables and figures of the stored runs, and a list of what was not run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..tables import markdown, percent, save, with_error
from . import figures
from .experiments import EXPERIMENTS, SIZES, Experiment
from .methods import BOUNDS, METHODS, SEARCH, defaults, searched
from .metrics import average_accuracy, backward_transfer, forgetting, forward_transfer
from .store import ALPHA_UNIT, Record, Store, completed, in_units_of_lr

_WITHOUT = "-"
_ABOUT_ALPHA = (
    "alpha is in units of lr. Where a run or a search recorded it as a learning rate, it is divided by lr here: "
    "0.5 (0.05 / lr)."
)
_FIGURES = {
    "icifar100": "Figure 2",
    "imnist": "Figure 3",
    "ifashion": "Figure 3",
    "activation": "Figure 4",
    "hetero": "Figure 5",
}
# The paper's means of Figure 4: all neurons, the most important tenth, the least important tenth.
PUBLISHED_CHANGES = {"npc": ("0.383", "0.094", "0.667")}


def write(store: Store, out: Path) -> str:
    """Writes report.md and the figures to a folder and returns the text."""
    stored = list(store.records())
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Learning tasks in a row", _ABOUT_ALPHA]
    missing: list[str] = []
    for name, experiment in EXPERIMENTS.items():
        for size in SIZES:
            records = [record for record in stored if (record.experiment, record.size) == (name, size)]
            missing += _missing(name, size, records)
            if any(record.finished for record in records):
                parts += _section(name, experiment, size, [record for record in records if record.finished], out)
    parts += _searches(SEARCH)
    parts += ["## Not run", "\n".join(f"* {line}" for line in missing) or "Nothing is missing."]
    text = "\n\n".join(parts) + "\n"
    (out / "report.md").write_text(text)
    return text


def _section(name: str, experiment: Experiment, size: str, records: list[Record], out: Path) -> Iterator[str]:
    """Yields the paragraphs of one experiment, and writes its figures."""
    yield f"## {experiment.title} ({name}, {size})"
    groups = grouped(records)
    standard = {label.method: repeated for label, repeated in groups.items() if not label.changes}
    others = {label: repeated for label, repeated in groups.items() if label.changes}
    if standard:
        protocol = next(iter(standard.values()))[0].protocol
        yield (
            f"{protocol['epochs']} epochs a task, batch size {protocol['batch_size']}, channels "
            f"{', '.join(map(str, protocol['channels']))}, hidden {protocol['hidden']}, images shrunk by "
            f"{protocol['shrink']}; accuracy in percent after the last task, mean ± standard error over seeds."
            + _notes(protocol, {method: repeated[0].settings["method"] for method, repeated in standard.items()})
        )
        yield command("run", name, size, standard)
        if name == "activation":
            yield _changes(standard)
            figure = figures.activation(standard)
            yield _saved({"activation": figure}, f"{name}-{size}", out, _FIGURES[name])
        else:
            yield accuracy_table(standard, experiment.published)
            tables = {method: [record.accuracy for record in repeated] for method, repeated in standard.items()}
            drawn = {"average": figures.average(tables)}
            if any(method.split()[0] not in BOUNDS for method in standard):
                drawn["per-task"] = figures.per_task(tables, next(iter(standard.values()))[0].tasks)
            yield _saved(drawn, f"{name}-{size}", out, _FIGURES.get(name, "Figure"))
    if others:
        yield "### Other settings"
        yield _ablations(others, standard)
    yield _hyperparameters(groups)


def _notes(protocol: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Sentences about smaller batches at the end of epochs and about explicit anchors, given the settings by method."""
    notes = ""
    if completed(protocol)["batches"] != "whole":
        notes += " The last batch of each epoch was smaller than the others; runs now train in whole batches."
    explicit = [
        method
        for method, chosen in settings.items()
        if chosen and "implicit" in METHODS[method.split()[0]].paper and not chosen.get("implicit", False)
    ]
    if explicit:
        notes += f" The anchors of {', '.join(explicit)} pulled explicitly (implicit=False)."
    return notes


def _searches(folder: Path) -> Iterator[str]:
    """Yields a table for each recorded search: number of configurations, range of their scores, and the best."""
    for path in sorted(folder.glob("*.json")):
        recorded = json.loads(path.read_text())
        rows = []
        for method in sorted(recorded["methods"], key=list(METHODS).index):
            entry = recorded["methods"][method]
            scores = [tried["validation accuracy"] for tried in entry["tried"]]
            finite = [score for score in scores if score is not None]
            best = _listed(entry["best"])
            row = [method, len(scores), len(scores) - len(finite), _WITHOUT, _WITHOUT]
            if finite:
                chosen = next(tried for tried in entry["tried"] if tried["settings"] == entry["best"])
                row[3:] = (
                    f"{100 * min(finite):.1f} to {100 * max(finite):.1f}",
                    f"{100 * chosen['validation accuracy']:.1f} ({chosen['seeds']})",
                )
            rows.append([*map(str, row), best])
        protocol = next(iter(recorded["methods"].values()))["protocol"]
        yield f"## Search on {recorded['experiment']}, {recorded['size']}"
        yield (
            f"Average accuracy in percent on samples held out of the training set, after {protocol['tasks'] or 'all'} "
            f"tasks: of all configurations with one seed, and of the chosen one with so many. All are in {path.name}."
            + _notes(protocol, {method: entry["best"] for method, entry in recorded["methods"].items()})
        )
        limit = ["--tasks", str(protocol["tasks"])] if protocol["tasks"] else []
        yield command("search", recorded["experiment"], recorded["size"], recorded["methods"], *limit)
        yield markdown(["", "configurations", "diverged", "tried", "chosen (seeds)", "hyperparameters"], rows)


def command(verb: str, experiment: str, size: str, methods: Iterable[str], *more: str) -> str:
    """The command that repeats it."""
    options = ["--experiment", experiment, "--size", size, "--methods", ",".join(methods), *more]
    return f"`{' '.join(['python -m bench.continual', verb, *options])}`"


def _saved(drawn: Mapping[str, Any], prefix: str, out: Path, title: str) -> str:
    for kind, figure in drawn.items():
        save(figure, out / f"{prefix}-{kind}")
    return "\n".join(f"![{title}, {kind}]({prefix}-{kind}.svg)" for kind in drawn)


class Label(NamedTuple):
    """A method (with its precision unless that is float32), and those of its settings that are not the defaults."""

    method: str
    changes: str


def grouped(records: Sequence[Record]) -> dict[Label, list[Record]]:
    """Groups runs that differ in their seed only. Methods are in their usual order."""
    most = max((tuple(record.protocol["datasets"]) for record in records), key=len)
    batches = "whole" if any(record.protocol["batches"] == "whole" for record in records) else "cut"
    groups: dict[Label, list[Record]] = {}
    for record in sorted(records, key=lambda r: (list(METHODS).index(r.method), r.seed)):
        precision = record.settings["precision"]
        method = record.method if precision == "float32" else f"{record.method} ({precision})"
        groups.setdefault(Label(method, ", ".join(_changes_of(record, most, batches))), []).append(record)
    return groups


def _changes_of(record: Record, datasets: Sequence[str], batches: str) -> Iterator[str]:
    protocol = asdict(replace(getattr(EXPERIMENTS[record.experiment], record.size), datasets=tuple(datasets)))
    for prefix, settings, usual in (
        ("", record.protocol, protocol | {"batches": batches}),
        (f"{record.method}.", record.hyperparameters, defaults(record.method, record.experiment, record.size)),
    ):
        for key, value in settings.items():
            expected = usual.get(key)
            if value != (list(expected) if isinstance(expected, tuple) else expected) and value is not None:
                yield f"{prefix}{key}={value}"
        if usual.get("implicit", False) and "implicit" not in settings:
            yield f"{prefix}implicit=False"


def accuracy_table(groups: Mapping[str, Sequence[Record]], published: Mapping[str, float]) -> str:
    """A Markdown table over seeds: accuracy of each task after the last one, and all metrics."""
    tasks = next(iter(groups.values()))[0].tasks
    single = {record.seed: record for method in groups if method.startswith("single") for record in groups[method]}
    header = ["", *tasks, "average", "forgetting", "backward transfer", "forward transfer", "seeds"]
    rows = []
    if published:
        header.append("average in the paper, its full size")
    for method, repeated in groups.items():
        tables = [record.accuracy for record in repeated]
        in_a_row = method.split()[0] not in BOUNDS and len(tasks) > 1
        compared = [(r.accuracy, single[r.seed].accuracy) for r in repeated if r.seed in single]
        row = [
            method,
            *(percent([float(table[-1][k] or 0) for table in tables]) for k in range(len(tasks))),
            f"**{percent(list(map(average_accuracy, tables)))}**",
            percent(list(map(forgetting, tables))) if in_a_row else _WITHOUT,
            percent(list(map(backward_transfer, tables))) if in_a_row else _WITHOUT,
            percent([forward_transfer(*pair) for pair in compared]) if in_a_row and compared else _WITHOUT,
            _seeds(repeated),
        ]
        if published:
            number = published.get(method.split()[0])
            row.append(_WITHOUT if number is None else f"{100 * number:.2f}")
        rows.append(row)
    return markdown(header, rows)


def _seeds(repeated: Sequence[Record]) -> str:
    diverged = sum(record.diverged_in is not None for record in repeated)
    return f"{len(repeated)}" + (f" ({diverged} diverged)" if diverged else "")


def _changes(groups: Mapping[str, Sequence[Record]]) -> str:
    """The means of Figure 4: change of all neurons, of the most important tenth, and of the least important tenth."""
    groups_of_neurons = ("all neurons", "most important tenth", "least important tenth")
    rows = []
    for method, repeated in groups.items():
        columns = zip(*(mean_changes(record) for record in repeated), strict=True)
        cells = [with_error(column, 3) for column in columns]
        dead = [sum(change is None for change in record.extra["change"]) for record in repeated]
        paper = " / ".join(PUBLISHED_CHANGES.get(method.split()[0], (_WITHOUT,)))
        rows.append([method, *cells, f"{np.mean(dead):.1f}", _seeds(repeated), paper])
    return markdown(["", *groups_of_neurons, "never active", "seeds", "in the paper"], rows)


def mean_changes(record: Record) -> tuple[float, float, float]:
    """The mean change of all neurons, of the most important tenth, and of the least important tenth."""
    pairs = zip(record.extra["importance"], record.extra["change"], strict=True)
    by_importance = [change for _, change in sorted((i, c) for i, c in pairs if c is not None)]
    tenth = max(1, len(by_importance) // 10)
    return float(np.mean(by_importance)), float(np.mean(by_importance[-tenth:])), float(np.mean(by_importance[:tenth]))


def _ablations(others: Mapping[Label, Sequence[Record]], standard: Mapping[str, Any]) -> str:
    header = ["method", "setting", "average", "forgetting", "seeds"]
    rows = []
    for label, repeated in [*[(Label(m, ""), r) for m, r in standard.items()], *others.items()]:
        if not label.changes and label.method not in {other.method for other in others}:
            continue
        tables = [record.accuracy for record in repeated]
        lost = _WITHOUT
        if label.method.split()[0] not in BOUNDS and len(tables[0]) > 1:
            lost = percent(list(map(forgetting, tables)))
        average = percent(list(map(average_accuracy, tables)))
        rows.append([label.method, label.changes or "as above", average, lost, _seeds(repeated)])
    return markdown(header, sorted(rows, key=lambda row: (row[0], row[1] != "as above")))


def _hyperparameters(groups: Mapping[Label, Sequence[Record]]) -> str:
    lines = {}
    for label, repeated in groups.items():
        if not label.changes:
            lines[label.method] = _listed(repeated[0].settings["method"])
            _, batches = searched(repeated[0].method, repeated[0].experiment, repeated[0].size)
            if (repeated[0].protocol["batches"], batches) == ("whole", "cut"):
                lines[label.method] += " (from a search in which the last batch of each epoch was smaller)"
    processors = sorted(
        {where["processor"] for records in groups.values() for r in records for where in r.environments}
    )
    devices = sorted({where["device"] for records in groups.values() for r in records for where in r.environments})
    return "\n".join(
        [*(f"* {method}: {text}" for method, text in lines.items()), f"* on {', '.join(devices + processors)}"]
    )


def _listed(recorded: Mapping[str, Any]) -> str:
    """Hyperparameters as text, with alpha in units of lr."""
    hyperparameters = in_units_of_lr(recorded)
    hyperparameters.pop(ALPHA_UNIT, None)
    note = {} if ALPHA_UNIT in recorded else {"alpha": f" ({recorded.get('alpha')} / lr)"}
    return ", ".join(
        f"{name} {value}{note.get(name, '')}" for name, value in hyperparameters.items() if value is not None
    )


def _missing(name: str, size: str, records: Sequence[Record]) -> Iterator[str]:
    """Yields a line for everything that was not run at the default settings of an experiment."""
    finished = [record for record in records if record.finished]
    for record in records:
        if not record.finished:
            done = len(record.accuracy)
            yield f"{name}, {size}: {record.method} seed {record.seed} stopped after task {done} of {len(record.tasks)}"
    if not finished:
        yield f"{name}, {size}: not run"
        return
    expected = ("npc", "sgd") if name == "activation" else METHODS
    groups = {label.method: group for label, group in grouped(finished).items() if not label.changes}
    seeds = {method: {record.seed for record in group} for method, group in groups.items()}
    for method, present in seeds.items():
        if absent_seeds := sorted(set().union(*seeds.values()) - present):
            yield f"{name}, {size}: {method} not finished with seed {', '.join(map(str, absent_seeds))}"
    there = {method.split()[0] for method in seeds}
    if absent := [method for method in expected if method not in there]:
        yield f"{name}, {size}: not run with {', '.join(absent)}"
    used = {dataset for record in finished for dataset in record.settings["protocol"]["datasets"]}
    if left_out := [dataset for dataset in EXPERIMENTS[name].datasets if dataset not in used]:
        yield f"{name}, {size}: not run on {', '.join(left_out)}, which was not there"
