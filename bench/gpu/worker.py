"""Measures parts in one process on request: `python -m bench.gpu.worker OUT`, which `bench.gpu` starts.

Reads a request on each line of standard input, {"part": ..., "limit": seconds}, and answers on standard output with
{"state": ..., "error": ...}. Rows are written as soon as they are measured.
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .. import environment
from ..answers import serve
from ..rows import Row, Writer
from ..timing import Later, measure
from .device import Device
from .parts import PARTS

_DRY_TURNS = 2


def main() -> None:
    """Answers until the input ends."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.worker", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--command", required=True, help="of the flight, for its rows")
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device, writer = Device(arguments.dry), Writer(arguments.out)
    writer.run(arguments.command, {**environment.describe(), **device.describe()})
    serve(lambda request: measure_part(request["part"], request["limit"], device, writer))


def measure_part(part: str, limit: float, device: Device, writer: Writer) -> dict[str, Any]:
    """Measures a part as far as its time allows. A case that fails gets a row with the error; the others continue."""
    started, longest, errors = time.perf_counter(), 0.0, 0
    try:
        for item in PARTS[part](device):
            began = time.perf_counter()
            if began - started + longest > limit:
                return {"state": "out of time"}
            row = item if isinstance(item, Row) else _row(item, part, device)
            writer.row(row)
            errors += "error" in row.facts
            longest = max(longest, time.perf_counter() - began)
            device.synchronize()
    except Exception as error:  # an error of the device, after which nothing works, or of the part itself
        traceback.print_exc()
        return {"state": "failed", "error": f"{type(error).__name__}: {error}", "lost": True}
    finally:
        gc.collect()
        with suppress(Exception):
            device.empty_cache()
    return {"state": "failed", "error": f"{errors} cases failed"} if errors else {"state": "complete"}


def _row(later: Later, part: str, device: Device) -> Row:
    print(f"{part}: {later.name}", flush=True)
    part = later.part or part
    try:
        made = later.make()
        row = made if isinstance(made, Row) else measure(part, made, device.timer, _DRY_TURNS if device.dry else None)
    except Exception as error:
        traceback.print_exc()
        device.timer.finish()
        return Row(part, later.name, facts={"error": f"{type(error).__name__}: {error}"})
    row.goals = {} if device.dry else row.goals  # a dry run has no goals
    return row


if __name__ == "__main__":
    main()
