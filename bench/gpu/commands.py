"""The parts of the flights that run as commands: what to run, and which results to keep."""

from __future__ import annotations

import csv
import glob
import json
import re
import shutil
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..rows import NOT_MEASURED, Row, Writer, read
from .collect import FOLDER, NAME
from .processes import KILLED, Command, Settings

# The tests that need a GPU, with those first that only a GPU can fail; and those that compile.
TESTS = (
    *("kernels/test_gpu", "kernels/test_importance", "kernels/test_every_update", "kernels/test_update"),
    *("kernels/test_rounding", "kernels/test_anchored_update", "optim/test_npc"),
    *("skipping/test_skipping", "baselines/test_consolidation"),
)
COMPILE_TESTS = ("kernels/test_gpu_compile",)
KERNELS = "3npc4cuda"  # part of the mangled names of all our kernels
_RECORDS = "*/*/*/seed*.json"  # of iCIFAR100, in its store
_MOST_LINES = 5  # of a tool's explanation of its failure
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
    """Runs the tests that need a GPU. Without one, they are skipped and counted."""
    return _tests(settings, "tests", TESTS)


def compile_tests(settings: Settings) -> Command:
    """Runs the tests of models that torch.compile replays as CUDA graphs."""
    return _tests(settings, "compile_tests", COMPILE_TESTS)


def _tests(settings: Settings, part: str, names: Sequence[str]) -> Command:
    files = [f"tests/{name}.py" for name in names]
    # A test that hangs prints its stack. After a few failures in a file, collect.py skips the rest of it.
    options = ["-v", "-m", "gpu", "-o", "faulthandler_timeout=25"]
    options += ["-p", "no:cacheprovider", "-p", "bench.gpu.collect"]

    def verdict(status: int | None) -> Mapping[str, Any]:
        outcomes = [row.facts["outcome"] for row in read(settings.out).of_part(part)]
        counts = {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped", "not finished")}
        if status != 0 or counts["failed"]:
            return {**_plain(status), "state": "failed", **counts}
        if not outcomes or not (counts["passed"] or settings.dry):
            return {"state": "failed", **counts, "error": "no test ran"}
        return {"state": "complete", **counts}

    # Do not load plugins that happen to be installed.
    environment = {**_rows_of(settings, part), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return Command([sys.executable, "-m", "pytest", *options, *files], verdict, environment=environment)


def _rows_of(settings: Settings, part: str) -> dict[str, str]:
    """Variables that have collect.py keep the rows of a part."""
    return {FOLDER: str(settings.out), NAME: part}


def exercise(settings: Settings) -> Command:
    """Compares every kernel with the reference on small tensors."""
    return Command(_exercise(settings), _plain, environment=_rows_of(settings, "exercise"))


def _exercise(settings: Settings, *options: str) -> list[str]:
    return [sys.executable, "-m", "bench.gpu.exercise", "cpu" if settings.dry else "cuda", *options]


def sanitizer(settings: Settings) -> Command | str:
    """Does the same under compute-sanitizer's memcheck, for our kernels only."""
    if settings.dry:
        return NOT_MEASURED
    tool = find_tool("compute-sanitizer", "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
    if tool is None:
        return f"{NOT_MEASURED}: there is no compute-sanitizer"
    report = settings.out / "memcheck.txt"
    options = ["--tool", "memcheck", "--kernel-name", f"kns={KERNELS}", "--report-api-errors", "no"]
    options += ["--error-exitcode", "9", "--print-limit", "20", "--log-file", str(report)]
    options += ["--destroy-on-device-error", "kernel"]  # other kernels can still run after a memory error

    def verdict(status: int | None) -> Mapping[str, Any]:
        text = report.read_text(errors="replace") if report.exists() else ""
        if "Device not supported" in text:  # said before anything ran
            return {"state": f"{NOT_MEASURED}: compute-sanitizer refuses this GPU"}
        summary = re.search(r"ERROR SUMMARY: (\d+) error", text)
        # The summary comes last. If the tool was killed before, count the errors found so far.
        errors = int(summary[1]) if summary else len(re.findall(r"========= Invalid ", text))
        told = {"memory errors": errors}
        if status != 0 or errors or not summary:
            return {**_plain(status), "state": "failed", **told}
        return {"state": "complete", **told}

    # Without torch's caching allocator, every tensor ends where its allocation ends.
    environment = {**_rows_of(settings, "sanitizer"), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Command([tool, *options, *_exercise(settings)], verdict, environment=environment)


def find_tool(name: str, *folders: str) -> str | None:
    """The path of one of NVIDIA's tools: on the PATH, or in one of the folders (patterns, tried in order)."""
    found = [shutil.which(name), *(path for folder in folders for path in sorted(glob.glob(f"{folder}/{name}")))]
    return next(filter(None, found), None)


def revisions(settings: Settings) -> Command | str:
    """Times the kernels of this checkout in turns with those of another revision."""
    if settings.against is None:
        return "not asked for (--against)"
    command = [sys.executable, "-m", "bench.against", settings.against, "bench.gpu.revisions"]
    command += ["--out", str(settings.out)]
    return Command(command, _plain)


def counters(settings: Settings) -> Command | str:
    """Counts memory traffic of the four main kernels with Nsight Compute; a dry run only runs them."""
    program = _exercise(settings, "--counters")
    if settings.dry:
        return Command(program, _plain)
    tool = find_tool("ncu", "/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*")
    if tool is None:
        return f"{NOT_MEASURED}: there is no ncu"
    table = settings.scratch / "counters.csv"
    options = ["--clock-control", "none", "--metrics", ",".join(_METRICS), "--csv", "--log-file", str(table)]
    options += ["--kernel-name-base", "mangled", "--kernel-name", f"regex:{KERNELS}"]

    def verdict(status: int | None) -> Mapping[str, Any]:
        text = table.read_text(errors="replace") if table.exists() else ""
        for row in (found := rows_of_counters(text)):
            Writer(settings.out).row(row)
        if "ERR_NVGPUCTRPERM" in text:
            return {"state": f"{NOT_MEASURED}: ncu may not read this GPU's counters"}
        ended = _plain(status) if found else {"state": "failed", "error": "ncu counted nothing; see log.txt"}
        # The file is in a temporary folder, so what ncu says there about its failure has to be kept.
        said = [line for line in text.splitlines() if line.startswith(("==ERROR==", "==WARNING=="))][-_MOST_LINES:]
        return {**ended, "error": "; ".join([ended["error"], *said])} if "error" in ended else ended

    return Command([tool, *options, *program], verdict)


def rows_of_counters(text: str) -> list[Row]:
    """The rows of ncu's CSV, which has a line for every metric of every launch, among other lines."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        kernel = re.search(r"\w+_kernel(<.*>)?(?=\(|$)", entry["Kernel Name"] or "")
        metric = _METRICS.get(entry["Metric Name"] or "")
        if kernel and metric:
            value = f"{entry['Metric Value']} {entry['Metric Unit']}".strip()
            facts.setdefault((entry["ID"], kernel[0]), {})[metric] = value
    return [Row("counters", f"{number}: {kernel}", facts=found) for (number, kernel), found in facts.items()]


def icifar100(settings: Settings) -> Command | str:
    """Runs iCIFAR100 with NPC at the paper's size, one seed, stored after every task; a dry run is small."""
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

    def stored_tasks() -> int:
        return sum(len(json.loads(path.read_text())["accuracy"]) for path in store.glob(_RECORDS))

    before = stored_tasks()

    def look() -> None:
        for path in store.glob(_RECORDS):
            if seen.get(path) != path.stat().st_mtime:
                seen[path] = path.stat().st_mtime
                record = json.loads(path.read_text())
                facts = {name: record[name] for name in ("tasks", "accuracy", "seconds", "steps", "settings")}
                done = len(record["accuracy"])
                Writer(settings.out).row(Row("icifar100", f"NPC, seed 0, after {done} tasks", facts=facts))
                _pack(store, settings.out / "icifar100.tar")

    def at_limit() -> str:
        """The run takes all time that is left. It has done what it can if it has learned a task."""
        tasks = stored_tasks()
        return f"stopped at its limit after {tasks} tasks" if tasks > before else KILLED

    return Command(command, _plain, look, at_limit=at_limit)


def _pack(store: Path, target: Path) -> None:
    """Packs a store's records and checkpoints into one file, which is replaced only when it is complete."""
    staged = target.with_suffix(".tmp")
    with tarfile.open(staged, "w") as archive:
        for path in sorted(path for path in store.rglob("*") if path.suffix in (".json", ".pt")):
            with suppress(FileNotFoundError):  # a run removes its checkpoint when it finishes
                archive.add(path, path.relative_to(store))
    staged.replace(target)


def _plain(status: int | None) -> Mapping[str, Any]:
    """How a command ended, from its exit status; None: it was killed at its limit."""
    if status == 0:
        return {"state": "complete"}
    return {"state": "failed"} | ({} if status is None else {"error": f"it ended with status {status}; see log.txt"})


COMMANDS: dict[str, Callable[[Settings], Command | str]] = {
    part.__name__: part for part in (tests, compile_tests, exercise, sanitizer, revisions, counters, icifar100)
}
