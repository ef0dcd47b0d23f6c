"""Where a number comes from: command, machine, versions, commit, file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import ROOT

RESULTS = ROOT / "bench" / "results"
_MACHINE = ("processor", "threads", "torch", "python")


def _all_of(environments: Iterable[Mapping[str, Any]], key: str) -> str:
    return ", ".join(dict.fromkeys(str(environment[key]) for environment in environments))


def hardware_and_versions(environments: Collection[Mapping[str, Any]]) -> str:
    """Processor, threads and versions of one or more environments, as text."""
    processor, threads, torch, python = (_all_of(environments, key) for key in _MACHINE)
    of_threads = "thread" if threads == "1" else "threads"
    return f"{processor} ({threads} {of_threads}), torch {torch}, Python {python}"


def machine(environments: Iterable[Mapping[str, Any]]) -> str:
    """Processor, threads, versions and commit of one or more environments, as text."""
    seen = list(environments)
    commits = _all_of(seen, "commit")
    return f"{hardware_and_versions(seen)}, commit{'s' if ', ' in commits else ''} {commits}"


def link(path: str) -> str:
    """A link from a page to a file or folder under bench/results."""
    if not (RESULTS / path).exists():
        raise FileNotFoundError(f"{RESULTS / path} does not exist; a page links to it")
    return f"[{Path(path).name}](../../bench/results/{path})"


def source(command: str, environments: Iterable[Mapping[str, Any]], *paths: str) -> str:
    """One line about a measurement: its command, its machine and its files."""
    return f"Measured by `{command}` on {machine(environments)}: {', '.join(map(link, paths))}."
