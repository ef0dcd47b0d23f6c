"""What an experiment that is a program of its own leaves: a table, figures and all numbers."""

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
    """Writes results.md, results.json and the figures to a folder, and says so.

    Args:
        out: the folder.
        command: what made the results.
        seconds: how long that took.
        table: in Markdown.
        figures: by name.
        numbers: all that was measured.
    """
    for name, figure in figures.items():
        save(figure, out / name)
    (out / "results.md").write_text(f"{table}\n\n`{command}`, {seconds:.0f} s\n")
    everything = {"command": command, "seconds": seconds, "environment": environment.describe(), **numbers}
    (out / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
    print(f"\n{seconds:.0f} s. Figures and numbers: {out}/")
