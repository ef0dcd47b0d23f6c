"""Times our peer of one case after another on request. `bench.against` runs it once for each revision.

Reads requests from standard input and answers on standard output, a line of JSON each:

    {"command": "begin"}                            {"reason": why the compiled kernels cannot be used, or ""}
    {"command": "next", "after": a part or ""}      {"part", "case", "turns", "calls", "bytes"}, or {"part", "case",
                                                    "error"}, or {"part", "broken"} if an error ended the part, or
                                                    {"end"}; with "after", cases of that part are passed over
    {"command": "time", "first", "calls"}           {"seconds": of one call}
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from npc_ext.kernels import native

from ..answers import serve
from ..rows import OURS
from ..timing import Case, HostTimer, Timer, calls_per_turn, warm_up


def main() -> None:
    """Answers until the input ends."""
    parser = argparse.ArgumentParser(prog="python -m bench.against.worker", description=__doc__)
    parser.add_argument("module", help="has the parts")
    parser.add_argument("parts", nargs="*", help="default: all")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    module = importlib.import_module(arguments.module)
    timer: Timer = module.timer() if hasattr(module, "timer") else HostTimer()
    cases = _cases(module, arguments.parts or list(module.PARTS), arguments.quick)
    timed: list[Case] = []  # the case that is timed now

    def answer(request: Mapping[str, Any]) -> dict[str, Any]:
        if request["command"] == "begin":
            return {"reason": native.status().reason}
        if request["command"] == "time":
            return {"seconds": timer.seconds(timed[0], OURS, request["first"], request["calls"])}
        timed.clear()  # frees its memory
        timer.finish()
        part, case = next((pair for pair in cases if pair[0] != request["after"]), ("", None))
        if isinstance(case, Case):
            timed.append(case)
        return _described(part, case, timer)

    serve(answer)


def _cases(module: Any, parts: list[str], quick: bool) -> Iterator[tuple[str, Case | Exception]]:
    for part in parts:
        try:
            yield from ((part, case) for case in module.PARTS[part](quick) if isinstance(case, Case))
        except Exception as error:  # the revision may lack what these benchmarks use
            yield part, error


def _described(part: str, case: Case | Exception | None, timer: Timer) -> dict[str, Any]:
    if case is None:
        return {"end": True}
    if isinstance(case, Exception):
        return {"part": part, "broken": f"{type(case).__name__}: {case}"}
    named = {"part": part, "case": case.name}
    try:
        warm_up(case, OURS)
    except Exception as error:
        return {**named, "error": f"{type(error).__name__}: {error}"}
    return {**named, "turns": case.turns, "calls": calls_per_turn(case, OURS, timer), "bytes": case.bytes}


if __name__ == "__main__":
    main()
