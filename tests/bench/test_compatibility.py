"""A record of a run of the tests counts what passed, failed and was skipped, and names failures and reasons."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench import ROOT

OUTCOMES = """
import pytest

def test_passes(): pass

def test_fails(): assert False

@pytest.mark.skip(reason="not here")
def test_is_skipped(): pass

@pytest.fixture
def broken():
    yield
    raise RuntimeError

def test_ends_badly(broken): pass
"""
RECORD = """
import sys
from pathlib import Path
from bench.compatibility import record, run
folder = Path(sys.argv[1])
print("RECORD", record(run(folder, folder)))
"""


def test_a_record_counts_every_test_and_names_what_failed(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_outcomes.py").write_text(OUTCOMES)
    (tmp_path / "test_lost.py").write_text("import no_such_package\n")
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.importorskip('no_such_package', reason='absent')\n")
    command = [sys.executable, "-c", RECORD, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.replace(" ", "") for line in result.stdout.split("RECORD ")[1].splitlines()]
    assert "|test_outcomes.py|2|2|1|" in lines
    assert "|test_lost.py|0|1|0|" in lines
    assert "|test_whole.py|0|0|1|" in lines
    assert "|**all**|**2**|**3**|**2**|" in lines
    assert "*`test_outcomes.py::test_fails`" in lines
    assert "*`test_outcomes.py::test_ends_badly`" in lines
    assert "*1:nothere" in lines
    assert "*1:absent" in lines


def test_a_run_that_was_interrupted_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_stops.py").write_text("def test_stops(): raise KeyboardInterrupt\n")
    command = [sys.executable, "-c", RECORD, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "RuntimeError: pytest ended with status 2, so there is no record of this run" in result.stderr
    assert "RECORD" not in result.stdout
