"""The experiments as a program: what is stored is what was run, whatever happened on the way."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.continual import datasets, demo, experiments, methods, metrics, report, runs, training
from bench.continual.__main__ import command_line_parser, main
from bench.continual.controls import FallingSGD
from bench.continual.experiments import EXPERIMENTS
from bench.continual.methods import METHODS, defaults
from bench.continual.plan import PLANS
from bench.continual.pool import parallel
from bench.continual.store import Record, Store, StoreError
from bench.continual.tasks import Task, digits, joint, split
from bench.continual.training import Augmentation, Batches, loss_of
from bench.networks import cnn
from npc_ext import NPC

from . import programs

pytest.importorskip("sklearn", reason="scikit-learn, which holds the digits, is not installed")

TINY = ("--experiment", "idigits", "--set", "epochs=1", "epoch_samples=64")
# To be added to TINY: epochs that end within a batch of 16.
UNEVEN = ("epochs=3", "epoch_samples=40")


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """Starts processes as forks of a process that has imported the experiments."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.continual.__main__"])
    return context


def only_record(folder: Path) -> Record:
    (record,) = Store(folder).records()
    return record


def numbers(record: Record) -> tuple[Any, ...]:
    return record.accuracy, record.steps, record.settings, record.tasks


@pytest.fixture
def searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which recorded searches are looked for."""
    for module in (methods, report):
        monkeypatch.setattr(module, "SEARCH", tmp_path)
    return tmp_path


def tiny(method: str, store: Path, *changes: str) -> list[str]:
    """The command of a run on tiny tasks, with one seed."""
    return ["run", *TINY, *changes, "--methods", method, "--seeds", "1", "--store", str(store)]


def search(folder: Path, methods: str, *changes: str, budget: int, seeds: int = 1) -> dict[str, Any]:
    """Runs a search on the first two tasks, and returns its record."""
    options = ["--store", str(folder / "store"), "--results", str(folder), "--tasks", "2", "--budget", str(budget)]
    assert main(["search", *TINY, *changes, "--methods", methods, "--seeds", str(seeds), *options]) == 0
    recorded: dict[str, Any] = json.loads((folder / "idigits-small.json").read_text())
    return recorded


def record_search(folder: Path, method: str, best: dict[str, Any], tried: list[dict[str, Any]]) -> None:
    """Writes the record of a search as `search` does."""
    entry = {"best": best, "protocol": {"batches": "whole", "tasks": 0}, "tried": tried}
    recorded = {"experiment": "idigits", "size": "small", "methods": {method: entry}}
    (folder / "idigits-small.json").write_text(json.dumps(recorded))


def failing(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The function, which raises an error in the call of the given number."""
    calls = itertools.count(1)

    def call(*positional: Any, **named: Any) -> Any:
        if next(calls) == number:
            raise RuntimeError("out of memory")
        return function(*positional, **named)

    return call


@pytest.mark.slow
def test_every_method_learns_all_tasks_and_leaves_one_small_file(tmp_path: Path) -> None:
    assert main(tiny(",".join(METHODS), tmp_path)) == 0
    records = list(Store(tmp_path).records())
    assert {record.method for record in records} == set(METHODS)
    for record in records:
        assert record.finished
        assert record.steps == [4] * 5
        assert record.tasks == ["0, 1", "2, 3", "4, 5", "6, 7", "8, 9"]
        measured = [[value is not None for value in row] for row in record.accuracy]
        assert measured == [[record.method != "single" or k <= t for k in range(5)] for t in range(5)]
        assert record.environments[0]["torch"] == torch.__version__
    assert not list(tmp_path.rglob("*.pt"))
    assert all(path.stat().st_size < 5000 for path in tmp_path.rglob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_failed_goes_on_to_the_same_numbers(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (tiny(method, tmp_path / name, *UNEVEN) for name in ("whole", "broken"))
    assert main(whole) == 0
    with monkeypatch.context() as patched:
        patched.setattr(runs, "train", failing(runs.train, 3))
        assert main(broken) == 1
    assert len(only_record(tmp_path / "broken").accuracy) == 2
    assert main(broken) == 0
    assert numbers(only_record(tmp_path / "broken")) == numbers(only_record(tmp_path / "whole"))


def test_a_run_that_diverges_stops_and_says_so(tmp_path: Path) -> None:
    assert main(tiny("sgd", tmp_path, "epochs=50", "sgd.lr=1e9")) == 0
    record = only_record(tmp_path)
    assert record.finished
    assert record.diverged_in == 0
    assert 0 < record.steps[0] < 50 * 4
    assert record.steps[1:] == [0, 0, 0, 0]


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_stores_a_task_goes_on_to_the_same_numbers(
    tmp_path: Path, server: ForkServerContext
) -> None:
    """A task is stored by moving the checkpoint to its place, then the record: killed before each, and before the end."""
    killed_run, whole_run = (tiny("npc", tmp_path / name, "tasks=3") for name in ("killed", "whole"))
    for moves, tasks in ((0, 0), (1, 0), (2, 2)):
        killed = server.Process(target=programs.experiments_that_die, args=(killed_run, tmp_path / "output", moves))
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL, (tmp_path / "output").read_text()
        assert [len(record.accuracy) for record in Store(tmp_path / "killed").records()] == [tasks] * (tasks > 0)
    assert main(killed_run) == main(whole_run) == 0
    assert numbers(only_record(tmp_path / "killed")) == numbers(only_record(tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_share_a_store(
    tmp_path: Path, server: ForkServerContext, capsys: pytest.CaptureFixture[str]
) -> None:
    store, output = tmp_path / "store", tmp_path / "output"
    arguments = ["run", *TINY, "--methods", "sgd,npc", "--seeds", "2", "--store", str(store)]
    other = server.Process(target=programs.experiments, args=(arguments, output))
    other.start()
    while not list(store.rglob("*.lock")):
        assert other.is_alive(), output.read_text()
        time.sleep(0.005)
    assert main(arguments) == 0
    other.join()
    assert other.exitcode == 0
    for printed in (capsys.readouterr().out, output.read_text()):
        assert printed.count("average accuracy") == 4
    records = list(Store(store).records())
    assert len(records) == 4
    # A run that both had worked on would have more.
    assert all(len(record.environments) == 1 and len(record.steps) == 5 for record in records)
    assert {path.suffix for path in store.rglob("*") if path.is_file()} == {".json", ".lock"}


def succeed(name: Any, *, wait: bool, position: int) -> str:
    if name.name == "dies":
        os._exit(3)
    if name.name == "fails":
        raise ValueError("no")
    return "done"


@pytest.mark.slow
def test_work_that_fails_or_dies_leaves_the_rest_alone() -> None:
    names = [Path(name) for name in ("dies", "fails", "first", "second")]  # they have a `name`
    shown: dict[str, Any] = {}
    outcomes = parallel(succeed, [(name,) for name in names], 2, shown.__setitem__)
    assert [type(outcome).__name__ for outcome in outcomes] == ["BrokenProcessPool", "ValueError", "str", "str"]
    assert list(shown.values()).count("done") == 2


def test_batches_are_those_of_a_loop_over_samples() -> None:
    images = torch.randint(0, 256, (7, 3, 6, 5), dtype=torch.uint8)
    labels = torch.arange(7)
    mean, std = torch.rand(1, 3, 1, 1) * 100, torch.rand(1, 3, 1, 1) + 50
    task = Task(tuple(range(7)), images, labels, images, labels, mean, std)
    generator = torch.Generator().manual_seed(0)
    batches = Batches(
        task, batch_size=50, epoch_samples=50, augmentation=Augmentation(padding=2, flip=True), generator=generator
    )
    (drawn,) = batches.epoch()
    got, got_labels = batches.images_and_labels(drawn)
    for row, (sample, top, left, flipped) in enumerate(drawn.tolist()):
        padded = torch.zeros(3, 10, 9)
        padded[:, 2:8, 2:7] = images[sample]
        expected = padded[:, top : top + 6, left : left + 5]
        expected = expected.flip(2) if flipped else expected
        assert torch.equal(got[row], ((expected - mean) / std)[0])
        assert got_labels[row] == sample
    assert drawn[:7, 0].sort().values.tolist() == list(range(7)), "a pass holds every sample once"
    assert [drawn[:, column].unique().tolist() for column in (1, 2, 3)] == [list(range(5)), list(range(5)), [0, 1]]


@settings(max_examples=40)
@given(samples=st.integers(1, 30), epoch=st.integers(1, 30), size=st.integers(1, 30), epochs=st.integers(1, 6))
def test_batches_are_whole_and_cut_from_passes_without_a_gap(samples: int, epoch: int, size: int, epochs: int) -> None:
    images, labels = torch.zeros(samples, 1, 1, 1), torch.zeros(samples, dtype=torch.int64)
    batches = Batches(
        Task((0,), images, labels, images, labels),
        batch_size=size,
        epoch_samples=epoch,
        generator=torch.Generator().manual_seed(0),
    )
    taken: list[Tensor] = []
    for number in range(1, epochs + 1):
        taken += batches.epoch()
        assert len(taken) == number * epoch // size, "the samples beyond an epoch's last batch are not lost"
    assert all(len(batch) == size for batch in taken)
    drawn = torch.cat([batch[:, 0] for batch in taken]) if taken else torch.empty(0)
    for one_pass in drawn.split(samples):
        assert len(one_pass.unique()) == len(one_pass), "no sample comes again before all have come"


def test_every_step_has_a_whole_batch_and_delta_is_of_the_steps_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    deltas: list[float] = []

    def counted(outputs: Tensor, labels: Tensor, task: Task) -> Tensor:
        sizes.append(len(labels))
        return loss_of(outputs, labels, task)

    def watched(*positional: Any) -> Any:
        model, optimizer = fresh(*positional)
        deltas.append(optimizer.param_groups[0]["delta"])
        return model, optimizer

    fresh = runs.fresh
    monkeypatch.setattr(training, "loss_of", counted)
    monkeypatch.setattr(runs, "fresh", watched)
    assert main(tiny("npc", tmp_path, *UNEVEN, "npc.survive=0.5")) == 0
    (steps,) = set(only_record(tmp_path).steps)
    assert steps == 3 * 40 // 16
    assert sizes == [16] * 5 * steps
    assert deltas[0] ** steps == pytest.approx(0.5)
    assert only_record(tmp_path).protocol["batches"] == "whole"


def test_a_task_with_less_than_a_batch_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("epoch_samples=15", "epochs=2")
    assert main(tiny("sgd", tmp_path, *short, "batch_size=30")) == 0
    assert only_record(tmp_path).steps == [1] * 5, "an epoch may have no step"
    assert main(tiny("sgd", tmp_path, *short, "batch_size=31")) == 1
    assert "batch_size is 31, but a task is learned with 30 samples in all (2 x 15)" in capsys.readouterr().err


def test_joint_training_compares_a_sample_with_its_own_tasks_classes_only() -> None:
    images, labels = torch.rand(6, 1, 1, 1), torch.tensor([0, 1, 2, 3, 0, 3])
    tasks = split(images, labels, images, labels, 2)
    outputs = torch.randn(6, 4, requires_grad=True)
    together = joint(tasks)
    loss = loss_of(outputs, together.train_labels, together)
    parts = zip(outputs.split(3), tasks, strict=True)
    single = [loss_of(part, task.train_labels, task).item() for part, task in parts]
    assert loss.item() == pytest.approx(sum(single) / 2)
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert gradient.isfinite().all()
    assert not gradient[:3, 2:].any()


def test_metrics_of_a_known_table() -> None:
    known = [[1.0, 0.5, 0.5], [0.8, 0.9, 0.5], [0.7, 0.6, 0.8]]
    assert metrics.average_accuracy(known) == pytest.approx(0.7)
    assert metrics.forgetting(known) == pytest.approx((0.3 + 0.3) / 2)
    assert metrics.backward_transfer(known) == pytest.approx((-0.3 - 0.3) / 2)
    single = [[1.0, None, None], [1.0, 0.7, None], [1.0, 0.7, 0.9]]
    assert metrics.forward_transfer(known, single) == pytest.approx((0.2 - 0.1) / 2)
    with pytest.raises(ValueError, match="lacks a value"):
        metrics.backward_transfer([[0.5, 0.5], [None, 0.5]])


@pytest.mark.parametrize("method", ["mas", "ssl"])
def test_a_run_whose_importance_overflows_counts_as_diverged(method: str, tmp_path: Path) -> None:
    assert main(tiny(method, tmp_path, "tasks=4", f"{method}.strength=1e9", f"{method}.implicit=False")) == 0
    assert only_record(tmp_path).diverged_in is not None
    assert len(only_record(tmp_path).accuracy) == 4


class Untouchable:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError("the search looked at test samples")


def test_the_search_keeps_to_its_budget_and_to_training_samples(
    searches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing: Any = Untouchable()
    poisoned = replace(datasets.load("digits"), test_images=nothing, test_labels=nothing)
    monkeypatch.setattr(experiments, "load", lambda name, folder: poisoned)
    searched = search(searches, "sgd,npc", budget=4, seeds=2)["methods"]
    for method in ("sgd", "npc"):
        tried = searched[method]["tried"]
        assert len(tried) == 4
        assert len({json.dumps(trial["settings"]) for trial in tried}) == 4
        finalists = [trial for trial in tried if trial["seeds"] == 2]
        assert len(finalists) == 3
        best = max(finalists, key=lambda trial: trial["validation accuracy"])
        assert best["settings"] == searched[method]["best"]
        assert best["settings"].get("alpha_unit") == ("lr" if method == "npc" else None)
    assert len(list((searches / "store" / "validation").glob("*/*/*/*.json"))) == 2 * (4 + 3)
    assert not list(Store(searches / "store").records()), "what is found in a search is not a result"
    text = report.write(Store(searches / "store"), searches / "out")
    assert f"| {100 * best['validation accuracy']:.1f} (2) " in text


def test_anchored_methods_are_searched_towards_lower_rates_and_towards_weaker_anchors(tmp_path: Path) -> None:
    searched = search(tmp_path, "ewc", "ewc.strength=1", "ewc.lr=0.01", budget=2)["methods"]["ewc"]
    settings = [(trial["settings"]["lr"], trial["settings"]["strength"]) for trial in searched["tried"]]
    assert settings == [(0.01, 1), (0.001, 1), (0.01, 0.1)]


def test_a_search_in_which_all_diverged_recommends_nothing(searches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search(searches, "sgd", "sgd.lr=1e30", budget=2, seeds=3)["methods"]["sgd"]["best"] == {}
    assert "4 configurations tried, and all diverged" in capsys.readouterr().out
    text = report.write(Store(searches / "store"), searches / "out")
    assert "| sgd | 4              | 4        | -     | -  " in text


def test_damaged_files_of_a_store_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = stored("sgd", 0, [[1.0, 0.5]])
    store = Store(tmp_path)
    store.save(record, {})
    (checkpoint,) = tmp_path.rglob("*.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"seed0.pt is damaged: .*; delete it to start the run anew"):
        store.load(record)
    (path,) = tmp_path.rglob("*.json")
    for text in (path.read_text()[:50], "[]", json.dumps({"foo": 1})):
        path.write_text(text)
        with pytest.raises(StoreError, match=r"seed0.json is no record of a run: "):
            store.load(record)
    with pytest.raises(SystemExit):
        main(["report", "--store", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "seed0.json is no record of a run" in capsys.readouterr().err


def test_an_empty_name_of_the_data_folder_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load", lambda name, folder: asked.append(folder))
    experiments.load.cache_clear()
    experiments.available(EXPERIMENTS["imnist"], "")
    experiments.load.cache_clear()
    assert asked == [None]


def test_a_run_is_not_continued_with_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny("sgd", tmp_path, "tasks=3")
    tasks_of = experiments.tasks_of

    def renamed(*positional: Any) -> list[Task]:
        return [replace(task, name=f"other {task.name}") for task in tasks_of(*positional)]

    with monkeypatch.context() as patched:
        patched.setattr(experiments, "tasks_of", renamed)
        patched.setattr(runs, "train", failing(runs.train, 2))
        assert main(arguments) == 1
    assert len(only_record(tmp_path).accuracy) == 1
    assert main(arguments) == 1
    assert "was begun with the tasks other 0, 1; other 2, 3; other 4, 5, but" in capsys.readouterr().err


def stored(method: str, seed: int, accuracy: list[list[float | None]], **changes: Any) -> Record:
    protocol = replace(EXPERIMENTS["idigits"].small, datasets=("digits",))
    settings = {
        "protocol": asdict(protocol),
        "method": defaults(method, "idigits", "small") | changes,
        "precision": "float32",
    }
    machine = {"processor": "a processor", "device": "cpu"}
    return Record(
        "idigits", "small", method, seed, settings, ["0, 1", "2, 3"], accuracy, [1.0, 1.0], [5, 5], [0, 0], [machine]
    )


def test_a_race_times_the_same_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each contestant comes to the weights of a run of its own, random numbers included."""
    rivals = ["--methods", "npc,ewc,sgd", "--also", "npc.skip_gradients=none"]
    assert main(["race", *TINY, *UNEVEN, *rivals, "--out", str(tmp_path)]) == 0
    assert main(tiny("npc,ewc,sgd", tmp_path / "runs", *UNEVEN)) == 0
    entries = json.loads((tmp_path / "race-idigits-16-32.json").read_text())["entries"]
    assert list(entries) == ["npc", "skip_gradients=none", "ewc", "sgd"]
    accuracy = {record.method: record.accuracy for record in Store(tmp_path / "runs").records()}
    for name, entry in entries.items():
        assert entry["accuracy after each task"] == accuracy["npc" if name == "skip_gradients=none" else name]
        assert all(seconds > 0 for task in entry["seconds of epochs, by task"] for seconds in task)
    assert [round(seconds, 2) for seconds in entries["sgd"]["seconds of consolidation"]] == [0] * 5
    assert min(entries["ewc"]["seconds of consolidation"][:4]) > 0.001
    assert "skip_gradients=none" in capsys.readouterr().out


def test_the_report_shows_what_is_stored_and_names_what_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for record in (
        stored("npc", 0, [[1.0, 0.5], [0.8, 0.9]]),
        stored("npc", 1, [[1.0, 0.5], [0.9, 0.9]]),
        stored("single", 0, [[0.9, None], [0.9, 0.8]]),
        stored("single", 1, [[0.9, None], [0.9, 0.8]]),
        stored("cpc", 1, [[1.0, 0.5], [0.9, 0.8]]),
        stored("npc", 0, [[1.0, 0.5], [0.6, 0.6]], beta=0.25),
        stored("sgd", 0, [[1.0, 0.5]]),
    ):
        store.save(record, {})
    text = report.write(store, tmp_path / "out")
    row = next(line for line in text.splitlines() if line.startswith("| npc "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["npc", "85.0 ± 5.0", "90.0 ± 0.0", "**87.5 ± 2.5**"]
    assert cells[4:] == ["15.0 ± 5.0", "-15.0 ± 5.0", "10.0 ± 0.0", "2"]
    assert "| npc    | npc.beta=0.25 | 60.0" in text
    assert "* idigits, small: sgd seed 0 stopped after task 1 of 2" in text
    assert "* idigits, small: not run with ewc, mas, si, ssl, sgd, joint" in text
    assert "* idigits, small: cpc not finished with seed 0" in text
    assert "* icifar100, paper: not run" in text
    drawn = {"idigits-small-average.svg", "idigits-small-per-task.svg"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == drawn | {"report.md"}


def older(record: Record) -> Record:
    """The record as it was before runs trained in whole batches."""
    protocol = {name: value for name, value in record.settings["protocol"].items() if name != "batches"}
    return replace(record, settings={**record.settings, "protocol": protocol})


def test_the_report_keeps_runs_with_smaller_last_batches_apart_from_others(tmp_path: Path) -> None:
    old, new = (stored("npc", 0, [[1.0, 0.5], [0.8, last]]) for last in (0.6, 0.4))
    assert older(old).path != new.path
    store = Store(tmp_path / "store")
    store.save(older(old), {})
    text = report.write(store, tmp_path / "out")
    assert "| npc | 80.0 | 60.0 | **70.0** |" in text
    assert "over seeds. The last batch of each epoch was smaller than the others; runs now train in whole" in text
    assert "Other settings" not in text
    store.save(new, {})
    text = report.write(store, tmp_path / "out")
    assert "| npc | 80.0 | 40.0 | **60.0** |" in text
    assert "The last batch" not in text.partition("## Search")[0]
    assert "| npc    | as above    | 60.0" in text
    assert "| npc    | batches=cut | 70.0" in text


def test_searches_with_smaller_last_batches_are_kept_apart_from_others(searches: Path) -> None:
    recorded = search(searches, "sgd,npc", budget=1)
    for entry in recorded["methods"].values():
        del entry["protocol"]["batches"]
        entry["best"]["lr"] = entry["tried"][0]["settings"]["lr"] = 0.07
    (searches / "idigits-small.json").write_text(json.dumps(recorded))
    assert list(search(searches, "sgd", budget=1)["methods"]) == ["sgd"]
    assert json.loads((searches / "idigits-small-cut.json").read_text()) == recorded
    assert [defaults(method, "idigits", "small")["lr"] for method in ("sgd", "npc")] == [0.1, 0.07]
    store = Store(searches / "runs")
    for method in ("sgd", "npc"):
        store.save(stored(method, 0, [[1.0, 0.5], [0.8, 0.6]]), {})
    text = report.write(store, searches / "out")
    assert text.count("## Search on idigits, small") == 2
    assert text.count("idigits-small-cut.json. The last batch of each epoch was smaller than the others;") == 1
    assert text.count("(from a search in which the last batch of each epoch was smaller)") == 1
    assert "measure after pooling (from a search" in text


def test_alpha_that_was_recorded_as_a_learning_rate_is_read_in_units_of_lr(searches: Path) -> None:
    recorded = {**METHODS["npc"].paper, "lr": 0.03, "alpha": 0.05}
    del recorded["alpha_unit"]
    record_search(searches, "npc", recorded, [{"settings": recorded, "validation accuracy": 0.9, "seeds": 1}])
    now = defaults("npc", "idigits", "small")
    assert (now["lr"], now["alpha"]) == (0.03, pytest.approx(1.67, abs=0.01))
    store, new = Store(searches / "runs"), stored("npc", 0, [[1.0, 0.5], [0.8, 0.6]])
    old = replace(new, settings={**new.settings, "method": recorded})
    assert old.hyperparameters == new.hyperparameters == now
    store.save(old, {})
    assert store.load(new) == (new, None), "the old run is not taken for the new one"
    text = report.write(store, searches / "out")
    assert text.count("lr 0.03, alpha 1.6667 (0.05 / lr), beta 0.5") == 2  # of the search, and of the run
    assert "Other settings" not in text
    assert "alpha_unit" not in text


def test_settings_of_a_search_with_explicit_anchors_are_run_with_explicit_anchors(searches: Path) -> None:
    explicit: dict[str, Any] = {"lr": 0.01, "strength": 5.0}
    record = stored("ewc", 0, [[1.0, 0.5], [0.8, 0.6]])
    store = Store(searches / "runs")
    store.save(replace(record, settings={**record.settings, "method": explicit}), {})
    for best in ({}, explicit, {**explicit, "implicit": True}):
        record_search(searches, "ewc", best, [])
        own = defaults("ewc", "idigits", "small")
        assert not best or own == best  # so that recorded runs are found
        optimizer = METHODS["ewc"].optimizer(torch.nn.Linear(2, 2), own, 1)
        assert optimizer.param_groups[0]["implicit"] is (best is not explicit)
        assert defaults("ewc", "idigits", "small", tuned=False)["implicit"] is True
        text = report.write(store, searches / "out")
        assert text.count("The anchors of ewc pulled explicitly (implicit=False).") == 2 * (best is explicit)
        assert ("ewc.implicit=False" in text) is (best is not explicit)


def test_a_search_decides_the_defaults_of_its_own_size(searches: Path) -> None:
    for size, rate in (("small", 0.5), ("paper", 0.25)):
        entry = {"best": {"lr": rate}, "protocol": {"batches": "whole"}}
        (searches / f"icifar100-{size}.json").write_text(json.dumps({"methods": {"sgd": entry}}))
        assert defaults("sgd", "icifar100", size)["lr"] == defaults("sgd", "hetero", size)["lr"] == rate
        assert defaults("sgd", "icifar100", size, tuned=False)["lr"] == METHODS["sgd"].paper["lr"]
    assert defaults("npc", "icifar100", "paper") == METHODS["npc"].paper


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --set batches=cut", "--set has 'batches', which the protocol does not have; close to it: 'batch_size'"),
        ("run --methods foo", "--methods has 'foo', which is no method; there are 'npc', 'cpc'"),
        ("run --methods npd,sgd", "--methods has 'npd', which is no method; close to it: 'npc'"),
        ("run --methods npc,npc", "--methods names 'npc' more than once"),
        ("run --set npc.foo=1", "--set has 'npc.foo', which npc does not have; there are 'lr', 'alpha', 'beta'"),
        ("run --set npc.detla=1", "--set has 'npc.detla', which npc does not have; close to it: 'beta', 'delta'"),
        ("run --set npc.alpha_unit=rate", "--set has 'npc.alpha_unit', which npc does not have; close to it: 'alpha'"),
        ("run --set foo.lr=1", "--set has 'foo.lr', but 'foo' is no method; there are 'npc'"),
        ("run --set ewc.lr=1", "--set has 'ewc.lr', but --methods has npc, sgd only"),
        ("run --set foo=1", "--set has 'foo', which the protocol does not have; there are 'channels'"),
        ("run --set epoch=1", "--set has 'epoch', which the protocol does not have; close to it: 'epochs'"),
        ("run --set npc.lr=-1", "npc does not take these settings: lr is -1; "),
        ("run --set npc.lr=True", "expected a number"),
        ("run --methods ewc --set ewc.implicit=no", "--set has 'ewc.implicit=no'; expected True or False"),
        ("run --methods ewc --set ewc.implicit=2", "--set has 'ewc.implicit=2'; expected True or False"),
        (
            "run --set npc.output=al",
            "npc does not take these settings: output is 'al'; expected 'all', 'active', 'free'",
        ),
        ("run --set npc.measure=before", "measure is 'before'; expected 'after pooling', 'before pooling'"),
        ("run --set npc.sigma=sigmoit", "npc does not take these settings: sigma is 'sigmoit'; "),
        ("run --device gpu", "--device is gpu; expected cpu, cuda, or cuda:1 and so on"),
        ("run --device cuda:99", "--device is cuda:99, but PyTorch sees "),
        ("search --methods joint", "--methods has 'joint', which is a bound: it has nothing to search"),
        ("reproduce --jobs 0", "--jobs is 0; expected at least 1"),
        ("run --data /nowhere", "argument --data: /nowhere does not exist; correct it (--data or NPC_DATA names it)"),
        ("reproduce --data /nowhere", "argument --data: /nowhere does not exist; correct it"),
        ("report --store /nowhere", "argument --store: /nowhere does not exist"),
        ("report --out /dev/null/out", "argument --out: /dev/null is not a folder; name a folder for the results"),
        ("race --out /dev/null", "argument --out: /dev/null is not a folder"),
        ("run --store /dev/null/store", "argument --store: /dev/null is not a folder"),
        ("search --results /dev/null/x", "argument --results: /dev/null is not a folder"),
        (
            "race --methods npc --also npc.detla=1",
            "--also has 'npc.detla', which npc does not have; close to it: 'beta', 'delta'",
        ),
        ("race --methods npc --also npc.lr=-1", "npc does not take these settings: lr is -1; "),
        ("run --set epochs=many", "expected a value such as 30"),
        ("run --set npc.lr=fast", "expected a number"),
        ("run --set npc.lr", "expected name=value"),
        ("run --seeds 0", "--seeds is 0; expected at least 1"),
        ("run --jobs 0", "--jobs is 0; expected at least 1"),
        ("run --set batch_size=0", "batch_size is 0; expected at least 1"),
        ("run --set tasks=-1", "tasks is -1; expected at least 1, or 0 for all"),
        ("run --set channels=[16,0]", "channels is [16, 0]; expected widths of at least 1"),
        ("run --set npc.lr=null", "expected a number"),
        ("run --device cpu --cuda-graph", "--cuda-graph is for CUDA devices, but the device is cpu"),
        ("race --methods npc,joint", "'joint', which does not learn tasks in a row"),
        ("race --methods npc,sgd --also ewc.lr=0.1", "--also has ewc.lr=0.1; expected settings of"),
    ],
)
def test_bad_arguments_are_answered_in_one_sentence(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_nothing(*_: Any) -> Any:
        raise AssertionError("data sets were looked for, and perhaps downloaded")

    monkeypatch.setattr(experiments, "available", read_nothing)
    command, *options = arguments.split()
    with pytest.raises(SystemExit) as stopped:
        main([command, *([] if command in ("report", "reproduce") else ["--experiment", "idigits"]), *options])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last


def test_the_experiment_activation_refuses_other_methods_before_it_reads_data(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "available", None)
    with pytest.raises(SystemExit):
        main(["run", "--experiment", "activation", "--methods", "npc,ewc"])
    assert "--methods has 'ewc'; the experiment activation compares npc and sgd only" in capsys.readouterr().err


def test_a_named_data_folder_that_does_not_exist_is_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPC_DATA", str(tmp_path / "dta"))
    with pytest.raises(SystemExit):
        main(["run", "--experiment", "imnist", "--methods", "npc"])
    said = f"{tmp_path / 'dta'} does not exist; correct it (--data or NPC_DATA names it), or make the folder to have"
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_report_of_a_damaged_store_leaves_no_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.save(stored("sgd", 0, [[1.0, 0.5], [0.8, 0.6]]), {})
    for path in store.folder.rglob("*.json"):
        path.write_text("[]")
    with pytest.raises(SystemExit):
        main(["report", "--store", str(store.folder), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_reproducing_goes_on_after_a_command_that_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiments, "available", lambda experiment, folder: ((), {"data": "the site is down"}))
    assert main(["reproduce"]) != 0
    assert capsys.readouterr().err.count("the site is down") == len(PLANS["small"])


@pytest.mark.parametrize("size", PLANS)
def test_the_plan_searches_every_rival_as_much_before_it_runs(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--dry", "--size", size, "--jobs", "2"]) == 0
    budgets: dict[tuple[str, str], int] = {}
    run = set()
    for line in capsys.readouterr().out.splitlines():
        options = command_line_parser().parse_args(shlex.split(line)[3:])
        assert (options.size, options.jobs) == (size, 2)
        for method in options.methods.split(","):
            if options.command == "search":
                assert (options.experiment, method) not in run
                budgets[options.experiment, method] = options.budget
            run.add((options.experiment, method))
    rivals = ("cpc", "ewc", "mas", "si", "ssl", "sgd")
    assert {budgets[experiment, method] for experiment in ("imnist", "icifar100") for method in rivals} == {12}
    assert {method for experiment, method in run if experiment == "icifar100"} == set(METHODS)


@pytest.mark.slow
def test_the_demonstration_writes_table_figures_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(["--seeds", "2", "--epochs", "2", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    for text in (
        "| SGD ",
        "| SGD, falling rate |",
        "| NPC ",
        "| NPC, shuffled ",
        "average",
        "forgetting",
        "ms per step",
    ):
        assert text in output
    names = {"average.svg", "per-task.svg", "plasticity.svg", "results.json", "results.md"}
    assert {path.name for path in tmp_path.iterdir()} == names
    results = json.loads((tmp_path / "results.json").read_text())
    assert np.array(results["runs"]["NPC"][0]["accuracy"]).shape == (5, 5)
    assert results["environment"]["torch"] == torch.__version__


def test_the_controls_fall_for_all_layers_and_protect_other_neurons() -> None:
    def one_step(kind: Callable[..., torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = cnn(1, 8, (16, 32), 64, classes=10, dropout=0.0)
        optimizer = kind(model, 0.1, 300, 0)
        model(torch.rand(8, 1, 8, 8)).square().sum().backward()
        optimizer.step()
        return model, optimizer

    model, falling = one_step(demo.falling_sgd)
    assert isinstance(falling, FallingSGD)
    falling.next_task(demo.FALL)
    rates = {id(p): group["lr"] for group in falling.param_groups for p in group["params"]}
    expected = {name: 0.1 if name.startswith("output") else 0.07 for name, _ in model.named_parameters()}
    assert {name: rates[id(p)] for name, p in model.named_parameters()} == pytest.approx(expected)

    _, npc = one_step(demo.npc)
    _, shuffled = one_step(demo.shuffled_npc)
    assert isinstance(npc, NPC) and isinstance(shuffled, NPC)
    for (name, layer), other in zip(npc.plasticity().items(), shuffled.plasticity().values(), strict=True):
        assert layer.importance.sort().values.tolist() == pytest.approx(other.importance.sort().values.tolist())
        keep = layer.importance == other.importance
        assert keep.all() if name == "output" else not keep[layer.importance > 0].any()


def test_a_demonstration_of_a_single_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--seeds", "1"])
    assert "--seeds is 1; a standard error needs at least 2" in capsys.readouterr().err


def test_tasks_hold_their_own_classes_and_lose_no_sample() -> None:
    tasks = digits()
    assert [task.classes for task in tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert sum(len(task.train_labels) for task in tasks) == 1437
    assert sum(len(task.test_labels) for task in tasks) == 360
    for task in tasks:
        assert set(task.train_labels.tolist()) == set(task.test_labels.tolist()) == set(task.classes)
    images, labels = torch.arange(6.0).view(6, 1, 1, 1), torch.tensor([2, 0, 1, 0, 3, 1])
    first, second = split(images, labels, images, labels, 2)
    assert first.train_images.flatten().tolist() == [1, 2, 3, 5]
    assert second.train_labels.tolist() == [2, 3]
