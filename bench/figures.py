"""Figures of benchmarks, drawn from rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .rows import OURS, Results, Row
from .tables import save

SHARE, NETWORK = "share certified", "network"  # facts that the figure of certified neurons needs


def draw(results: Results, folder: Path) -> None:
    """Draws the figure `frozen`, and `roofline` if ceilings were measured."""
    frozen = [row for row in results.of_part("frozen") if SHARE in row.facts]
    if frozen:
        save(_frozen(frozen), folder / "frozen")
    ceilings = {part: [row for row in results.of_part(part) if _ceiling(row)] for part in results.names()}
    if any(ceilings.values()):
        measured = {part: rows for part, rows in ceilings.items() if rows}
        save(_roofline(measured, results.device_of(next(iter(measured)))), folder / "roofline")


def _frozen(rows: Sequence[Row]) -> Figure:
    """Step time relative to SGD's over the share of certified neurons, one plot for each network."""
    networks = list(dict.fromkeys(row.facts[NETWORK] for row in rows))
    columns = min(len(networks), 2)
    lines = -(-len(networks) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.7 * lines + 0.4), layout="constrained")
    grid: Any = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(networks) :]:
        axes.remove()
    for axes, network in zip(grid.flat, networks, strict=False):
        of_network = [row for row in rows if row.facts[NETWORK] == network]
        for name in of_network[0].seconds:
            relative = [row.seconds[name] / row.seconds["SGD fused"] for row in of_network]
            axes.plot([row.facts[SHARE] for row in of_network], relative, marker="o", markersize=3, label=name)
        axes.set_title(network, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylim(0, None)  # of all
    figure.supxlabel("share of neurons certain not to move", fontsize=10)
    figure.supylabel("step time / fused SGD's", fontsize=10)
    labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(*labels, frameon=False, loc="outside upper center", ncols=3, fontsize=9)
    return figure


def _ceiling(row: Row) -> str:
    """The peer that moves the same number of bytes, with the same mix of reads and writes, and does nothing else."""
    if not row.bytes or OURS not in row.seconds:
        return ""
    return next((peer for peer in row.seconds if peer.startswith("ceiling")), "")


def _roofline(parts: dict[str, list[Row]], device: str) -> Figure:
    """Our bandwidth relative to the ceiling's over the bytes moved. Goals hold for the sizes right of the line."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for (part, rows), marker in zip(parts.items(), "os^Dv<>", strict=False):
        shares = [row.seconds[_ceiling(row)] / row.seconds[OURS] for row in rows]
        axes.plot([(row.bytes or 0) / 2**20 for row in rows], shares, marker, markersize=5, label=part)
    axes.axhline(1, color="#222222", linewidth=1)
    axes.axhline(0.9, color="#222222", linewidth=1, linestyle="--")
    axes.axvline(64, color="#999999", linewidth=0.7)
    axes.set(xscale="log", ylim=(0, None), title=device, xlabel="MiB moved (goals hold right of 64)")
    axes.set_ylabel("bandwidth / ceiling's (dashed: goal)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
