"""Measures parts within one process when told to: `python -m bench.gpu.worker OUT`, which `bench.gpu` starts.

Reads a request on each line of standard input, {"part": ..., "limit": seconds}, and answers on standard output with
{"state": ..., "error": ...}. Rows are kept as they are measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from .. import environment
from ..rows import Row, Writer
from ..timing import measure
from .device import Device
from .parts import PARTS

_MARGIN = 3.0  # seconds before a part's limit in which no further case begins
_DRY_TURNS = 2


def main() -> None:
    """Answers until the input ends."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.worker", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--command", required=True, help="of the flight, as its rows tell it")
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    # What anything else prints must not be taken for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.manual_seed(0)
    device, writer = Device(arguments.dry), Writer(arguments.out)
    writer.run(arguments.command, {**environment.describe(), **device.describe()})
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_measure(request["part"], request["limit"], device, writer)), file=answers, flush=True)


def _measure(part: str, limit: float, device: Device, writer: Writer) -> dict[str, Any]:
    """Measures a part, as far as its time allows; what it had before it failed is kept."""
    started = time.perf_counter()
    try:
        for case in PARTS[part](device):
            print(f"{part}: {case.case if isinstance(case, Row) else case.name}", flush=True)
            row = (
                case if isinstance(case, Row) else measure(part, case, device.timer, _DRY_TURNS if device.dry else None)
            )
            row.goals = {} if device.dry else row.goals  # a dry run reaches none and misses none
            writer.row(row)
            del case  # its memory is needed
            if time.perf_counter() - started > limit - _MARGIN:
                return {"state": "out of time", "error": ""}
    except Exception:  # the other parts are still worth their time
        traceback.print_exc()
        return {"state": "failed", "error": traceback.format_exc().strip().splitlines()[-1]}
    finally:
        gc.collect()
        if not device.dry:
            torch.cuda.empty_cache()
    return {"state": "complete", "error": ""}


if __name__ == "__main__":
    main()
