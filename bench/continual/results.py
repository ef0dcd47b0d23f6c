"""The result files of an experiment with its own program: a table, figures, and all numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import environment
from ..tables import save


def write(
    out: Path, command: str, seconds: float, table: str, figures: Mapping[str, Any], numbers: Mapping[str, Any]
) -> None:
    """Writes results.md, results.json and the figures to a folder, and prints where they are.

    Args:
        out: folder of the results.
        command: the command of the experiment.
        seconds: how long it took.
        table: the table, in Markdown.
        figures: the figures, by name.
        numbers: everything that was measured.
    """
    for name, figure in figures.items():
        save(figure, out / name)
    (out / "results.md").write_text(f"{table}\n\n`{command}`, {seconds:.0f} s\n")
    everything = {"command": command, "seconds": seconds, "environment": environment.describe(), **numbers}
    (out / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
    print(f"\n{seconds:.0f} s. Figures and numbers: {out}/")
