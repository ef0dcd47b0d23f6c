"""The flights of a GPU, rehearsed on the CPU: with the packages that are there, within their limits, losing nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

from bench import rows, tables
from bench.gpu import commands
from bench.gpu.flights import FLIGHTS, SECONDS
from bench.gpu.processes import KILLED, Command, Settings, Worker
from bench.networks import resnet18
from bench.rows import Writer
from npc_ext import find_neurons

from .test_datasets import write_small_cifar100

ROOT = Path(__file__).resolve().parents[1]
# What a GPU machine has, apart from what these need themselves.
PRESENT = ("torch", "numpy", "pytest", "hypothesis", "filelock", "ninja", "pybind11", "matplotlib", "tqdm", "npc_ext")


def needed(names: Iterator[str] | tuple[str, ...]) -> set[str]:
    """Some distributions and all that they require."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [match[0] for one in requires if "extra ==" not in one and (match := re.match(r"[\w.-]+", one))]
    return found


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process, and of its children, that can import only what a GPU machine has."""
    present = needed(PRESENT)
    blocked = [
        package
        for package, owners in metadata.packages_distributions().items()
        if not any(re.sub(r"[-_.]+", "-", owner).lower() in present for owner in owners)
    ]
    assert {"pooch", "sklearn", "scipy"} <= set(blocked)
    folder = tmp_path_factory.mktemp("clean")
    # None among the modules refuses an import, but not the question whether a package is there, which torch asks.
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({sorted(blocked)!r}))\n")
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "NPC_BENCH_COMMIT": "abc1234"}


def fly(flight: str, out: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu", "--dry", "--flight", flight, "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_flight_runs_every_file_with_tests_that_need_a_gpu() -> None:
    """Found by their marker, so that a new file is not forgotten."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    files = set(re.findall(r"^tests/(\w+)\.py::", result.stdout, re.MULTILINE))
    assert files == set(commands.TESTS)


def test_the_limits_of_a_flight_add_up_to_no_more_than_its_seconds() -> None:
    assert SECONDS <= 230
    for parts in FLIGHTS.values():
        assert sum(part.limit for part in parts) <= SECONDS
        assert parts[0].name == "load"


def test_blocked_packages_cannot_be_imported(clean: dict[str, str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import pooch"], env=clean, capture_output=True, text=True, check=False
    )
    assert "import of pooch halted" in result.stderr


@pytest.mark.parametrize("flight", FLIGHTS)
def test_a_dry_flight_needs_no_more_packages_than_a_gpu_machine_has(
    flight: str, clean: dict[str, str], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    write_small_cifar100(data / "cifar-100-python")
    result = fly(flight, tmp_path / "out", clean, "--against", str(ROOT), "--data", str(data))
    log = (tmp_path / "out" / "log.txt").read_text()
    assert result.returncode == 0, result.stdout + result.stderr + log[-3000:]
    found = rows.read(tmp_path / "out")
    assert {name: part["state"] for name, part in found.parts.items()} == {
        part.name: "complete" for part in FLIGHTS[flight]
    }
    assert {run["environment"]["commit"] for run in found.runs.values()} == {"abc1234"}
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert all(len(path.relative_to(tmp_path / "out").parts) <= 3 for path in files)
    if flight == "correctness":
        tests = found.parts["tests"]
        assert tests["passed"] + tests["skipped"] == len(found.of_part("tests")) > 300, "tests that ran are counted"
        assert tests["failed"] == 0
        assert all(row.facts["launches"] is None for row in found.of_part("launches")), "not measured in a dry run"
    if flight == "kernels":
        assert all("before" in row.ratio for row in found.of_part("importance-revisions"))
    if flight == "training":
        assert found.of_part("icifar100")[-1].facts["accuracy"]
        assert (tmp_path / "out" / "icifar100.tar").exists()
    tables.write(found, tmp_path / "tables")
    assert {f"{name}.md" for name in found.names()} <= {path.name for path in (tmp_path / "tables").iterdir()}


def test_a_run_of_icifar100_goes_on_where_an_earlier_flight_stopped(clean: dict[str, str], tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_small_cifar100(data / "cifar-100-python")
    only = ("--only", "icifar100", "--data", str(data))
    assert fly("training", tmp_path / "first", clean, *only).returncode == 0
    resumed = fly("training", tmp_path / "second", clean, *only, "--resume", str(tmp_path / "first" / "icifar100.tar"))
    assert resumed.returncode == 0
    assert rows.read(tmp_path / "second").parts["icifar100"]["seconds"] > 0
    first, second = (rows.read(tmp_path / name).of_part("icifar100")[-1] for name in ("first", "second"))
    assert first.facts["seconds"] == second.facts["seconds"], "what was learned is not learned again"


def test_a_flight_that_is_killed_loses_the_row_it_was_at_and_leaves_no_process(
    clean: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--dry", "--flight", "kernels", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and '"update"' not in rows_text(tmp_path):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    found = rows.read(tmp_path)
    assert found.of_part("importance")
    assert found.of_part("relu")
    assert not running(str(tmp_path))


def rows_text(folder: Path) -> str:
    path = folder / rows.NAME
    return path.read_text() if path.exists() else ""


def running(text: str) -> list[str]:
    """The command lines of processes that contain a text, this one's aside."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line and path.parent.name != str(os.getpid()):
            found.append(line)
    return found


def settings(out: Path) -> Settings:
    return Settings("a test", out, True, out, None, None, None, {**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_command_is_ended_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    mark = f"3{os.getpid()}"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep({mark})'])"
    writer, looks = Writer(tmp_path), list[float]()
    command = Command([sys.executable, "-c", script], lambda status: {"state": "complete"}, lambda: looks.append(0))
    started = time.perf_counter()
    assert command.run(settings(tmp_path), writer, 2) == {"state": KILLED}
    assert time.perf_counter() - started < 4
    assert looks
    assert not running(mark)


def test_a_worker_that_hangs_is_ended_and_the_next_part_gets_a_new_one(tmp_path: Path) -> None:
    worker = Worker(settings(tmp_path))
    assert worker.measure("load", 60) == {"state": "complete"}
    os.kill(worker._process.pid, signal.SIGSTOP)  # as a kernel that never ends would have it
    assert worker.measure("relu", 1) == {"state": KILLED}
    assert not worker.lives()
    assert rows.read(tmp_path).of_part("load"), "what it had measured is kept"


def test_a_part_whose_time_is_over_keeps_what_it_has(tmp_path: Path) -> None:
    worker = Worker(settings(tmp_path))
    assert worker.measure("importance", 3.0)["state"] == "out of time"
    worker.kill()
    assert len(rows.read(tmp_path).of_part("importance")) == 1


def test_a_part_that_fails_says_why(tmp_path: Path) -> None:
    worker = Worker(settings(tmp_path))
    answer = worker.measure("no such part", 60)
    worker.kill()
    assert answer == {"state": "failed", "error": "KeyError: 'no such part'"}


@pytest.mark.parametrize(
    ("outcomes", "status", "state", "error"),
    [
        (["passed", "skipped"], 0, "complete", None),
        (["passed", "failed"], 1, "failed", "pytest ended with status 1"),
        (["skipped"], 0, "failed", "no test ran"),
        ([], 5, "failed", "pytest ended with status 5"),
        ([], 0, "failed", "no test ran"),
    ],
)
def test_tests_count_only_if_some_ran(
    tmp_path: Path, outcomes: list[str], status: int, state: str, error: str | None
) -> None:
    on_a_gpu = settings(tmp_path)
    on_a_gpu.dry = False
    writer = Writer(tmp_path)
    writer.run("a test", {})
    for number, outcome in enumerate(outcomes):
        writer.row(rows.Row("tests", str(number), facts={"outcome": outcome}))
    verdict = commands.tests(on_a_gpu).verdict(status)
    assert verdict["state"] == state
    assert verdict.get("error") == error


def test_memory_errors_are_read_from_the_report_of_our_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands.shutil, "which", lambda program: f"/tools/{program}")
    on_a_gpu = settings(tmp_path)
    on_a_gpu.dry = False
    command = commands.sanitizer(on_a_gpu)
    assert command.arguments[:3] == ["/tools/compute-sanitizer", "--tool", "memcheck"]
    assert command.arguments[command.arguments.index("--kernel-name") + 1] == "kns=3npc4cuda"
    assert command.verdict(0)["state"] == "failed", "no report is no result"
    (tmp_path / "memcheck.txt").write_text("========= ERROR SUMMARY: 0 errors\n")
    assert command.verdict(0) == {"state": "complete", "memory errors": 0}
    (tmp_path / "memcheck.txt").write_text("========= ERROR SUMMARY: 1 error\n")
    assert command.verdict(9)["state"] == "failed"


def test_every_kernel_has_the_name_that_the_tools_filter_by() -> None:
    objects = list((ROOT / "build").glob("_C*/cuda_*.o"))
    if not objects:
        pytest.skip("the kernels' objects are not in build/ (no nvcc)")
    logs = "".join(path.with_suffix(".o.log").read_text() for path in objects)
    kernels = set(re.findall(r"Compiling entry function '(\w+)'", logs))
    assert kernels
    assert all(commands._OURS in kernel for kernel in kernels)


def test_counters_are_rows_of_launches() -> None:
    header = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    lines = [
        "==PROF== Connected to process 1",
        header,
        '"0","1","importance_kernel(Work)","gpu__time_duration.sum","us","12.5"',
        '"0","1","importance_kernel(Work)","dram__bytes_read.sum","Mbyte","134.2"',
        '"1","1","update_kernel(Network)","gpu__time_duration.sum","us","99"',
    ]
    found = commands.rows_of_counters("\n".join(lines))
    assert [row.case for row in found] == ["0: importance_kernel", "1: update_kernel"]
    assert found[0].facts == {"duration": "12.5 us", "bytes read": "134.2 Mbyte"}
    assert commands.rows_of_counters("==ERROR== nothing") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_flight_is_possible(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--flight", "kernels", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "there is no GPU here (no nvidia-smi); --dry flies on the CPU" in result.stderr


def test_a_part_that_a_flight_does_not_have_is_refused(tmp_path: Path) -> None:
    result = fly("kernels", tmp_path, dict(os.environ), "--only", "step")
    assert result.returncode == 2
    assert "the flight kernels has no part step; it has load, importance" in result.stderr


def test_every_layer_of_the_resnet_is_measured_behind_its_norm() -> None:
    neurons = find_neurons(resnet18(8))
    assert len(neurons) == 21
    assert all(layer.points for layer in neurons)
