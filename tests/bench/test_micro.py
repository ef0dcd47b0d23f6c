"""The micro-benchmarks write rows and tables, compare revisions, and time only peers that compute the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from bench import ROOT, rows
from bench.micro.__main__ import main
from bench.micro.methods import Method
from bench.networks import cnn, resnet18
from bench.timing import Case, HostTimer, check, measure, sets_of
from npc_ext import find_neurons


@pytest.mark.slow
def test_the_micro_benchmarks_write_rows_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ("update", "adam", "calls", "frozen", "where", "host")
    assert main(["--quick", "--only", *parts, "--out", str(tmp_path)]) == 0
    assert "| 1,000 parameters " in capsys.readouterr().out
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
        assert kept["npc_ext"] <= kept["skip_gradients='none'"]

    assert main(["--quick", "--only", "calls", "--out", str(tmp_path)]) == 0
    assert len(rows.read(tmp_path).rows) == len(found.rows), "a part that is measured again takes the old one's place"
    assert (tmp_path / rows.NAME).read_text().count('"part": "calls"') == len(found.of_part("calls")) + 1


@pytest.mark.slow
def test_two_revisions_are_timed_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other revision is this one with a sleep in every step: it has to come out slower, and this one not."""
    other = tmp_path / "other"
    for name in ("npc_ext", "csrc", "bench"):
        shutil.copytree(ROOT / name, other / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
    launch = other / "npc_ext" / "kernels" / "launch.py"
    sound = "def update_(\n"
    assert sound in launch.read_text()
    slow = launch.read_text() + "\n\n_usual = update_\n\n\ndef update_(*arguments, **options):\n"
    launch.write_text(slow + "    import time\n\n    time.sleep(0.002)\n    _usual(*arguments, **options)\n")
    options = ["--quick", "--only", "update", "--against", str(other), "--out", str(tmp_path / "rows")]
    assert main(options) == 0
    assert "Slower than before, beyond the spread: nothing" in capsys.readouterr().out
    found = rows.read(tmp_path / "rows").of_part("update-revisions")
    assert len(found) == 8
    assert all(row.ratio["before"][0] > 3 for row in found)


def test_a_revision_that_git_does_not_know_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--quick", "--against", "no-such", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert "'no-such' is neither a revision of this repository nor a folder" in capsys.readouterr().err


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


def test_results_are_compared_relative_to_their_size_and_zeros_exactly() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    check("ours", zeros, zeros)
    check("ours", ones + 1e-6, ones)
    for got, want in [(ones * 1e-30, zeros), (zeros, ones), (ones + 1e-3, ones), (ones * torch.nan, zeros)]:
        with pytest.raises(AssertionError, match="ours is off"):
            check("ours", got, want)


def test_every_layer_of_the_resnet_is_measured_behind_its_norm() -> None:
    neurons = find_neurons(resnet18(8))
    assert len(neurons) == 21
    assert all(layer.points for layer in neurons)
