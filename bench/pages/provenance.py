"""Where a number comes from: command, machine, versions, commit, file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import ROOT

RESULTS = ROOT / "bench" / "results"


def machine(environments: Iterable[Mapping[str, Any]]) -> str:
    """Processor, threads, versions and commit of one or more environments, as text."""
    seen = list(environments)

    def all_of(key: str) -> str:
        return ", ".join(dict.fromkeys(str(environment[key]) for environment in seen))

    threads = all_of("threads")
    commits = all_of("commit")
    return (
        f"{all_of('processor')} ({threads} {'thread' if threads == '1' else 'threads'}), torch {all_of('torch')}, "
        f"Python {all_of('python')}, commit{'s' if ', ' in commits else ''} {commits}"
    )


def link(path: str) -> str:
    """A link from a page to a file or folder under bench/results."""
    if not (RESULTS / path).exists():
        raise FileNotFoundError(f"{RESULTS / path} does not exist; a page links to it")
    return f"[{Path(path).name}](../../bench/results/{path})"


def source(command: str, environments: Iterable[Mapping[str, Any]], *paths: str) -> str:
    """One line about a measurement: its command, its machine and its files."""
    return f"Measured by `{command}` on {machine(environments)}: {', '.join(map(link, paths))}."
