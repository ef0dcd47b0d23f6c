"""A plugin of pytest that keeps the outcome of every test as a row, as soon as it is known.

`pytest -p bench.gpu.collect` writes to the folder that the environment variable NPC_BENCH_OUT names.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ..rows import Row, Writer

FOLDER = "NPC_BENCH_OUT"
PART = "tests"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called by pytest after each phase of a test."""
    if report.when != "call" and report.outcome == "passed":
        return
    facts: dict[str, str | float] = {"outcome": report.outcome, "seconds": round(report.duration, 3)}
    if report.failed:
        facts["error"] = str(report.longreprtext).strip().splitlines()[-1]
    Writer(Path(os.environ[FOLDER])).row(Row(PART, report.nodeid, facts=facts))
