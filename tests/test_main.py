"""python -m npc_ext: the state of an installation, also of a broken one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from npc_ext import __main__
from npc_ext.kernels import build, compilers, just_in_time, native

from .kernels.imitations import NOBODY, imitated_compiler

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def report(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "npc_ext", *arguments, **environment)


def line(text: str, name: str) -> str:
    """What a report says in the row of that name."""
    (found,) = (row.removeprefix(name).strip() for row in text.splitlines() if row.startswith(f"{name} "))
    return found


def test_a_sound_installation_is_described() -> None:
    result = report()
    assert result.returncode == 0, result.stdout + result.stderr
    for text in ("npc_ext   0.", "torch", "kernels   built", "in use; this processor runs baseline"):
        assert text in result.stdout
    assert "with CUDA" in line(result.stdout, "torch") or "built without CUDA" in line(result.stdout, "torch")
    assert not compilers.nvcc() or "; needs a driver for CUDA 1" in result.stdout


def test_a_broken_torch_is_reported_and_not_raised(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')")
    result = report(PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "libtorch_cpu.so: cannot open shared object file" in result.stdout
    assert "fix: pip install --force-reinstall torch" in result.stdout
    assert "kernels   built" in result.stdout
    assert "Traceback" not in result.stderr


def test_a_missing_module_is_reported_with_reason_and_fix(tmp_path: Path) -> None:
    result = report(NPC_EXT_CXXFLAGS="-DOTHER", CXX="/nowhere/c++", NPC_EXT_CACHE=str(tmp_path))
    assert result.returncode == 1
    assert "MISSING" in result.stdout
    assert "CXX=/nowhere/c++ does not name a program; install one" in result.stdout
    assert "plain PyTorch is used instead" in result.stdout


@pytest.mark.slow
def test_a_report_compiles_nothing_unless_it_is_told_to(tmp_path: Path) -> None:
    setting = {"NPC_EXT_CXXFLAGS": "-DOTHER", "NPC_EXT_CACHE": str(tmp_path / "cache"), "NPC_EXT_NVCC": ""}
    setting["CXX"] = str(imitated_compiler(tmp_path / "c++"))
    result = report(**setting)
    assert result.returncode == 1
    assert line(result.stdout, "kernels").startswith("not built yet: the first optimizer compiles them (about 25 s")
    assert line(result.stdout, "kernels").endswith(", or now: python -m npc_ext --build")
    assert "because the module built ahead of time is older than the sources next to it" in result.stdout
    assert line(result.stdout, "CUDA") == "no kernels: NPC_EXT_NVCC='' switches CUDA off"
    assert line(result.stdout, "nvcc") == "not looked for: NPC_EXT_NVCC='' switches CUDA off"
    assert "plain PyTorch" not in result.stdout
    assert not result.stderr and not (tmp_path / "cache").exists()
    for arguments, said in ((["--build"], "compiling its kernels"), ([], "")):
        result = report(*arguments, **setting)
        assert result.returncode == 0, result.stdout
        assert line(result.stdout, "kernels").startswith(f"built just in time: {tmp_path}/cache/")
        assert said in result.stderr and bool(said) == bool(result.stderr)


@pytest.mark.slow
def test_a_build_that_failed_is_reported_as_missing(tmp_path: Path) -> None:
    compiler = imitated_compiler(tmp_path / "c++", "echo 'error: out of ideas'; exit 1")
    setting = {"NPC_EXT_CXXFLAGS": "-DOTHER", "NPC_EXT_CACHE": str(tmp_path), "NPC_EXT_NVCC": "", "CXX": str(compiler)}
    for arguments in (["--build"], []):
        result = report(*arguments, **setting)
        assert result.returncode == 1
        assert "MISSING" in line(result.stdout, "kernels")
        assert "error: out of ideas" in result.stdout and "not built yet" not in result.stdout


class Cuda:
    """Imitates torch.cuda with some GPUs."""

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus

    def is_available(self) -> bool:
        return self.gpus > 0

    def device_count(self) -> int:
        return self.gpus

    def get_device_name(self, index: int) -> str:
        return "A GPU"

    def get_device_capability(self, index: int) -> tuple[int, int]:
        return 8, 0


def rows_of(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    torch_cuda: str | None,
    gpus: int = 0,
    gpus_here: tuple[str, ...] = (),
) -> tuple[int, Callable[[str], str]]:
    """The exit status of a report and its rows, on a machine with these GPUs and this CUDA of torch."""
    imitated: Any = SimpleNamespace(
        __version__="2.9", version=SimpleNamespace(cuda=torch_cuda), cuda=Cuda(gpus), get_num_threads=lambda: 1
    )
    monkeypatch.setattr(__main__, "_torch", lambda: (imitated, "2.9"))
    monkeypatch.setattr(compilers, "gpus_here", lambda: gpus_here)
    monkeypatch.setattr(just_in_time, "_may_compile", True)
    for cached in (native.why_no_cuda, native.status_on):
        cached.cache_clear()
    status = __main__.main([])
    for cached in (native.why_no_cuda, native.status_on):
        cached.cache_clear()
    return status, partial(line, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("torch_cuda", "gpus_here", "said"),
    [
        (None, (), "none: there is no GPU here, and this torch was built without CUDA"),
        ("12.8", (), "none: there is no GPU here"),
        (None, ("90",), "NOT USED: there is one here (sm_90), but this torch was built without CUDA; fix: install one"),
        (
            "12.8",
            ("80", "90"),
            "NOT USED: there is one here (sm_80, sm_90), but torch cannot use it; torch.cuda.init()",
        ),
    ],
)
def test_it_is_said_why_torch_uses_no_gpu(
    torch_cuda: str | None,
    gpus_here: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, row = rows_of(monkeypatch, capsys, torch_cuda=torch_cuda, gpus_here=gpus_here)
    assert status == 0
    assert row("GPUs").startswith(said)


def test_nvcc_that_was_not_found_and_one_that_is_not_used_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    toolkit = compilers.Toolkit(tmp_path / "nvcc", "13.0", "", ("90",))
    for name in ("NPC_EXT_NVCC", "NPC_EXT_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    for found, setting, said in (
        ((None, ()), {}, "none: no nvcc was found (the CUDA toolkit, 12.1 or newer, has it)"),
        ((None, ("/x/nvcc is older than CUDA 12.1",)), {}, "none: /x/nvcc is older than CUDA 12.1"),
        ((toolkit, ()), {}, f"{tmp_path}/nvcc (CUDA 13.0), 'pip install .' builds for 90+PTX"),
        (
            (toolkit, ()),
            {"TORCH_CUDA_ARCH_LIST": "sometimes"},
            f"{tmp_path}/nvcc (CUDA 13.0), not used: TORCH_CUDA_ARCH_LIST=sometimes has",
        ),
        ((toolkit, ()), {"NPC_EXT_NVCC": ""}, "not looked for: NPC_EXT_NVCC='' switches CUDA off"),
    ):
        monkeypatch.setattr(compilers, "find_toolkit", lambda found=found: found)
        for name, value in setting.items():
            monkeypatch.setenv(name, value)
        _, row = rows_of(monkeypatch, capsys, torch_cuda="13.0")
        assert row("nvcc").startswith(said)


def test_a_module_without_cuda_kernels_says_why_and_is_not_used_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module: Any = SimpleNamespace(
        __file__=str(build.PACKAGE / build.MODULE_FILE),
        why_no_cuda="no nvcc was found",
        compiler="12.2.0",
        isas=lambda: ["baseline"],
        isa_in_use=lambda: "baseline",
    )
    monkeypatch.setattr(native, "status", lambda: native.Native(module, "built ahead of time: there"))
    status, row = rows_of(monkeypatch, capsys, torch_cuda="13.0", gpus=1)
    said = "the module was built without CUDA kernels, because no nvcc was found; fix that and build it again: "
    assert row("CUDA").startswith(f"no kernels: {said}")
    assert row("GPU 0").startswith(f"A GPU, sm_80; NOT USED: {said}")
    assert row("kernels") == "built ahead of time: there, by GCC 12.2.0"
    assert status == 1


def test_kernels_that_are_not_built_for_a_gpu_yet_are_not_built_by_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cuda = SimpleNamespace(
        why_not_on=lambda index: ("the module has code for sm_90, but GPU 0 is sm_80", True),
        versions=lambda: (13000, 13000, 13000, "580"),
    )
    module: Any = SimpleNamespace(
        __file__="/x", cuda=cuda, cuda_archs="90", compiler="Clang", isas=lambda: [], isa_in_use=lambda: "baseline"
    )
    monkeypatch.setattr(native, "status", lambda: native.Native(module, "built"))
    monkeypatch.setattr(native, "module", lambda: module)
    monkeypatch.setattr(compilers, "why_no_nvcc", lambda: "")
    monkeypatch.setenv("NPC_EXT_CACHE", str(tmp_path / "cache"))
    status, row = rows_of(monkeypatch, capsys, torch_cuda="13.0", gpus=1)
    assert row("GPU 0") == (
        "A GPU, sm_80; not built yet: the first optimizer compiles the kernels for it, or now: "
        "python -m npc_ext --build; the module has code for sm_90, but GPU 0 is sm_80"
    )
    assert status == 1
    assert not (tmp_path / "cache").exists()


def test_help_says_what_the_exit_status_means() -> None:
    result = report("--help")
    assert result.returncode == 0
    assert "--build" in result.stdout and "The exit status is 0 if the kernels are built" in result.stdout


def test_the_instruction_set_can_be_chosen() -> None:
    assert "baseline in use" in report(NPC_EXT_ISA="baseline").stdout


@pytest.mark.slow
def test_a_user_without_home_or_name_gets_a_report_and_an_optimizer(tmp_path: Path) -> None:
    program = (
        f"import os\n{NOBODY}\nimport runpy, torch\nfrom npc_ext import NPC\n"
        "model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))\n"
        "optimizer = NPC(model)\nmodel(torch.ones(4, 2)).sum().backward(); optimizer.step()\n"
        "runpy.run_module('npc_ext', run_name='__main__')"
    )
    setting = {"NPC_EXT_CACHE": "", "XDG_CACHE_HOME": "", "TMPDIR": str(tmp_path), "NPC_EXT_CXXFLAGS": "-DOTHER"}
    result = run("-c", program, **setting, CXX=str(imitated_compiler(tmp_path / "c++")))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"kernels   built just in time: {tmp_path}/npc_ext-{os.getuid()}" in result.stdout
    assert "there is no home folder, so the kernels are kept in" in result.stderr


def test_why_the_module_beside_the_sources_is_not_used_is_reported(tmp_path: Path) -> None:
    compiler = imitated_compiler(tmp_path / "c++")
    result = report("--build", NPC_EXT_CXXFLAGS="-DOTHER", CXX=str(compiler), NPC_EXT_CACHE=str(tmp_path))
    assert result.returncode == 0
    why = (
        "because the module built ahead of time is older than the sources next to it (NPC_EXT_CXXFLAGS changed since; "
    )
    assert f"          built just in time {why}" in result.stdout
    assert f"files, for CPUs only), {why}" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(compilers.nvcc() is None, reason="there is no nvcc (CUDA 12.1 or newer) on this machine")
def test_architectures_that_nvcc_does_not_know_are_reported() -> None:
    result = report(TORCH_CUDA_ARCH_LIST="4.0 8.0+PTX", NPC_EXT_ARCHS="")
    assert result.returncode == 0
    assert "for 80+PTX; TORCH_CUDA_ARCH_LIST=4.0 8.0+PTX has 40, and " in result.stdout
    result = report(TORCH_CUDA_ARCH_LIST="sometimes", NPC_EXT_ARCHS="")
    assert "), not used: TORCH_CUDA_ARCH_LIST=sometimes has the entry" in line(result.stdout, "nvcc")


def test_tests_and_the_processes_that_they_start_have_one_thread_each() -> None:
    """Where a machine is busy, threads that spin until all of them have run take a quarter of an hour for nothing."""
    script = "import torch; print(torch.get_num_threads())"
    child = run("-c", script)
    assert child.stdout.strip() == str(torch.get_num_threads()) == os.environ["OMP_NUM_THREADS"]
