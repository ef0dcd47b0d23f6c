"""A pytest plugin that records the outcome of every test as a row, as soon as it is known.

`pytest -p bench.gpu.collect` writes to the folder that the environment variable NPC_BENCH_OUT names, as rows of the
part that NPC_BENCH_PART names.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ..rows import Row, Writer

FOLDER, NAME = "NPC_BENCH_OUT", "NPC_BENCH_PART"


def _keep(test: str, **facts: str | float) -> None:
    Writer(Path(os.environ[FOLDER])).row(Row(os.environ.get(NAME, "tests"), test, facts=facts))


def pytest_runtest_logstart(nodeid: str) -> None:
    """Called by pytest before each test. If the GPU hangs, this row says where; otherwise another row replaces it."""
    _keep(nodeid, outcome="not finished")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called by pytest after each phase of a test."""
    if report.when != "call" and report.outcome == "passed":
        return
    error = {"error": str(report.longreprtext).strip().splitlines()[-1]} if report.failed else {}
    _keep(report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), **error)
