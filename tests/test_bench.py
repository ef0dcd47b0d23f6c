"""The demonstration and the benchmarks run, and their statistics are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from bench.continual import metrics, report
from bench.continual.networks import cnn
from bench.continual.tasks import digits, split
from bench.micro.methods import Case
from bench.micro.timing import compare, sets_of

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> str:
    result = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_demonstration_writes_table_figures_and_numbers(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output = run("bench.continual.demo", "--seeds", "2", "--epochs", "2", "--out", str(tmp_path))
    for text in ("| SGD |", "| NPC |", "average", "forgetting", "ms per step"):
        assert text in output
    names = {f"{figure}.{suffix}" for figure in ("average", "per-task", "plasticity") for suffix in ("svg", "png")}
    assert {path.name for path in tmp_path.iterdir()} == names | {"results.json", "results.md"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert np.array(results["runs"]["NPC"][0]["accuracy"]).shape == (5, 5)
    assert results["environment"]["torch"] == torch.__version__


def test_a_single_seed_is_refused() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bench.continual.demo", "--seeds", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "--seeds is 1; a standard error needs at least 2" in result.stderr


def test_the_micro_benchmarks_write_tables_and_numbers(tmp_path: Path) -> None:
    parts = ("update", "adam", "calls", "frozen", "where", "host")
    output = run("bench.micro", "--quick", "--only", *parts, "--out", str(tmp_path))
    assert "| 1,000 parameters " in output
    rows = json.loads((tmp_path / "update.json").read_text())["rows"]
    assert all(
        low <= median <= high for row in rows for low, median, high in row["peer / npc_ext (quartiles)"].values()
    )
    calls = {row["case"]: row for row in json.loads((tmp_path / "calls.json").read_text())["rows"]}
    assert calls["NPC, 1 process"]["launches"] == {"importance": 5, "update": 1}
    assert all(row["collective calls"] == 0 for row in calls.values())
    *operations, _, total = json.loads((tmp_path / "where.json").read_text())["rows"]
    assert all(
        row["milliseconds"][name] <= of_all for row in operations for name, of_all in total["milliseconds"].items()
    )
    frozen = json.loads((tmp_path / "frozen.json").read_text())["rows"]
    assert {row["share"] for row in frozen} == {0.0, 1.0} and (tmp_path / "frozen.svg").exists()
    for row in frozen:
        kept = row["saved for backward, bytes"]
        assert 0 <= row["gradients skipped"] <= row["share"]
        assert kept["npc_ext"] <= kept["skip_frozen=False"]
        assert kept["measure_every=8"] < kept["skip_frozen=False"] or row["share"] == 0


@pytest.mark.parametrize("name", ["EWC", "MAS", "SI", "SSL"])
def test_peers_of_the_methods_take_the_same_step_away_from_the_anchors(name: str) -> None:
    case = Case(name, lambda: cnn(1, 8, (4, 8), 16, 10), 5)
    before = parameters_to_vector(case.models[0].parameters()).detach()
    for step in case.peers.values():
        step()
    ours, sgd, *foreach = [parameters_to_vector(model.parameters()) - before for model in case.models]
    for moved in foreach[: len(case.peers) - 2]:
        torch.testing.assert_close(moved, ours, rtol=1e-3, atol=1e-6)
    assert (ours - sgd).norm() > 0.1 * sgd.norm(), "the anchors' pull is to be seen"


def test_tasks_hold_their_own_classes_and_lose_no_sample() -> None:
    pytest.importorskip("sklearn")
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


def test_average_and_forgetting_of_a_known_table() -> None:
    known = [[1.0, 0.5, 0.5], [0.8, 0.9, 0.5], [0.7, 0.6, 1.0]]
    assert metrics.average_accuracy(known) == pytest.approx((0.7 + 0.6 + 1.0) / 3)
    assert metrics.forgetting(known) == pytest.approx(((1.0 - 0.7) + (0.9 - 0.6)) / 2)
    assert report.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / 3**0.5))


def test_comparison_finds_the_slower_function_and_cold_sets_fill_the_caches() -> None:
    short, long = torch.randn(64, 64), torch.randn(512, 512)
    result = compare({"ours": lambda _: short @ short, "peer": lambda _: long @ long}, turns=5, seconds_per_turn=0.002)
    assert result.ratio["peer"][0] > 2
    assert result.fastest_peer() == result.ratio["peer"]
    assert (sets_of(2**30), sets_of(2**20), sets_of(1)) == (1, 64, 256)
