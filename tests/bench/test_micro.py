"""The demonstration and the benchmarks run, and their statistics are what they say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from bench import ROOT, compare, rows, tables
from bench.continual import metrics
from bench.continual.tasks import digits, split
from bench.micro.methods import Method
from bench.networks import cnn
from bench.timing import Case, HostTimer, measure, sets_of


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
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


def test_the_micro_benchmarks_write_rows_and_tables(tmp_path: Path) -> None:
    parts = ("update", "adam", "calls", "frozen", "where", "host")
    output = run("bench.micro", "--quick", "--only", *parts, "--out", str(tmp_path))
    assert "| 1,000 parameters " in output
    found = rows.read(tmp_path)
    assert {name: part["state"] for name, part in found.parts.items()} == dict.fromkeys(parts, "complete")
    for row in found.of_part("update"):
        assert all(low <= median <= high for low, median, high in row.ratio.values())
        assert all(low <= row.seconds[name] <= high for name, (low, high) in row.quartiles.items())
    assert "1,000 parameters" in (tmp_path / "update.md").read_text()
    (npc, *_), where = found.of_part("calls"), found.of_part("where")
    assert npc.facts["launches"] == {"importance": 5, "update": 1}
    assert all(sum(row.facts.values()) > 0 for row in where)
    frozen = found.of_part("frozen")
    assert {row.facts["share certified"] for row in frozen} == {0.0, 1.0}
    assert (tmp_path / "frozen.svg").exists()
    for row in frozen:
        kept = row.facts["saved for backward, bytes"]
        assert 0 <= row.facts["gradients skipped"] <= row.facts["share certified"]
        assert kept["npc_ext"] <= kept["skip_frozen=False"]

    run("bench.micro", "--quick", "--only", "calls", "--out", str(tmp_path))
    assert len(rows.read(tmp_path).rows) == len(found.rows), "a part that is measured again takes the old one's place"
    assert (tmp_path / rows.NAME).read_text().count('"part": "calls"') == len(found.of_part("calls")) + 1


def test_two_revisions_are_timed_in_turns(tmp_path: Path) -> None:
    """The other revision is this one with a sleep in every step: it has to come out slower, and this one not."""
    other = tmp_path / "other"
    shutil.copytree(ROOT / "npc_ext", other / "npc_ext", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "csrc", other / "csrc")
    shutil.copytree(ROOT / "bench", other / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    launch = other / "npc_ext" / "kernels" / "launch.py"
    sound = "def update_(\n"
    assert sound in launch.read_text()
    slow = launch.read_text() + "\n\n_usual = update_\n\n\ndef update_(*arguments, **options):\n"
    launch.write_text(slow + "    import time\n\n    time.sleep(0.002)\n    _usual(*arguments, **options)\n")
    command = ["bench.micro", "--quick", "--only", "update", "--against", str(other), "--out", str(tmp_path / "rows")]
    assert "Slower than before, beyond the spread: nothing" in run(*command)
    found = rows.read(tmp_path / "rows").of_part("update-revisions")
    assert len(found) == 8
    assert all(row.ratio["before"][0] > 3 for row in found)


def test_a_revision_that_git_does_not_know_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.micro", "--quick", "--against", "no-such", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "'no-such' is neither a revision of this repository nor a folder" in result.stderr


def written(folder: Path, *changed: rows.Row, gpu: str = "H100") -> rows.Results:
    writer = rows.Writer(folder)
    writer.run("python -m bench", {"gpu": gpu, "commit": "abc"})
    for row in changed:
        writer.row(row)
    return rows.read(folder)


def row(case: str, ratio: tuple[float, float, float] | None = None, seconds: float = 1.0) -> rows.Row:
    made = rows.Row("update", case, {"npc_ext": seconds}, {"npc_ext": (0.9 * seconds, 1.1 * seconds)})
    if ratio:
        made.ratio = {"SGD fused": ratio}
    return made


def test_comparing_two_files_names_what_got_slower_beyond_its_spread(tmp_path: Path) -> None:
    before = written(
        tmp_path / "old", row("a", (1.0, 1.1, 1.2)), row("b", (1.0, 1.1, 1.2)), row("c", (1.0, 1.1, 1.2)), row("d")
    )
    # a: twice as slow, but so is its peer; b: slower; c: faster; d has no peer and takes twice as long.
    after = [row("a", (1.1, 1.2, 1.3), 2.0), row("b", (0.7, 0.8, 0.9)), row("c", (1.3, 1.4, 1.5)), row("d", None, 2.0)]
    text, slower = compare.compare(before, written(tmp_path / "new", *after))
    assert slower
    table = [line.split("|") for line in text.splitlines()[2:] if line]
    verdicts = {line[2].strip(): line[5].strip() for line in table if len(line) > 5}
    assert verdicts == {"b": "slower", "c": "faster", "d": "slower"}
    same, slower = compare.compare(before, before)
    assert (same, slower) == ("Nothing changed beyond its spread in 4 cases.", False)


def test_files_of_two_devices_or_without_a_common_case_are_not_compared(tmp_path: Path) -> None:
    old = written(tmp_path / "old", row("a"))
    with pytest.raises(rows.RowsError, match="'a' was measured on H100 and on H200"):
        compare.compare(old, written(tmp_path / "other", row("a"), gpu="H200"))
    with pytest.raises(rows.RowsError, match="no case in common"):
        compare.compare(old, written(tmp_path / "another", row("b")))


def test_a_part_of_two_devices_has_no_table(tmp_path: Path) -> None:
    written(tmp_path, row("a"))
    with pytest.raises(rows.RowsError, match="rows of update are of several devices: H100, H200"):
        tables.of_part(written(tmp_path, row("b"), gpu="H200"), "update")


def test_a_goal_is_not_decided_if_the_host_limited_the_peer() -> None:
    limited = rows.Row("p", "c", {"npc_ext": 1.0}, ratio={"peer": (0.7, 0.8, 0.9)}, goals={"peer": 1.0})
    limited.facts = {rows.LIMITED: ["peer"]}
    assert "not decided against peer: limited by the host" in tables.of_rows([limited])


def test_rows_survive_a_writer_that_was_killed_and_the_last_of_a_case_counts(tmp_path: Path) -> None:
    written(tmp_path, row("a", seconds=1.0), row("b"), row("a", seconds=3.0))
    with (tmp_path / rows.NAME).open("a") as file:
        file.write('{"kind": "row", "part": "upd')
    found = rows.read(tmp_path)
    assert [one.case for one in found.of_part("update")] == ["b", "a"]
    assert found.rows["update", "a"].seconds == {"npc_ext": 3.0}
    assert found.runs["update", "a"]["environment"]["gpu"] == "H100"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json\n{}\n", "line 1 is not JSON"),
        ("[1]\n{}\n", "line 1 is no object of JSON"),
        ('{"kind": "else"}\n', "line 1: its kind is 'else'; expected a line of kind run, row or part"),
        ('{"kind": "row", "part": "a", "case": "b", "more": 1}\n', "unexpected keyword argument 'more'"),
    ],
)
def test_a_damaged_file_of_rows_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / rows.NAME).write_text(text)
    with pytest.raises(rows.RowsError, match=message):
        rows.read(tmp_path)


def test_a_missing_file_of_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(rows.RowsError, match=r"nothing does not exist; expected a file of rows"):
        rows.read(tmp_path / "nothing")


def test_tables_show_quartiles_verdicts_and_what_is_not_measured() -> None:
    shown = tables.of_rows(
        [
            rows.Row("p", "good", {"npc_ext": 1e-3}, ratio={"peer": (1.0, 1.1, 1.2)}, goals={"peer": 1.0}, bytes=10**6),
            rows.Row("p", "noisy", {"npc_ext": 2.0}, ratio={"peer": (0.8, 0.9, 1.1)}, goals={"peer": 1.0}),
            rows.Row("p", "bad", {"npc_ext": 2e-6}, ratio={"peer": (0.7, 0.8, 0.9)}, goals={"peer": 1.0}),
            rows.Row("p", "counted", facts={"launches": None}),
        ]
    )
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()]
    assert lines[0] == ["case", "npc_ext", "GB/s", "peer, times as long", "launches", "goal"]
    assert lines[2] == ["good", "1.00 ms", "1", "1.10 (1.00 to 1.20)", "", "reached (at least 1.00 of peer)"]
    assert lines[3][-1] == "within the noise (at least 1.00 of peer)"
    assert lines[4][-1] == "missed (at least 1.00 of peer)"
    assert lines[5] == ["counted", "", "", "", "not measured", ""]


@pytest.mark.parametrize("name", ["EWC", "MAS", "SI", "SSL"])
def test_peers_of_the_methods_take_the_same_step_away_from_the_anchors(name: str) -> None:
    case = Method(name, lambda: cnn(1, 8, (4, 8), 16, 10), 5)
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
    assert tables.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / 3**0.5))


def test_timing_finds_the_slower_function_and_cold_sets_fill_the_caches() -> None:
    peers = {"ours": lambda _: sum(range(100)), "peer": lambda _: sum(range(20_000))}
    result = measure("p", Case("c", peers, turns=5, seconds_per_turn=0.002), HostTimer())
    assert result.ratio["peer"][0] > 2
    assert (sets_of(2**30), sets_of(2**20), sets_of(1)) == (1, 64, 256)


def test_a_peer_that_computes_something_else_is_not_timed() -> None:
    def wrong(name: str) -> None:
        raise AssertionError(f"{name} is off")

    with pytest.raises(AssertionError, match="ours is off"):
        measure("p", Case("c", {"ours": lambda _: None}, check=wrong), HostTimer())
