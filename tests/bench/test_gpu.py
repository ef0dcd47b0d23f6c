"""The flights of a GPU, rehearsed on the CPU: with the packages that are there, within their limits, losing nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import ROOT, rows, tables
from bench.gpu import commands, exercise, parts, worker
from bench.gpu.__main__ import is_failure
from bench.gpu.collect import FOLDER, NAME
from bench.gpu.device import Device
from bench.gpu.flights import FLIGHTS, SECONDS
from bench.gpu.processes import KILLED, Command, Settings, Worker
from bench.rows import Writer
from bench.timing import Case, Later
from npc_ext import EWC, NPC, SI, NPCAdamW
from npc_ext.kernels import launch

from .. import cuda_on_cpu
from .programs import python
from .published import write_small_cifar100

# What a GPU machine has, apart from what these need themselves.
PRESENT = ("torch", "numpy", "pytest", "hypothesis", "filelock", "ninja", "pybind11", "matplotlib", "tqdm", "npc_ext")


_IMPORTANCE = "void npc::cuda::(anonymous namespace)::importance_kernel<(npc::cuda::Layout)0, (bool)0, float>(Work)"
COUNTED = f"""==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","{_IMPORTANCE}","gpu__time_duration.sum","us","12.5"
"0","1","{_IMPORTANCE}","dram__bytes_read.sum","Mbyte","134.2"
"1","1","void npc::cuda::update_kernel<Network<24, 12>>(N)","gpu__time_duration.sum","us","99"
"1","1","void npc::cuda::update_kernel<Network<24, 12>>(N)","no_such_metric","us","99"
==WARNING== something
"""


def normal(name: str) -> str:
    """The name of a distribution in its normal form."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(names: Iterable[str]) -> set[str]:
    """The given distributions and all that they require."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = normal(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [
            match[0]
            for requirement in requires
            if "extra ==" not in requirement and (match := re.match(r"[\w.-]+", requirement))
        ]
    return found


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables with which Python can import only the packages of a GPU machine."""
    present = needed(PRESENT)
    owners = {package: set(map(normal, names)) for package, names in metadata.packages_distributions().items()}
    blocked = [package for package, names in owners.items() if not names & present]
    assert {"pooch", "sklearn", "scipy"} <= set(blocked)
    folder = tmp_path_factory.mktemp("clean")
    # None among the modules refuses an import, but not the question whether a package is there, which torch asks.
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({sorted(blocked)!r}))\n")
    return {**os.environ, "PYTHONPATH": str(folder), "NPC_BENCH_COMMIT": "abc1234"}


def fly(
    flight: str, out: Path, environment: dict[str, str] | None, *arguments: str
) -> subprocess.CompletedProcess[str]:
    options = ["--dry", "--flight", flight, "--out", str(out), *arguments]
    return python("-m", "bench.gpu", *options, environment=environment)


@pytest.fixture(scope="module")
def flown(clean: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function that runs each flight once, with all options. Its results are in `out`, its data in `data`."""

    @cache
    def once(flight: str) -> Path:
        folder = tmp_path_factory.mktemp(flight)
        out, data = folder / "out", folder / "data"
        write_small_cifar100(data / "cifar-100-python")
        result = fly(flight, out, clean, "--against", str(ROOT), "--data", str(data))
        assert result.returncode == 0, result.stdout + result.stderr + (out / "log.txt").read_text()[-3000:]
        return folder

    return once


@pytest.mark.slow
def test_the_flight_runs_every_file_with_tests_that_need_a_gpu() -> None:
    """Found by their marker, so that a new file is not forgotten."""
    result = python("-m", "pytest", "-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider")
    assert result.returncode == 0, result.stdout + result.stderr
    files = set(re.findall(r"^tests/([\w/]+)\.py::", result.stdout, re.MULTILINE))
    files.remove("test_examples")  # needs scikit-learn, which the machine of a flight need not have
    assert files == {*commands.TESTS, *commands.COMPILE_TESTS}


def test_the_limits_of_a_flight_add_up_to_no_more_than_its_seconds() -> None:
    assert SECONDS <= 230
    for limits in FLIGHTS.values():
        assert sum(limits.values()) <= SECONDS
        assert next(iter(limits)) == "load"


def test_blocked_packages_cannot_be_imported(clean: dict[str, str]) -> None:
    assert "import of pooch halted" in python("-c", "import pooch", environment=clean).stderr


@pytest.mark.slow
@pytest.mark.parametrize("flight", FLIGHTS)
def test_a_dry_flight_needs_no_more_packages_than_a_gpu_machine_has(
    flight: str, flown: Callable[[str], Path], tmp_path: Path
) -> None:
    out = flown(flight) / "out"
    found = rows.read(out)
    states = dict.fromkeys(FLIGHTS[flight], "complete")
    if "sanitizer" in states:
        states["sanitizer"] = rows.NOT_MEASURED
    assert {name: part["state"] for name, part in found.parts.items()} == states
    assert {run["environment"]["commit"] for run in found.runs.values()} == {"abc1234"}
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert all(len(path.parts) <= 3 for path in files)
    tables.write(found, tmp_path)
    assert {f"{name}.md" for name in found.names()} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_flight_counts_the_tests_that_ran_and_no_launches_without_a_gpu(flown: Callable[[str], Path]) -> None:
    found = rows.read(flown("correctness") / "out")
    tests = found.parts["tests"]
    assert tests["passed"] + tests["skipped"] == len(found.of_part("tests")) > 300
    assert tests["failed"] == 0
    assert all(row.facts["launches"] is None for row in found.of_part("launches"))


@pytest.mark.slow
def test_the_flight_times_another_revision_in_turns_with_this_one(flown: Callable[[str], Path]) -> None:
    found = rows.read(flown("kernels") / "out")
    for part in ("importance-revisions", "update-revisions"):
        assert found.of_part(part)
        assert all("before" in row.ratio for row in found.of_part(part))


@pytest.mark.slow
def test_a_run_of_icifar100_goes_on_where_an_earlier_flight_stopped(
    clean: dict[str, str], flown: Callable[[str], Path], tmp_path: Path
) -> None:
    earlier = flown("training")
    first = rows.read(earlier / "out").of_part("icifar100")[-1]
    assert first.facts["accuracy"]
    resume = ("--data", str(earlier / "data"), "--resume", str(earlier / "out" / "icifar100.tar"))
    resumed = fly("training", tmp_path, clean, "--only", "icifar100", *resume)
    assert resumed.returncode == 0, resumed.stderr
    second = rows.read(tmp_path).of_part("icifar100")[-1]
    assert first.facts["seconds"] == second.facts["seconds"], "what was learned is not learned again"


def begun(flight: str, out: Path, environment: dict[str, str], part: str) -> subprocess.Popen[bytes]:
    """Starts a dry flight and waits until it has rows of a part."""
    command = [sys.executable, "-m", "bench.gpu", "--dry", "--flight", flight, "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while f'"{part}"' not in (text := (out / rows.NAME).read_text() if (out / rows.NAME).exists() else ""):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the flight does not come to {part}:\n{text}")
        time.sleep(0.02)
    return process


@pytest.mark.slow
def test_a_flight_that_is_killed_loses_the_row_it_was_at_and_leaves_no_process(
    clean: dict[str, str], tmp_path: Path
) -> None:
    process = begun("kernels", tmp_path, clean, "update")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    found = rows.read(tmp_path)
    assert found.of_part("importance")
    assert found.of_part("relu")
    assert list(found.parts.values())[-1]["state"] == "interrupted"
    assert all_end(str(tmp_path))


@pytest.mark.slow
def test_the_processes_of_a_flight_die_with_it(clean: dict[str, str], tmp_path: Path) -> None:
    process = begun("correctness", tmp_path, clean, "tests")
    assert len(running(str(tmp_path))) >= 3, "the flight, its worker and the tests"
    process.kill()
    process.wait()
    assert all_end(str(tmp_path))


def all_end(text: str) -> bool:
    """Whether all processes that have a text there or in their environment end within ten seconds."""
    deadline = time.monotonic() + 10
    while still_there := running(text):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return not still_there


def running(text: str) -> list[str]:
    """The command lines of processes that have a text there or in their environment, this one's aside."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line, variables = ((folder / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if text in line + variables and folder.name != str(os.getpid()):
            found.append(line.replace("\0", " "))
    return found


def settings(out: Path, dry: bool = True) -> Settings:
    return Settings("a test", out, dry, out, None, None, None, dict(os.environ))


@pytest.mark.slow
def test_a_command_is_ended_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    mark = f"3{os.getpid()}"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep({mark})'])"
    looks = list[float]()
    arguments = [sys.executable, "-c", script]
    command = Command(arguments, lambda status: {"state": "x", "so far": 7}, lambda: looks.append(0))
    started = time.perf_counter()
    assert command.run(settings(tmp_path), 2) == {"state": KILLED, "so far": 7}
    assert time.perf_counter() - started < 4
    assert looks
    assert all_end(mark)


@pytest.mark.slow
def test_a_worker_that_hangs_is_ended_and_the_next_part_gets_a_new_one(tmp_path: Path) -> None:
    process = Worker(settings(tmp_path))
    assert process.measure("load", 60) == {"state": "complete"}
    os.kill(process.pid, signal.SIGSTOP)  # as a kernel that never ends would have it
    assert process.measure("relu", 1) == {"state": KILLED}
    assert not process.is_running()
    assert rows.read(tmp_path).of_part("load"), "what it had measured is kept"


def measured(part: str, out: Path, limit: float = 60) -> dict[str, Any]:
    return worker.measure_part(part, limit, Device(dry=True), Writer(out))


def test_no_case_is_begun_for_which_time_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that takes as long as the longest so far has to fit: what is measured is kept, and nothing is killed."""
    slow = Later("slow", lambda: Case("slow", {"npc_ext": lambda _: time.sleep(0.05)}))
    monkeypatch.setitem(worker.PARTS, "relu", lambda device: (replace(slow, name=str(n)) for n in range(9)))
    assert measured("relu", tmp_path, 0.6) == {"state": "out of time"}
    assert 1 <= len(rows.read(tmp_path).of_part("relu")) <= 3


def test_a_part_that_fails_says_why(tmp_path: Path) -> None:
    assert measured("no such part", tmp_path) == {"state": "failed", "error": "KeyError: 'no such part'", "lost": True}


def test_a_case_that_fails_says_why_and_the_next_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Case:
        raise MemoryError("too large")

    sound = Later("sound", lambda: Case("sound", {"npc_ext": lambda _: None}))
    monkeypatch.setitem(worker.PARTS, "relu", lambda device: iter([Later("broken", broken), sound]))
    assert measured("relu", tmp_path) == {"state": "failed", "error": "1 cases failed"}
    broken_row, sound_row = rows.read(tmp_path).of_part("relu")
    assert broken_row.facts == {"error": "MemoryError: too large"}
    assert sound_row.seconds


def test_buffers_rotate_over_the_memory_that_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written in place is no further memory, and of frozen rows nothing is touched."""
    asked = list[int]()
    monkeypatch.setattr(Device, "sets_of", lambda self, bytes_per_set: asked.append(bytes_per_set) or 1)
    device = Device(dry=True)
    for later in [*parts.update(device), *parts.relu(device)]:
        later.make()
    arrays = {"SGD": 2, "SGD, momentum": 3, "AdamW": 4}
    updates = [share * 4000 * count for count in arrays.values() for share in (1, 0.1)]
    assert asked == [*updates, *(8 * torch.Size(shape).numel() for shape in parts.TINY_SHAPES)]


def test_variables_of_one_command_do_not_reach_the_next(tmp_path: Path) -> None:
    flight = settings(tmp_path)
    script = "import os, sys; sys.exit(7 if 'ONLY_ONCE' in os.environ else 0)"
    arguments = [sys.executable, "-c", script]
    for environment, status in (({"ONLY_ONCE": "1"}, 7), ({}, 0)):
        command = Command(arguments, lambda status: {"state": str(status)}, environment=environment)
        assert command.run(flight, 30) == {"state": str(status)}


@pytest.mark.parametrize(
    ("outcomes", "status", "state", "error"),
    [
        (["passed", "skipped"], 0, "complete", None),
        (["passed", "failed"], 1, "failed", "it ended with status 1; see log.txt"),
        (["skipped"], 0, "failed", "no test ran"),
        ([], 5, "failed", "it ended with status 5; see log.txt"),
        ([], 0, "failed", "no test ran"),
    ],
)
def test_tests_count_only_if_some_ran(
    tmp_path: Path, outcomes: list[str], status: int, state: str, error: str | None
) -> None:
    on_a_gpu = settings(tmp_path, dry=False)
    writer = Writer(tmp_path)
    writer.run("a test", {})
    for number, outcome in enumerate(outcomes):
        writer.row(rows.Row("tests", str(number), facts={"outcome": outcome}))
    verdict = commands.tests(on_a_gpu).verdict(status)
    assert verdict["state"] == state
    assert verdict.get("error") == error


def test_memory_errors_are_read_from_the_report_of_our_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "find_tool", lambda name, *folders: f"/tools/{name}")
    on_a_gpu = settings(tmp_path, dry=False)
    command = commands.sanitizer(on_a_gpu)
    assert isinstance(command, Command)
    assert command.arguments[:3] == ["/tools/compute-sanitizer", "--tool", "memcheck"]
    assert command.arguments[command.arguments.index("--kernel-name") + 1] == "kns=3npc4cuda"
    assert command.verdict(0)["state"] == "failed", "no report is no result"
    report = tmp_path / "memcheck.txt"
    report.write_text("========= Invalid __global__ read of size 4 bytes\n")
    assert command.verdict(None)["memory errors"] == 1, "so far"
    report.write_text("========= ERROR SUMMARY: 0 errors\n")
    assert command.verdict(0) == {"state": "complete", "memory errors": 0}
    report.write_text("========= ERROR SUMMARY: 1 error\n")
    assert command.verdict(9)["state"] == "failed"
    monkeypatch.setattr(commands, "find_tool", lambda name, *folders: None)
    assert commands.sanitizer(on_a_gpu) == "not measured: there is no compute-sanitizer"


def test_a_gpu_that_the_sanitizer_refuses_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "find_tool", lambda name, *folders: f"/tools/{name}")
    command = commands.sanitizer(settings(tmp_path, dry=False))
    assert isinstance(command, Command)
    (tmp_path / "memcheck.txt").write_text(
        "========= COMPUTE-SANITIZER\n"
        '========= Error: Device not supported. Please refer to the "Supported Devices" section\n'
        "========= ERROR SUMMARY: 1 error\n"
    )
    assert command.verdict(1) == {"state": "not measured: compute-sanitizer refuses this GPU"}


def test_what_ncu_says_about_its_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "find_tool", lambda name, *folders: f"/tools/{name}")
    command = commands.counters(settings(tmp_path, dry=False))
    assert isinstance(command, Command)
    nothing = {"state": "failed", "error": "ncu counted nothing; see log.txt"}
    assert command.verdict(None) == nothing
    table = Path(command.arguments[command.arguments.index("--log-file") + 1])
    told = [f"==ERROR== {number}" for number in range(9)]
    table.write_text("\n".join(["==PROF== Connected to process 1", *told, "==WARNING== No kernels were profiled."]))
    lines = [*told[-4:], "==WARNING== No kernels were profiled."]
    assert command.verdict(1) == {**nothing, "error": "; ".join([nothing["error"], *lines])}
    table.write_text(COUNTED + "==ERROR== The application returned an error code (1).\n")
    error = command.verdict(1)["error"]
    assert error.startswith("it ended with status 1")
    assert error.endswith("==ERROR== The application returned an error code (1).")
    assert command.verdict(0) == {"state": "complete"}
    assert len(rows.read(tmp_path).of_part("counters")) == 2
    table.write_text("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access the counters\n")
    assert command.verdict(1) == {"state": "not measured: ncu may not read this GPU's counters"}


def test_a_stopped_run_of_icifar100_is_a_result_if_it_has_learned_a_task(tmp_path: Path) -> None:
    flight = replace(settings(tmp_path), data=tmp_path)
    record = tmp_path / "store" / "icifar100-small" / "npc" / "0" / "seed0.json"
    record.parent.mkdir(parents=True)

    def stopped(tasks: int) -> str:
        """The state after a run stored the record of so many tasks, and hung."""
        facts = {"tasks": 11, "accuracy": [[0.5]] * tasks, "seconds": [1.0], "steps": 1, "settings": {}}
        script = f"import sys, time; open({str(record)!r}, 'w').write(sys.argv[1]); time.sleep(60)"
        command = commands.icifar100(flight)
        assert isinstance(command, Command)
        return str(
            replace(command, arguments=[sys.executable, "-c", script, json.dumps(facts)]).run(flight, 2)["state"]
        )

    assert stopped(0) == KILLED
    assert stopped(2) == "stopped at its limit after 2 tasks"
    assert stopped(2) == KILLED, "an earlier flight had learned them"
    assert [row.case for row in rows.read(tmp_path).of_part("icifar100")][-1] == "NPC, seed 0, after 2 tasks"
    assert not is_failure("stopped at its limit after 2 tasks")
    assert is_failure(KILLED)


@pytest.mark.parametrize("name", exercise.EXERCISES)
def test_every_exercise_agrees_whatever_is_drawn(name: str) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        exercise.EXERCISES[name]("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", exercise.EXERCISES)
def test_every_exercise_agrees_for_the_gpus_kernels_on_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_on_cpu.take_over(monkeypatch.setattr)
    monkeypatch.setattr(launch, "has_relu_backward", lambda tensor: True)
    launches = cuda_on_cpu.counted("launches", lambda: exercise.EXERCISES[name]("cpu"))
    if "many" in name:
        updates = len(exercise.DTYPES) if "layer_step_" in name else exercise.STEPS_OF_MANY
        assert launches >= 2 * updates, "one launch does not hold so many"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "options", "wrong"),
    [
        (NPC, {"lr": 0.1}, {"lr": 0.11}),
        (NPC, {"momentum": 0.9}, {"momentum": 0.8}),
        (NPCAdamW, {"lr": 1e-3}, {"lr": 1.1e-3}),
        (EWC, {"lr": 0.05, "strength": 0.1}, {"lr": 0.055}),
        (SI, {"lr": 0.01, "strength": 0.1}, {"lr": 0.011}),
    ],
)
def test_an_exercise_notices_a_kernel_that_uses_another_number(
    kind: Any, options: dict[str, float], wrong: dict[str, float], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(model: nn.Module, **given: Any) -> Any:
        return kind(model, **given) if "backend" in given else kind(model, **{**given, **wrong})

    built.__name__ = kind.__name__
    if kind is EWC:  # the exercises give EWC the data
        monkeypatch.setattr(exercise, "EWC", built)
    with pytest.raises(AssertionError, match=f"{kind.__name__} is off by"):
        exercise.twins(built, dtype=dtype, **options)("cpu")


def test_after_a_failed_exercise_the_others_run_and_the_part_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: str) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    sound = exercise.EXERCISES["layer_step_"]
    monkeypatch.setattr(exercise, "EXERCISES", {"first": sound, "second": broken, "third": sound})
    monkeypatch.setattr(sys, "argv", ["exercise", "cpu"])
    for part in (commands.exercise, commands.sanitizer):
        monkeypatch.setattr(commands, "find_tool", lambda name, *folders: name)
        command = part(settings(tmp_path, dry=False))
        assert isinstance(command, Command)
        for name, value in command.environment.items():
            monkeypatch.setenv(name, value)
        assert exercise.main() == 1
        facts = {row.case: row.facts for row in rows.read(tmp_path).of_part(part.__name__)}
        agrees = {"agrees with the reference": True}
        error = {"agrees with the reference": False, "error": "RuntimeError: an illegal memory access was encountered"}
        assert facts == {"first": agrees, "second": error, "third": agrees}


@pytest.mark.slow
def test_after_some_failures_the_rest_of_a_file_is_skipped_and_the_next_file_runs(tmp_path: Path) -> None:
    failing = "import pytest\n@pytest.mark.parametrize('n', range(9))\ndef test(n):\n    assert n > 9, 'too\\nsmall'\n"
    (tmp_path / "test_first.py").write_text(failing)
    (tmp_path / "test_second.py").write_text("def test(): pass\n")
    out = tmp_path / "out"
    environment = {**os.environ, FOLDER: str(out), NAME: "tests"}
    result = python("-m", "pytest", "-p", "bench.gpu.collect", "-c", os.devnull, str(tmp_path), environment=environment)
    assert result.returncode == 1, result.stdout + result.stderr
    found = rows.read(out).of_part("tests")
    assert [row.facts["outcome"] for row in found] == ["failed"] * 5 + ["skipped"] * 4 + ["passed"]
    assert found[0].facts["error"].startswith("AssertionError: too (")


def test_every_kernel_has_the_name_that_the_tools_filter_by() -> None:
    objects = list((ROOT / "build").glob("_C*/cuda_*.o"))
    if not objects:
        pytest.skip("the kernels' objects are not in build/ (no nvcc)")
    logs = "".join(path.with_suffix(".o.log").read_text() for path in objects)
    kernels = set(re.findall(r"Compiling entry function '(\w+)'", logs))
    assert kernels
    assert all(commands.KERNELS in kernel for kernel in kernels)


def test_counters_are_rows_of_launches() -> None:
    found = commands.rows_of_counters(COUNTED)
    names = ["importance_kernel<(npc::cuda::Layout)0, (bool)0, float>", "update_kernel<Network<24, 12>>"]
    assert [row.case for row in found] == [f"{number}: {name}" for number, name in enumerate(names)]
    assert found[0].facts == {"duration": "12.5 us", "bytes read": "134.2 Mbyte"}
    assert commands.rows_of_counters("==ERROR== nothing") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_flight_is_possible(tmp_path: Path) -> None:
    result = python("-m", "bench.gpu", "--flight", "kernels", "--out", str(tmp_path))
    assert result.returncode == 2
    assert "there is no GPU here (no nvidia-smi, no /dev/nvidia0); --dry flies on the CPU" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "step"], "the flight kernels has no part step; it has load, importance"),
        (
            ["--against", "no-such"],
            "'no-such' is neither a revision of this repository nor a folder with npc_ext in it",
        ),
        (["--data", "/no/such"], "--data /no/such is not a folder"),
        (["--resume", "/no/such.tar"], "--resume /no/such.tar needs --data and has to be a file"),
    ],
)
def test_what_a_flight_cannot_do_is_said_before_it_begins(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = fly("kernels", tmp_path / "out", None, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_revision_that_git_does_not_know_is_named_before_anything_is_compiled() -> None:
    no_compiler = {**os.environ, "NPC_EXT_NVCC": "", "CXX": "/nowhere/c++"}
    result = python("-m", "bench.gpu.prepare", "--against", "no-such", environment=no_compiler)
    assert result.returncode == 1
    assert result.stderr.startswith("bench.gpu.prepare: 'no-such' is neither a revision of this repository")


def test_two_flights_do_not_share_a_folder(tmp_path: Path) -> None:
    (tmp_path / rows.NAME).write_text("")
    result = fly("kernels", tmp_path, None)
    assert result.returncode == 2
    assert "has the rows of another flight" in result.stderr
