"""The experiments as a program: `python -m bench.continual run|search|race|report|reproduce --help`."""

from __future__ import annotations

import argparse
import ast
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from npc_ext._names import close_to

from .. import command_line
from ..arguments import existing_folder, output_folder
from ..networks import cnn
from . import experiments, methods, metrics, search
from .experiments import EXPERIMENTS, SIZES, Protocol
from .methods import METHODS
from .plan import PLANS
from .pool import Outcome, parallel
from .race import race
from .runs import WATCHED, Run, execute
from .store import ALPHA_UNIT, STORE, Record, Store, StoreError
from .training import Machine


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    parser = command_line_parser()
    options = parser.parse_args(arguments)
    if options.command == "report":
        from . import report

        try:
            print(report.write(Store(options.store), options.out))
        except StoreError as error:
            parser.error(str(error))
        return 0
    try:
        if options.command == "reproduce":
            return _reproduce(options)
        runs = _runs(options)
        entries = _entries(options, runs) if options.command == "race" else {}
        present = _datasets(options)  # last, because it may download
    except ValueError as error:
        parser.error(str(error))
    runs, entries = [_with(present, run) for run in runs], {name: _with(present, run) for name, run in entries.items()}
    if options.command == "race":
        print(race(entries, options.out, command_line("bench.continual", arguments)))
        return 0
    return _search(options, runs) if options.command == "search" else _run(options, runs)


def _reproduce(options: argparse.Namespace) -> int:
    """Prints and runs each command of the plan. A command that fails does not stop the others."""
    _machine(options)
    shared = [f"--{name}={getattr(options, name)}" for name in ("size", "device", "jobs", "store")]
    shared += [] if options.data is None else [f"--data={options.data}"]
    shared += [
        f"--{name}"
        for name in ("bf16", "tf32", "channels-last", "cuda-graph")
        if getattr(options, name.replace("-", "_"))
    ]
    status = 0
    for command in PLANS[options.size]:
        command = [*command, *shared]
        print("python -m bench.continual", shlex.join(command), flush=True)
        if options.dry:
            continue
        try:
            status |= main(command)
        except SystemExit as refused:  # for example because a data set cannot be downloaded
            status |= int(refused.code or 0)
    return status


def _run(options: argparse.Namespace, runs: list[Run]) -> int:
    store = Store(options.store)
    outcomes = parallel(execute, [(run, store) for run in runs], options.jobs, on_outcome=_show)
    return _status(outcomes)


def _search(options: argparse.Namespace, runs: list[Run]) -> int:
    store = Store(options.store / "validation")
    by_method = groupby(runs, key=lambda run: run.method)
    work = [(list(repeated), store, options.budget, options.results) for _, repeated in by_method]
    return _status(parallel(search.search, work, options.jobs, on_outcome=_show))


def _show(name: str, outcome: Outcome) -> None:
    if isinstance(outcome, Record):
        seconds = sum(outcome.seconds) + sum(outcome.consolidation_seconds)
        text = f"{name}: average accuracy {metrics.average_accuracy(outcome.accuracy):.2%}, {seconds:.1f} s"
    elif isinstance(outcome, BaseException):
        text = f"{name}: failed: {type(outcome).__name__}: {outcome}"
    else:
        text = f"{name}: {outcome}"
    tqdm.write(text, file=sys.stderr if isinstance(outcome, BaseException) else sys.stdout)


def _status(outcomes: Sequence[Outcome]) -> int:
    failed = sum(isinstance(outcome, BaseException) for outcome in outcomes)
    if failed:
        print(f"{failed} of {len(outcomes)} failed; the same command does only what is missing", file=sys.stderr)
    return 1 if failed else 0


def _machine(options: argparse.Namespace) -> Machine:
    """Where and how to compute. Raises ValueError if that is impossible here, or if an option's number is too small."""
    for name in ("seeds", "jobs", "budget"):
        if getattr(options, name, 1) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; expected at least 1")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device is {device}; expected cpu, cuda, or cuda:1 and so on") from error
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if named.type == "cuda" and (named.index or 0) >= gpus:
        raise ValueError(f"--device is {device}, but PyTorch sees {f'only {gpus}' if gpus else 'no'} CUDA device")
    if not device.startswith("cuda"):
        for name in ("tf32", "cuda_graph"):
            if getattr(options, name):
                raise ValueError(f"--{name.replace('_', '-')} is for CUDA devices, but the device is {device}")
    return Machine(device, options.bf16, options.tf32, options.channels_last, options.cuda_graph)


def _runs(options: argparse.Namespace) -> list[Run]:
    """All runs that the options ask for, method by method and seed by seed, but without data sets.

    Raises:
        ValueError: an option is unknown or invalid; the message is one sentence.
    """
    machine = _machine(options)
    protocol: Protocol = getattr(EXPERIMENTS[options.experiment], options.size)
    if options.command == "search":
        protocol = replace(protocol, validation=True, tasks=options.tasks or protocol.tasks)
    names = _methods(options)
    hyperparameters = {
        name: methods.defaults(name, options.experiment, options.size, tuned=options.command != "search")
        for name in names
    }
    for assignment in options.set:
        protocol = _assign("--set", assignment, protocol, hyperparameters)
    for name in names:
        _check_settings(name, hyperparameters[name])
    folder = None if options.data is None else str(options.data)
    return [
        Run(options.experiment, options.size, name, seed, protocol, hyperparameters[name], machine, folder)
        for name in names
        for seed in range(options.seeds)
    ]


def _datasets(options: argparse.Namespace) -> tuple[str, ...]:
    """The data sets of the experiment that are there or can be downloaded. Raises ValueError if they do not suffice."""
    experiment = EXPERIMENTS[options.experiment]
    present, missing = experiments.available(experiment, None if options.data is None else str(options.data))
    if not present or (missing and experiment.classes_per_task):
        raise ValueError(next(iter(missing.values())))
    for name, why in missing.items():
        print(f"{options.experiment}: {name} is left out: {why}", file=sys.stderr)
    return present


def _with(datasets: tuple[str, ...], run: Run) -> Run:
    return replace(run, protocol=replace(run.protocol, datasets=datasets))


def _methods(options: argparse.Namespace) -> list[str]:
    """The methods by name. Raises ValueError if one is unknown, named twice, or unfit for the command."""
    names = [name.strip() for name in options.methods.split(",")]
    for name in names:
        if name not in METHODS:
            raise ValueError(f"--methods has {name!r}, which is no method; {close_to(name, METHODS)}")
        if names.count(name) > 1:
            raise ValueError(f"--methods names {name!r} more than once")
        if options.experiment == "activation" and name not in WATCHED:
            raise ValueError(f"--methods has {name!r}; the experiment activation compares {' and '.join(WATCHED)} only")
        if name in methods.BOUNDS and options.command == "race":
            raise ValueError(f"--methods has {name!r}, which does not learn tasks in a row: it is no rival in time")
        if name in methods.BOUNDS and options.command == "search":
            raise ValueError(f"--methods has {name!r}, which is a bound: it has nothing to search")
    return names


def _check_settings(method: str, hyperparameters: dict[str, Any]) -> None:
    """Raises ValueError if the optimizer refuses its hyperparameters. Builds it on a small network with all layers."""
    try:
        METHODS[method].optimizer(cnn(1, 4, (2, 2), 2, 2), hyperparameters, 1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{method} does not take these settings: {error}") from error


def _entries(options: argparse.Namespace, runs: list[Run]) -> dict[str, Run]:
    """The runs of a race, by name: each method, followed by the same with each change of --also."""
    entries = {}
    for run in runs:
        entries[run.method] = run
        for assignment in options.also:
            changed = {run.method: dict(run.hyperparameters)}
            if assignment.startswith(f"{run.method}."):
                _assign("--also", assignment, run.protocol, changed)
                _check_settings(run.method, changed[run.method])
                entries[assignment.removeprefix(f"{run.method}.")] = replace(run, hyperparameters=changed[run.method])
    if len(entries) != len(runs) + len(options.also):
        raise ValueError(f"--also has {' '.join(options.also)}; expected settings of --methods {options.methods}")
    return entries


def _assign(option: str, assignment: str, protocol: Protocol, hyperparameters: dict[str, dict[str, Any]]) -> Protocol:
    """Applies one value of --set or --also: changes a hyperparameter in place, or returns a changed protocol."""
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ValueError(f"{option} has {assignment!r}; expected name=value or method.name=value")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    method, dot, name = key.rpartition(".")
    if not dot:
        return _with_field(protocol, key, value)
    if method not in METHODS:
        raise ValueError(f"{option} has {key!r}, but {method!r} is no method; {close_to(method, METHODS)}")
    if method not in hyperparameters:
        raise ValueError(f"{option} has {key!r}, but --methods has {', '.join(hyperparameters)} only")
    known = {**METHODS[method].paper, **METHODS[method].more}
    known.pop(ALPHA_UNIT, None)
    if name not in known:
        raise ValueError(f"{option} has {key!r}, which {method} does not have; {close_to(name, known)}")
    kinds: dict[type, tuple[Any, str]] = {str: (str, "a word"), bool: (bool, "True or False")}
    kind, expected = kinds.get(type(known[name]), ((int, float), "a number"))
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{option} has {assignment!r}; expected {expected}")
    hyperparameters[method] = methods.with_choice(hyperparameters[method], name, value)
    return protocol


def _with_field(protocol: Protocol, name: str, value: Any) -> Protocol:
    known = [field.name for field in fields(Protocol) if field.name not in ("datasets", "validation", "batches")]
    if name not in known:
        raise ValueError(
            f"--set has {name!r}, which the protocol does not have; {close_to(name, known)} (settings of a method are "
            "written method.name)"
        )
    value = tuple(value) if isinstance(value, list) else value
    before = getattr(protocol, name)
    if type(value) is not type(before):
        raise ValueError(f"--set has {name}={value!r}; expected a value such as {before!r}")
    return replace(protocol, **{name: value})


def _data_folder(text: str) -> Path:
    """A folder of data sets. It is not made, because a misspelled name would download everything once more."""
    try:
        return existing_folder(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{error}; correct it (--data or NPC_DATA names it), or make the folder to have the data sets downloaded "
            "there"
        ) from error


def command_line_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.continual", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="learn tasks in a row and store the results")
    look = commands.add_parser("search", help="tune hyperparameters on held-out training samples")
    all_of_it = commands.add_parser("reproduce", help="run all searches and runs of the published results")
    tell = commands.add_parser("report", help="write tables and figures of the stored runs")
    rivals = commands.add_parser("race", help="time whole runs in turns; the last one is the reference")
    for command in (run, look, rivals):
        command.add_argument("--experiment", required=True, choices=EXPERIMENTS, help="what to learn")
        command.add_argument("--methods", default="npc,sgd", help=f"comma-separated, of {', '.join(METHODS)}")
        command.add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="NAME=VALUE",
            help="other settings: npc.delta=0.999 of a method, batch_size=64 of the protocol",
        )
    for command in (run, look, rivals, all_of_it):
        command.add_argument("--size", default="small", choices=SIZES, help="small: one core; paper: a GPU")
        command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
        command.add_argument("--jobs", type=int, default=1, help="number of processes (default 1)")
        command.add_argument(
            "--data",
            type=_data_folder,
            default=os.environ.get("NPC_DATA") or None,
            help="folder of the data sets, to which missing ones are downloaded (default: the one that NPC_DATA names, "
            "or else a cache folder)",
        )
        command.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
        command.add_argument("--tf32", action="store_true", help="multiply float32 in TF32 (CUDA)")
        command.add_argument("--channels-last", action="store_true", help="images and weights with channels last")
        command.add_argument("--cuda-graph", action="store_true", help="replay the step as a CUDA graph (CUDA)")
    all_of_it.add_argument("--dry", action="store_true", help="only print the commands")
    run.add_argument("--seeds", type=int, default=3, help="repetitions (default 3)")
    look.add_argument("--seeds", type=int, default=3, help="repetitions of the best three (default 3); others get one")
    look.add_argument("--tasks", type=int, default=0, help="search on the first tasks only (default: all)")
    look.add_argument(
        "--budget", type=int, default=12, help="configurations that do not diverge, in a walk (default 12)"
    )
    look.add_argument("--results", type=output_folder, default=methods.SEARCH, help="folder of the search's record")
    rivals.add_argument(
        "--also", nargs="+", default=[], metavar="METHOD.NAME=VALUE", help="also run the method with this change"
    )
    rivals.set_defaults(seeds=1)
    for command in (rivals, tell):
        command.add_argument(
            "--out", type=output_folder, default=Path("bench/results/continual"), help="folder of the output"
        )
    for command in (run, look, all_of_it):
        command.add_argument("--store", type=output_folder, default=STORE, help="folder of the stored runs")
    tell.add_argument("--store", type=existing_folder, default=str(STORE), help="folder of the stored runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
