"""The just-in-time build: once among processes, never half done, with errors that say everything."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from npc_ext import _build

ROOT = Path(__file__).resolve().parents[1]
# Loads _build.py and _native.py alone: no torch, so that a process starts in a moment.
LOAD = """
import sys, types
package = types.ModuleType("npc_ext"); package.__path__ = [sys.argv[1]]; sys.modules["npc_ext"] = package
from npc_ext import _build, _native
_native._prebuilt = lambda: (None, "no module built ahead of time")
import time; started = time.perf_counter()
native = _native.status()
assert native.module is None or native.module.__file__ in native.origin
print(native.origin if native.module else native.reason, time.perf_counter() - started)
"""


def environment(cache: Path, **more: str) -> dict[str, str]:
    # -O0 makes no difference to what is tested here and a large one to how long it takes.
    return {**os.environ, "NPC_EXT_CACHE": str(cache), "NPC_EXT_CXXFLAGS": "-O0", "NPC_EXT_NVCC": "", **more}


def start(cache: Path, package: Path = ROOT / "npc_ext", **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, str(package)],
        env=environment(cache, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output, errors


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that two processes, started together, filled."""
    cache = tmp_path_factory.mktemp("cache")
    results = [finish(process) for process in [start(cache), start(cache)]]
    assert all("built just in time" in output for output, _ in results)
    assert sum("compiling" in errors for _, errors in results) == 1, "two processes that start together build once"
    return cache


def modules(cache: Path) -> list[Path]:
    return sorted(cache.rglob("_C*"))


def test_two_processes_that_start_together_build_once(built: Path) -> None:
    assert len(modules(built)) == 1
    assert not list(built.rglob("building-*"))


def test_a_second_import_takes_milliseconds_and_compiles_nothing(built: Path) -> None:
    before = modules(built)[0].stat().st_mtime_ns
    output, errors = finish(start(built))
    assert not errors
    assert modules(built)[0].stat().st_mtime_ns == before
    assert float(output.split()[-1]) < 0.5


def test_a_builder_killed_half_way_blocks_and_poisons_nothing(tmp_path: Path) -> None:
    process = start(tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.o")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(tmp_path.rglob("building-*")), "it was killed while it built"
    assert not modules(tmp_path)[1:] and not list(tmp_path.glob("*/_C*"))
    output, errors = finish(start(tmp_path))
    assert "built just in time" in output
    assert "compiling" in errors
    assert not list(tmp_path.rglob("building-*"))


def test_a_failing_compilers_whole_output_reaches_the_user(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "npc_ext", tmp_path / "npc_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    source = tmp_path / "csrc" / "cpu" / "isa.cpp"
    source.write_text(source.read_text() + "\nint broken = not_a_name;\n")
    output, _ = finish(start(tmp_path / "cache", tmp_path / "npc_ext"))
    assert "the C++ compiler failed" in output
    assert "‘not_a_name’ was not declared" in output or "'not_a_name'" in output
    assert not list((tmp_path / "cache").glob("*/_C*"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"CXX": "/nowhere/c++"}, "CXX=/nowhere/c++ does not name a program; install one"),
        ({"PATH": "/nowhere", "CXX": ""}, "none of c++, g++, clang++ is on the PATH"),
        ({"NPC_EXT_CACHE": "/proc/nowhere"}, "cannot write to /proc/nowhere"),
    ],
)
def test_what_is_missing_is_named_with_its_fix(tmp_path: Path, setting: dict[str, str], message: str) -> None:
    output, _ = finish(start(tmp_path, **setting))
    assert message in output


def test_a_stale_module_is_not_run(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "npc_ext", tmp_path / "npc_ext", ignore=shutil.ignore_patterns("__pycache__"))
    header = tmp_path / "csrc" / "rules.h"
    header.write_text(header.read_text() + "\n// edited\n")
    # Compiled anew, and that is what runs (LOAD asserts it); without a compiler, nothing runs.
    keep_prebuilt = LOAD.replace("_native._prebuilt = ", "unused = ")

    def load(**setting: str) -> str:
        command = [sys.executable, "-c", keep_prebuilt, str(tmp_path / "npc_ext")]
        setting = environment(tmp_path / "cache", **setting)
        return subprocess.run(command, env=setting, capture_output=True, text=True, check=True).stdout

    assert "older than the sources beside it; no C++ compiler" in load(CXX="/nowhere/c++")
    assert "built just in time" in load()


@pytest.mark.parametrize("change", ["flags", "compiler", "sources"])
def test_the_cache_key_changes_with(change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = _build.cache_key()
    if change == "flags":
        monkeypatch.setenv("NPC_EXT_CXXFLAGS", "-g")
    elif change == "compiler":
        compiler = tmp_path / "c++"
        compiler.write_text("#!/bin/sh\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
    else:
        shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
        (tmp_path / "csrc" / "new.h").write_text("")
        monkeypatch.setattr(_build, "source_dir", lambda: tmp_path / "csrc")
    assert _build.cache_key() != before


def test_paths_with_spaces_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "with space" / _build.MODULE_FILE
    monkeypatch.setenv("NPC_EXT_CXXFLAGS", "-O0")
    monkeypatch.setattr(_build, "nvcc", lambda: None)
    _build.build(target, tmp_path / "a folder")
    assert target.stat().st_size > 10_000
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_no_torch_header_and_no_cuda_launch_syntax_in_csrc() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert "<torch/" not in text and "<ATen/" not in text and "<<<" not in text


# ---------------------------------------------------------------------------------------------------------------- CUDA

needs_nvcc = pytest.mark.skipif(_build.nvcc() is None, reason="there is no nvcc (CUDA 12.1 or newer) on this machine")


def fresh(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Any:
    """_build.py as another process would find it."""
    for name in ("NPC_EXT_ARCHS", "TORCH_CUDA_ARCH_LIST", "NPC_EXT_NVCC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("npc_ext._build_again", _build.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@needs_nvcc
def test_every_cuda_kernel_keeps_to_its_registers_for_every_architecture(tmp_path: Path) -> None:
    from npc_ext import _native

    logs = list((ROOT / "build" / _build.MODULE_FILE).glob("cuda_*.log"))
    if not logs:  # the module came from elsewhere
        _build.build(tmp_path / _build.MODULE_FILE, tmp_path)
        logs = list(tmp_path.glob("cuda_*.log"))
    reports = []
    for log in logs:
        reports += re.findall(
            r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers",
            log.read_text(),
            re.DOTALL,
        )
    kernels = {(name, arch) for name, arch, *_ in reports}
    assert len({name for name, _ in kernels}) == 34, (
        "24 of importance, 2 of each update, 1 of wide layers and 1 of the whole step"
    )
    assert {arch for _, arch in kernels} == {arch.removesuffix("+PTX") for arch in _native.module().cuda_archs.split()}
    # All are compiled for blocks of 256 threads, two on a multiprocessor at least: 65,536 / 512 registers a thread.
    bad = [report for report in reports if list(map(int, report[2:5])) != [0, 0, 0] or int(report[5]) > 128]
    assert not bad, "stack frame, spill stores, spill loads, registers"


@needs_nvcc
def test_the_module_has_cuda_kernels_and_needs_no_driver_to_be_imported() -> None:
    from npc_ext import _native

    native = _native.module()
    assert native.cuda_archs
    libraries = subprocess.run(["ldd", native.__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in libraries


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@needs_nvcc
def test_a_launch_without_a_driver_says_so() -> None:
    from npc_ext import _native

    cuda = _native.module().cuda
    target = cuda.OnStream(0, 0)
    with pytest.raises(
        RuntimeError,
        match=r"npc_ext: reading the current device failed: cudaError.*; there is no NVIDIA driver, but the kernels "
        r"were compiled with CUDA .* update the driver",
    ):
        cuda.importance(target, 0, 0, 0, 0, 0, (2, 3), (3, 1), (3, 1), 1, 0)


@pytest.mark.parametrize(
    ("environment", "archs"),
    [
        ({"NPC_EXT_ARCHS": "80;90+PTX"}, ("80", "90+PTX")),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 9.0a+PTX"}, ("80", "90a+PTX")),
        ({"NPC_EXT_ARCHS": "75", "TORCH_CUDA_ARCH_LIST": "8.0"}, ("75",)),
    ],
)
def test_architectures_are_those_asked_for(
    environment: dict[str, str], archs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fresh(monkeypatch, **environment).archs() == archs


def test_architectures_are_those_of_the_gpus_present_else_all(monkeypatch: pytest.MonkeyPatch) -> None:
    build = fresh(monkeypatch)
    monkeypatch.setattr(build, "_output_of", lambda command: "9.0\n8.0\n9.0\n")
    assert build.archs() == ("80", "90")
    build = fresh(monkeypatch)
    monkeypatch.setattr(build, "_output_of", lambda command: "")
    assert build.archs() == ("75", "80", "86", "89", "90", "100", "120+PTX")


def test_a_wrong_architecture_or_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    build = fresh(monkeypatch, NPC_EXT_ARCHS="hopper")
    with pytest.raises(
        build.BuildError, match=r"NPC_EXT_ARCHS=hopper has the entry 'HOPPER'; expected .* '8.0;9.0\+PTX'"
    ):
        build.archs()
    build = fresh(monkeypatch, NPC_EXT_NVCC="/nowhere/nvcc")
    with pytest.raises(build.BuildError, match="NPC_EXT_NVCC=/nowhere/nvcc does not name a program"):
        build.nvcc()
    assert fresh(monkeypatch, NPC_EXT_NVCC="").nvcc() is None


def test_an_nvcc_that_is_too_old_is_not_used_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "nvcc"
    old.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    old.chmod(0o755)
    assert fresh(monkeypatch, NPC_EXT_NVCC=str(old)).nvcc() is None
    assert f"{old} is older than CUDA 12.1, so it is not used" in capsys.readouterr().err


def test_gpu_tensors_without_cuda_kernels_fall_back_and_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from npc_ext import _native, ops

    monkeypatch.setattr(_native, "why_not_on", lambda device: "the module was compiled without CUDA")
    ops._warn_without_native.cache_clear()
    here = torch.device("cuda:0")
    on_gpu: Any = SimpleNamespace(is_sparse=False, is_cpu=False, is_cuda=True, dtype=torch.float32, device=here)
    with pytest.warns(
        RuntimeWarning, match="CUDA kernels are not available, plain PyTorch .* compiled without CUDA"
    ) as said:
        assert [ops.native_takes([on_gpu]) for _ in range(3)] == [False] * 3
    assert len(said) == 1
    ops._warn_without_native.cache_clear()


def test_backend_native_without_cuda_kernels_raises_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    from npc_ext import _native, descent

    class Compiled:
        isas: Any = None

    monkeypatch.setattr(_native, "status", lambda: _native.Native(Compiled(), "test"))  # type: ignore[arg-type]
    _native.why_no_cuda.cache_clear()
    _native.status_on.cache_clear()
    on_gpu = SimpleNamespace(is_cpu=False, is_cuda=True, device=torch.device("cuda:0"))
    model: Any = SimpleNamespace(named_parameters=lambda: [("weight", on_gpu)])
    with pytest.raises(
        _native.NativeUnavailableError,
        match=r"'weight' is on cuda:0 and the module was compiled without CUDA; install the CUDA toolkit .*'make'",
    ):
        descent.require_native(model)
    _native.why_no_cuda.cache_clear()
    _native.status_on.cache_clear()


def on_gpu_without(
    monkeypatch: pytest.MonkeyPatch, *obstacles: tuple[str, bool], nvcc: Path | None = Path("nvcc")
) -> list[SimpleNamespace]:
    """A GPU on which each module that is loaded has its obstacle: the first one, and one built just in time."""
    from npc_ext import _native

    modules = [
        SimpleNamespace(__file__=f"/{at}/_C.so", cuda=SimpleNamespace(why_not_on=lambda device, one=one: one))
        for at, one in enumerate(obstacles)
    ]
    monkeypatch.setattr(_native, "status", lambda: _native.Native(modules[0], "test"))  # type: ignore[arg-type]
    monkeypatch.setattr(_native, "module", lambda: modules[0])
    monkeypatch.setattr(_native, "why_no_cuda", lambda: "")
    monkeypatch.setattr(_native, "_import_once", lambda path: modules[-1])
    monkeypatch.setattr(_build, "build_cached", lambda: Path(modules[-1].__file__))
    monkeypatch.setattr(_build, "nvcc", lambda: nvcc)
    return modules


CODE = "the module has code for sm_90, but GPU 0 is sm_80 (cudaErrorNoKernelImageForDevice)"


def status_on_gpu() -> Any:
    from npc_ext import _native

    return _native.status_on.__wrapped__(0)  # without what was seen on a GPU that is here


def test_a_module_without_code_for_the_gpu_is_compiled_for_it_just_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = on_gpu_without(monkeypatch, (CODE, True), ("", False))
    native = status_on_gpu()
    assert native.module is modules[1]
    assert native.origin == "built just in time: /1/_C.so"


def test_a_module_that_runs_on_the_gpu_is_used_there(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = on_gpu_without(monkeypatch, ("", False))
    assert status_on_gpu().module is modules[0]


@pytest.mark.parametrize(
    ("obstacles", "nvcc", "reason"),
    [
        ([("the driver is too old", False)], Path("nvcc"), "^the driver is too old$"),
        ([(CODE, True)], None, "is sm_80 .*there is no nvcc to compile it for this GPU; install the CUDA toolkit"),
        ([(CODE, True)], Path("nvcc"), "is sm_80 .*; unset NPC_EXT_ARCHS"),
        ([(CODE, True), (CODE, True)], Path("nvcc"), "is sm_80 .*; unset NPC_EXT_ARCHS"),
    ],
)
def test_what_cannot_run_on_a_gpu_is_explained(
    obstacles: list[tuple[str, bool]], nvcc: Path | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from npc_ext import _native

    on_gpu_without(monkeypatch, *obstacles, nvcc=nvcc)
    native = status_on_gpu()
    assert native.module is None
    assert re.search(reason, native.reason)
    monkeypatch.setattr(_native, "status_on", lambda device: native)
    with pytest.raises(_native.NativeUnavailableError, match="npc_ext's CUDA kernels do not run on GPU 0: "):
        _native.module_on(0)


def test_a_failing_compiler_is_part_of_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu_without(monkeypatch, (CODE, True))

    def fail() -> Path:
        raise _build.BuildError("the C++ compiler failed")

    monkeypatch.setattr(_build, "build_cached", fail)
    assert "compiling it for this GPU failed: the C++ compiler failed" in status_on_gpu().reason


def test_the_module_knows_its_driver_and_the_gpus_architecture() -> None:
    from . import cuda_on_cpu

    cuda = cuda_on_cpu.module().cuda
    assert cuda.why_not_on(0) == ("", False)
    assert cuda.versions() == (13000, 13000, 13000, "580")
    with cuda_on_cpu.state(driver=12040):
        sentence, needs_other_code = cuda.why_not_on(0)
    assert sentence == (
        "the NVIDIA driver supports CUDA 12.4 at most, but the kernels were compiled with CUDA 13.0 and need a driver "
        "for CUDA 13.0 or newer (driver 580 or newer); update the driver, or compile npc_ext with an older toolkit "
        "(NPC_EXT_NVCC=/path/to/nvcc): CUDA 12.1 or newer, whose kernels need driver 530 or newer"
    )
    assert not needs_other_code
    with cuda_on_cpu.state(kernel_error=209):
        sentence, needs_other_code = cuda.why_not_on(0)
    assert sentence == "the module has code for sm_cpu, but GPU 0 is sm_90 (cudaErrorNoKernelImageForDevice)"
    assert needs_other_code
    with cuda_on_cpu.state(kernel_error=2):
        sentence, needs_other_code = cuda.why_not_on(0)
    assert sentence == "npc_ext: looking for a kernel failed: cudaErrorMemoryAllocation, out of memory"
    assert not needs_other_code
