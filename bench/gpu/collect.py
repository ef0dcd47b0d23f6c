"""Keeps rows for the part of a flight that a process belongs to, as soon as they are known.

The row's folder and part are in the environment variables NPC_BENCH_OUT and NPC_BENCH_PART. As a pytest plugin
(`pytest -p bench.gpu.collect`) this module keeps a row of the outcome of every test.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ..rows import Row, Writer

FOLDER, NAME = "NPC_BENCH_OUT", "NPC_BENCH_PART"
# After so many failures the rest of a file is skipped, so that a flight comes to the other files, too. If nothing works
# any more, as after an illegal access to the GPU's memory, this ends the run soon.
MOST_FAILURES = 5
_failures = Counter[str]()  # by file


def keep(case: str, **facts: Any) -> None:
    """Writes a row of a case, if the process belongs to a part."""
    if folder := os.environ.get(FOLDER):
        Writer(Path(folder)).row(Row(os.environ[NAME], case, facts=facts))


def _file_of(test: str) -> str:
    return test.split("::")[0]


def pytest_runtest_logstart(nodeid: str) -> None:
    """Called by pytest before each test. If the GPU hangs, this row says where; otherwise another row replaces it."""
    keep(nodeid, outcome="not finished")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Called by pytest before each test is set up."""
    if _failures[_file_of(item.nodeid)] >= MOST_FAILURES:
        pytest.skip(f"{MOST_FAILURES} tests of this file failed")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called by pytest after each phase of a test."""
    if report.when != "call" and report.outcome == "passed":
        return
    _failures[_file_of(report.nodeid)] += report.failed
    error = {"error": _reason(report.longreprtext)} if report.failed else {}
    keep(report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), **error)


def _reason(text: str) -> str:
    """The error of a failed test, from its report, in which pytest marks the lines of errors and ends with a place."""
    lines = text.strip().splitlines() or [""]
    error = next((line[1:].strip() for line in lines if line.startswith("E ")), "")
    return f"{error} ({lines[-1]})" if error else lines[-1]
