"""Everything that is measured on a GPU, in one call: `python -m bench.gpu`.

Builds, tests, looks for memory errors and measures, part by part; after each part its numbers are written to
bench/results/<GPU>/<part>.json, and the tables of all parts to gpu.md beside them. A part that is there, for the same
commit, is not measured again. `--dry` goes through all of it on the CPU, with tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import environment
from ..continual.report import markdown
from . import roofline
from .device import Device
from .parts import NOT_MEASURED, PARTS


def main() -> int:
    """Runs the parts asked for; the exit status is 1 if one failed, and 2 if time was too short for one."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--quick", action="store_true", help="fewer cases: about two minutes")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny: to see that everything runs")
    parser.add_argument("--again", action="store_true", help="also parts that are there already")
    parser.add_argument("--budget", type=float, default=520, help="seconds after which no further part begins")
    parser.add_argument("--out", type=Path, help="folder for the results (default: bench/results/<GPU>)")
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --dry goes through everything on the CPU")
    if arguments.dry and arguments.out is None:
        parser.error("--dry needs --out, so that nothing it writes is taken for a result")
    torch.manual_seed(0)
    device = Device(arguments.dry)
    described = {**environment.describe(), **device.describe()}
    slug = re.sub(r"\W+", "-", str(described["gpu"]).lower()).strip("-")
    out: Path = arguments.out or Path("bench/results") / slug
    out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m bench.gpu", *sys.argv[1:]])
    started = time.perf_counter()
    status = 0
    for name in tqdm(arguments.only, desc="parts", unit="part"):
        target = out / f"{name}.json"
        if not arguments.again and _is_done(target, described, arguments.quick):
            print(f"{name}: is there, from before", flush=True)
            continue
        if time.perf_counter() - started > arguments.budget:
            print(f"{name}: not begun, {arguments.budget:.0f} seconds are over; call again for the rest", flush=True)
            status = max(status, 2)
            continue
        result = _run(name, device, arguments.quick)
        result |= {"command": command, "quick": arguments.quick, "environment": described}
        target.write_text(json.dumps(result, indent=1, default=str) + "\n")
        (out / "gpu.md").write_text(_tables(out))
        print(f"{name}: {result['state']}, {result['seconds']:.0f} s", flush=True)
        if result["state"] == "failed":
            print(result["error"], file=sys.stderr, flush=True)
            status = 1
    roofline.draw(out)
    print(_tables(out))
    return status


def _run(name: str, device: Device, quick: bool) -> dict[str, Any]:
    """One part's rows; what it had before it failed is kept."""
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"state": "complete", "rows": rows}
    try:
        for row in PARTS[name](device, quick):
            rows.append(row)
    except Exception:  # the other parts are still worth their time
        result |= {"state": "failed", "error": traceback.format_exc()}
    return {**result, "seconds": time.perf_counter() - started}


def _is_done(target: Path, described: dict[str, Any], quick: bool) -> bool:
    if not target.exists():
        return False
    before = json.loads(target.read_text())
    same = before["environment"]["commit"] == described["commit"] and before["environment"]["gpu"] == described["gpu"]
    return bool(before["state"] == "complete" and same and before["quick"] == quick)


def _tables(out: Path) -> str:
    """The tables of all parts that are there."""
    texts = []
    for name, part in PARTS.items():
        if not (out / f"{name}.json").exists():
            continue
        result = json.loads((out / f"{name}.json").read_text())
        texts.append(f"### {name}: {part.__doc__}\n")
        columns = list(dict.fromkeys(key for row in result["rows"] for key in row if key not in ("tail", "seconds")))
        if columns:
            texts.append(markdown(columns, [[_cell(row.get(key, "")) for key in columns] for row in result["rows"]]))
        if result["state"] == "failed":
            texts.append(f"\n**failed**: {result['error'].strip().splitlines()[-1]}")
        texts.append(
            f"\n{result['environment']['gpu']}, commit {result['environment']['commit']}, `{result['command']}`\n"
        )
    return "\n".join(texts)


def _cell(value: Any) -> str:
    """A value as a table shows it; what could not be measured is said to be so."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return f"{value[1]:.3g} ({value[0]:.3g} to {value[2]:.3g})" if len(value) == 3 else str(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(one)}" for key, one in value.items())
    return str(value).replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
