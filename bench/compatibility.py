"""Records the tests of the package with the versions installed: `PYTHON -m bench.compatibility`.

Runs tests/FOLDER for every folder of npc_ext, and writes what passed, failed and was skipped, and why, to
bench/results/compatibility/torch-X.Y-python-X.Y.md. Needs pytest, hypothesis and filelock; more tests run with more
packages. The exit status is 1 if a test failed.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
import torch

from . import ROOT, command_line
from .arguments import output_folder
from .environment import describe
from .tables import markdown

FOLDERS = sorted(path.name for path in (ROOT / "npc_ext").iterdir() if (ROOT / "tests" / path.name).is_dir())
PACKAGES = ("numpy", "pytest", "hypothesis", "expecttest", "filelock", "setuptools", "ninja", "pybind11")
OUTCOMES = ("passed", "failed", "skipped")


class Recorder:
    """A plugin of pytest that counts outcomes by test file, and reasons of skipped tests."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Counts a file that cannot be imported, or is skipped as a whole, as one test."""
        if not report.passed:
            self._count(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Counts a test when it ran, and when its setup or teardown does not pass, as pytest's summary does."""
        if report.when == "call" or not report.passed:
            self._count(report)

    def _count(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        self.outcomes[report.nodeid.split("::")[0]][report.outcome] += 1
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.skipped and isinstance(report.longrepr, tuple):
            self.reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1


def run(folder: Path, *tests: Path) -> Recorder:
    """Runs tests of a project whose folder is given. A file that cannot be imported does not stop the others.

    Raises:
        RuntimeError: the run did not come to its end.
    """
    recorder = Recorder()
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--rootdir", str(folder)]
    status = pytest.main([*options, *map(str, tests)], plugins=[recorder])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with status {int(status)}, so there is no record of this run")
    return recorder


def record(recorder: Recorder) -> str:
    """The record of a run, as Markdown."""
    environment = describe()
    versions = [(name, str(environment[name])) for name in ("python", "torch", "kernels", "processor")]
    versions[2:2] = [(name, _version(name)) for name in PACKAGES]
    files = [[file, *(str(counts[name]) for name in OUTCOMES)] for file, counts in sorted(recorder.outcomes.items())]
    totals = [sum(counts[name] for counts in recorder.outcomes.values()) for name in OUTCOMES]
    files.append(["**all**", *(f"**{total}**" for total in totals)])
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "without a GPU"
    torch_version, python = short_versions()
    parts = [
        f"# torch {torch_version} with Python {python}",
        f"`{command_line('bench.compatibility')}`, commit {environment['commit']}, {gpu}.",
        markdown(["what", "version"], versions),
        markdown(["tests", *OUTCOMES], files),
        _listed("Failed", [f"`{name}`" for name in recorder.failed]),
        _listed("Skipped because of", [f"{times}: {why}" for why, times in recorder.reasons.most_common()]),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _listed(title: str, items: Sequence[str]) -> str:
    return f"{title}:\n\n" + "\n".join(f"* {item}" for item in items) if items else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def short_versions() -> tuple[str, str]:
    """The versions of torch and Python, each without what follows the second number."""
    torch_version, python = (".".join(full.split(".")[:2]) for full in (torch.__version__, platform.python_version()))
    return torch_version, python


def main() -> int:
    """Runs the tests, and writes the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.compatibility", description=__doc__)
    parser.add_argument("--out", type=output_folder, default=ROOT / "bench" / "results" / "compatibility")
    arguments = parser.parse_args()
    try:
        recorder = run(ROOT, *(ROOT / "tests" / folder for folder in FOLDERS))
    except RuntimeError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    target: Path = arguments.out / "torch-{}-python-{}.md".format(*short_versions())
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(record(recorder), encoding="utf-8")
    print(target)
    return int(bool(recorder.failed))


if __name__ == "__main__":
    sys.exit(main())
