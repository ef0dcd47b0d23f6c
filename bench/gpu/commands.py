"""The parts of the flights that are commands of their own: what to run, and what to keep of it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..rows import Row, Writer, read
from .collect import FOLDER, PART
from .processes import Command, Settings

# The GPU tests, those first that only a GPU can pass or fail. Other files need packages that a GPU machine may lack.
TESTS = (
    *("test_gpu", "test_importance", "test_update", "test_adam_update", "test_rounding"),
    *("test_anchored_update", "test_connection_update", "test_npc", "test_nn", "test_skip", "test_consolidation"),
    "test_gpu_compile",  # last: compiling takes as long as all others
)
_OURS = "3npc4cuda"  # in the mangled names of all our kernels
_METRICS = {
    "gpu__time_duration.sum": "duration",
    "dram__bytes_read.sum": "bytes read",
    "dram__bytes_write.sum": "bytes written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory, % of peak",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio": "sectors a load",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio": "sectors a store",
    "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum": "loads",
    "l1tex__t_requests_pipe_lsu_mem_global_op_st.sum": "stores",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
}


def tests(settings: Settings) -> Command:
    """The tests that need a GPU. They are skipped, and counted, where there is none."""
    files = [f"tests/{name}.py" for name in TESTS]
    options = ["-q", "-m", "gpu", "--maxfail=10", "-p", "no:cacheprovider", "-p", "bench.gpu.collect"]

    def verdict(status: int) -> Mapping[str, Any]:
        outcomes = [row.facts["outcome"] for row in read(settings.out).of_part(PART)]
        counts = {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")}
        told = {"state": "complete", **counts}
        if status != 0 or counts["failed"]:
            return {**told, "state": "failed", "error": f"pytest ended with status {status}"}
        if not outcomes or not (counts["passed"] or settings.dry):
            return {**told, "state": "failed", "error": "no test ran"}
        return told

    # Plugins that happen to be installed are not loaded.
    environment = {FOLDER: str(settings.out), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return Command([sys.executable, "-m", "pytest", *options, *files], verdict, environment=environment)


def sanitizer(settings: Settings) -> Command:
    """compute-sanitizer's memcheck over every kernel of ours; in a dry run the kernels without it."""
    program = [sys.executable, "-m", "bench.gpu.exercise", "cpu" if settings.dry else "cuda"]
    tool = None if settings.dry else shutil.which("compute-sanitizer")
    report = settings.out / "memcheck.txt"
    command = [
        *(str(tool), "--tool", "memcheck", "--kernel-name", f"kns={_OURS}", "--report-api-errors", "no"),
        *("--error-exitcode", "9", "--print-limit", "20", "--log-file", str(report)),
    ]

    def verdict(status: int) -> Mapping[str, Any]:
        summary = re.search(r"ERROR SUMMARY: (\d+) error", report.read_text()) if report.exists() else None
        errors = None if summary is None else int(summary[1])
        if status != 0 or errors:
            return {"state": "failed", "error": f"status {status}, {errors} memory errors; see {report.name}"}
        if tool and errors is None:
            return {"state": "failed", "error": f"compute-sanitizer told no result; see {report.name}"}
        return {"state": "complete", "memory errors": "not measured" if errors is None else errors}

    # Without torch's own reserve of memory every tensor ends where its allocation ends.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", FOLDER: str(settings.out)}
    return Command([*command, *program] if tool else program, verdict, environment=alone)


def revisions(settings: Settings) -> Command | str:
    """The kernels of this checkout against those of another revision, in turns."""
    if settings.against is None:
        return "not asked for (--against)"
    command = [sys.executable, "-m", "bench.against", settings.against, "bench.gpu.revisions"]
    command += ["--out", str(settings.out)]
    return Command(command, _plain)


def counters(settings: Settings) -> Command | str:
    """What Nsight Compute counts of the four main kernels; in a dry run they run without it."""
    program = [sys.executable, "-m", "bench.gpu.exercise", "cpu" if settings.dry else "cuda", "--counters"]
    tool = None if settings.dry else shutil.which("ncu")
    if not settings.dry and tool is None:
        return "not measured: there is no ncu"
    table = settings.scratch / "counters.csv"
    command = [
        *(str(tool), "--clock-control", "none", "--metrics", ",".join(_METRICS), "--csv", "--log-file", str(table)),
        *("--kernel-name-base", "mangled", "--kernel-name", f"regex:{_OURS}"),
    ]

    def verdict(status: int) -> Mapping[str, Any]:
        if table.exists():
            for row in rows_of_counters(table.read_text()):
                Writer(settings.out).row(row)
        return _plain(status)

    return Command([*command, *program] if tool else program, verdict)


def rows_of_counters(text: str) -> list[Row]:
    """The rows of ncu's CSV: a line for every metric of every launch, after lines of other kinds."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in csv.DictReader(lines[start:]):
        kernel = entry["Kernel Name"].split("(")[0]
        value = f"{entry['Metric Value']} {entry['Metric Unit']}".strip()
        facts.setdefault((entry["ID"], kernel), {})[_METRICS[entry["Metric Name"]]] = value
    return [Row("counters", f"{number}: {kernel}", facts=found) for (number, kernel), found in facts.items()]


def icifar100(settings: Settings) -> Command | str:
    """iCIFAR100 with NPC at the paper's size, one seed, kept task by task; small in a dry run."""
    if settings.data is None:
        return "not asked for (--data)"
    store = settings.scratch / "store"
    if settings.resume is not None:
        with tarfile.open(settings.resume) as archive:
            archive.extractall(store, filter="data")
    options = ["--experiment", "icifar100", "--methods", "npc", "--seeds", "1"]
    if settings.dry:
        options += ["--size", "small", "--device", "cpu", "--set", "epochs=1", "channels=(4,4,4)", "hidden=8"]
    else:
        options += ["--size", "paper", "--device", "cuda", "--cuda-graph", "--tf32"]
    command = [sys.executable, "-m", "bench.continual", "run", *options]
    command += ["--data", str(settings.data), "--store", str(store)]
    seen: dict[Path, float] = {}

    def look() -> None:
        for path in store.glob("*/*/*/seed*.json"):
            if seen.get(path) != path.stat().st_mtime:
                seen[path] = path.stat().st_mtime
                record = json.loads(path.read_text())
                facts = {name: record[name] for name in ("tasks", "accuracy", "seconds", "steps", "settings")}
                done = len(record["accuracy"])
                Writer(settings.out).row(Row("icifar100", f"NPC, seed 0, after {done} tasks", facts=facts))
                _pack(store, settings.out / "icifar100.tar")

    return Command(command, _plain, look)


def _pack(store: Path, target: Path) -> None:
    """Puts a store into one file, whose old content stays until the new one is complete."""
    staged = target.with_suffix(".tmp")
    with tarfile.open(staged, "w") as archive:
        archive.add(store, ".", filter=lambda member: None if member.name.endswith(".lock") else member)
    staged.replace(target)


def _plain(status: int) -> Mapping[str, Any]:
    if status == 0:
        return {"state": "complete"}
    return {"state": "failed", "error": f"it ended with status {status}; see log.txt"}


COMMANDS: dict[str, Callable[[Settings], Command | str]] = {
    part.__name__: part for part in (tests, sanitizer, revisions, counters, icifar100)
}
