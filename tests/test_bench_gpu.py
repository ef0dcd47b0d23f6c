"""Everything that is measured on a GPU runs through on the CPU, and says what it did not measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu.networks import resnet18
from npc_ext import find_neurons

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["build", "sanitizer", "importance", "relu", "update", "launches", "step", "frozen", "memory"]


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu", "--dry", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu")
    result = run(out)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return out


def test_a_dry_run_goes_through_every_part(dry: Path) -> None:
    for part in [*PARTS, "tests"]:
        result = json.loads((dry / f"{part}.json").read_text())
        assert result["state"] == "complete"
        assert result["rows"]
    assert {"gpu.md", "roofline.svg", "roofline.png"} <= {path.name for path in dry.iterdir()}


def test_what_needs_a_gpu_is_not_measured_in_a_dry_run(dry: Path) -> None:
    rows = json.loads((dry / "launches.json").read_text())["rows"]
    assert all(row["launches"] is None for row in rows if "launches" in row)
    assert "not measured" in (dry / "gpu.md").read_text()


def test_parts_that_are_there_are_not_measured_again(dry: Path) -> None:
    before = (dry / "memory.json").read_text()
    assert "memory: is there, from before" in run(dry, "--only", "memory").stdout
    assert (dry / "memory.json").read_text() == before


def test_what_does_not_fit_the_time_is_named(tmp_path: Path) -> None:
    result = run(tmp_path, "--only", "memory", "--budget", "-1")
    assert result.returncode == 2
    assert "memory: not begun" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_run_is_possible() -> None:
    result = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "there is no GPU that torch can use; --dry" in result.stderr


def test_every_layer_of_the_resnet_is_measured_behind_its_norm() -> None:
    neurons = find_neurons(resnet18(8))
    assert len(neurons) == 21
    assert all(layer.points for layer in neurons)
