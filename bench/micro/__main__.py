"""Micro-benchmarks, each timed in turns with its peers: `make bench`.

Writes rows as they are measured, and then their tables and figures, to bench/results/micro. With `--against REV`, times
this checkout in turns with another revision instead.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .. import command_line, environment
from ..against.revision import RevisionError, checkout
from ..against.turns import AGAINST, against
from ..arguments import output_folder
from ..rows import Row, Writer, read
from ..tables import write
from ..timing import HostTimer, measure
from .parts import PARTS

# Parts whose cases only time this package.
COMPARABLE = [name for name in PARTS if name not in ("calls", "where")]
QUICK_TURNS = 3
_FOR_THE_CPU = {"NPC_EXT_NVCC": ""}  # the CUDA kernels of another revision take minutes to build


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the given parts."""
    parser = argparse.ArgumentParser(prog="python -m bench.micro", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="a few small cases, to see that it works")
    parser.add_argument("--against", metavar="REV", help="another revision, or a folder that it is checked out in")
    default = "bench/results/micro, or with --against bench/results/against/REV"
    parser.add_argument("--out", type=output_folder, help=f"folder for the results (default: {default})")
    options = parser.parse_args(arguments)
    possible = COMPARABLE if options.against else list(PARTS)
    options.only = options.only or possible
    if impossible := [part for part in options.only if part not in possible]:
        parser.error(f"--against cannot compare {', '.join(impossible)}; it compares {', '.join(COMPARABLE)}")
    try:  # before rows are dropped
        other = str(checkout(options.against)) if options.against else ""
    except RevisionError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    out = options.out or Path("bench/results") / (f"against/{options.against}" if options.against else "micro")
    writer = Writer(out)
    writer.drop([*options.only, *(f"{part}-{AGAINST}" for part in options.only)])
    writer.run(command_line("bench.micro", arguments), environment.describe())
    if options.against:
        try:
            slower = against(other, "bench.micro.parts", options.only, options.quick, writer, _FOR_THE_CPU)
        except RevisionError as error:
            parser.error(str(error))
        write(read(writer.path), out)
        print("\nSlower than before, beyond the spread: " + ("; ".join(slower) or "nothing"))
        return int(bool(slower))
    timer = HostTimer()
    for part in options.only:
        started = time.perf_counter()
        for case in tqdm(PARTS[part](options.quick), desc=part, unit="case", leave=False):
            row = case if isinstance(case, Row) else measure(part, case, timer, QUICK_TURNS if options.quick else None)
            row.goals = {} if options.quick else row.goals  # too few turns to reach or to miss one
            writer.row(row)
        writer.part(part, "complete", time.perf_counter() - started)
        write(read(writer.path), out, [part])
    return 0


if __name__ == "__main__":
    sys.exit(main())
