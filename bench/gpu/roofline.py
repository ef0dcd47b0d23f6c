"""The roofline figure: time against bytes moved, beside the time that the machine's own copy of them takes."""

from __future__ import annotations

import json
from pathlib import Path


def draw(folder: Path) -> None:
    """Draws roofline.svg and roofline.png from the stored parts; nothing if they are not there."""
    path = folder / "importance.json"
    if not path.exists():
        return
    rows = json.loads(path.read_text())["rows"]
    if not rows:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["bytes"] for r in rows], [r["seconds"]["npc_ext"] for r in rows], "o", label="importance")
    if (folder / "update.json").exists():
        updates = [r for r in json.loads((folder / "update.json").read_text())["rows"] if "frozen" not in r["case"]]
        axes.plot([r["bytes"] for r in updates], [r["seconds"]["npc_ext"] for r in updates], "s", label="update")
    fastest = max(row["copy, GB/s"] for row in rows) * 1e9
    ends = [min(row["bytes"] for row in rows), max(row["bytes"] for row in rows)]
    axes.plot(ends, [end / fastest for end in ends], "k--", label=f"copy, {fastest / 1e9:.0f} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="bytes moved", ylabel="seconds")
    axes.legend()
    for suffix in ("svg", "png"):
        figure.savefig(folder / f"roofline.{suffix}", dpi=150)
