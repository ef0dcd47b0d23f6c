"""python -m npc_ext: the state of an installation, also of a broken one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from npc_ext.kernels import compilers

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


def report(**environment: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "npc_ext", **environment)


def test_a_sound_installation_is_described() -> None:
    result = report()
    assert result.returncode == 0, result.stdout + result.stderr
    for text in ("npc_ext   0.", "torch", "kernels   built", "in use; this processor runs baseline"):
        assert text in result.stdout
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
    result = report(NPC_EXT_CXXFLAGS="-DOTHER", CXX=str(compiler), NPC_EXT_CACHE=str(tmp_path))
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
    assert "nvcc      not used, so the kernels are built for the CPU only: TORCH_CUDA_ARCH_LIST=some" in result.stdout


def test_tests_and_the_processes_that_they_start_have_one_thread_each() -> None:
    """Where a machine is busy, threads that spin until all of them have run take a quarter of an hour for nothing."""
    script = "import torch; print(torch.get_num_threads())"
    child = run("-c", script)
    assert child.stdout.strip() == str(torch.get_num_threads()) == os.environ["OMP_NUM_THREADS"]
