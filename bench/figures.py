"""Figures of benchmarks, drawn from rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .rows import OURS, Results, Row
from .tables import save

SHARE, NETWORK = "share certified", "network"  # the facts that the figure of certified neurons is drawn from


def draw(results: Results, folder: Path) -> None:
    """Draws what the rows give: `frozen`, and where ceilings were measured, `roofline`."""
    frozen = [row for row in results.of_part("frozen") if SHARE in row.facts]
    if frozen:
        save(_frozen(frozen), folder / "frozen")
    ceilings = {part: [row for row in results.of_part(part) if _ceiling(row)] for part in results.names()}
    if any(ceilings.values()):
        save(_roofline({part: rows for part, rows in ceilings.items() if rows}), folder / "roofline")


def _frozen(rows: Sequence[Row]) -> Figure:
    """Step time in units of SGD's over the share of certified neurons, an axis for each network."""
    networks = list(dict.fromkeys(row.facts[NETWORK] for row in rows))
    figure = Figure(figsize=(3.4 * len(networks), 3.2), layout="constrained")
    grid: Any = figure.subplots(1, len(networks), squeeze=False)[0]
    for axes, network in zip(grid, networks, strict=True):
        of_network = [row for row in rows if row.facts[NETWORK] == network]
        for name in of_network[0].seconds:
            relative = [row.seconds[name] / row.seconds["SGD fused"] for row in of_network]
            axes.plot([row.facts[SHARE] for row in of_network], relative, marker="o", markersize=3, label=name)
        axes.set(title=network, xlabel="share of neurons certain not to move", ylim=(0, None))
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("step time / fused SGD's")
    figure.legend(*grid[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _ceiling(row: Row) -> str:
    """The peer that moves as many bytes with the same mix of reads and writes, and does nothing else."""
    if not row.bytes or OURS not in row.seconds:
        return ""
    return next((peer for peer in row.seconds if peer.startswith("ceiling")), "")


def _roofline(parts: dict[str, list[Row]]) -> Figure:
    """Time over bytes moved, beside the ceiling measured for each row's own mix of reads and writes."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (part, rows), marker in zip(parts.items(), "os^Dv<>", strict=False):
        axes.plot([row.bytes or 0 for row in rows], [row.seconds[OURS] for row in rows], marker, label=part)
    every = [row for rows in parts.values() for row in rows]
    axes.plot([row.bytes or 0 for row in every], [row.seconds[_ceiling(row)] for row in every], "k_", label="ceilings")
    axes.set(xscale="log", yscale="log", xlabel="bytes moved", ylabel="seconds")
    axes.legend(frameon=False)
    return figure
