"""The build: its files, its flags, and what happens when it fails."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from npc_ext.kernels import build, compilers, native

from .imitations import calls, imitated_compiler, imitated_nvcc, needs_nvcc

ROOT = Path(__file__).resolve().parents[2]


def test_paths_with_spaces_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csrc = shutil.copytree(ROOT / "csrc", tmp_path / "the sources" / "csrc")
    monkeypatch.setattr(build, "source_dir", lambda: csrc)
    compiler = imitated_compiler(
        tmp_path / "a compiler" / "c++", '[ -z "$source" ] || [ -f "$source" ] || { echo "no $source"; exit 1; }'
    )
    monkeypatch.setenv("CXX", str(compiler))
    target = tmp_path / "with space" / build.MODULE_FILE
    build.build(target, tmp_path / "a folder", compilers.Cuda())
    assert target.stat().st_size > 10_000
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert len(calls(compiler)) == len(build.sources(compilers.Cuda())) + 1


def test_no_torch_header_and_no_cuda_launch_syntax_in_csrc() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert "<torch/" not in text and "<ATen/" not in text and "<<<" not in text


@needs_nvcc
def test_every_cuda_kernel_keeps_to_its_registers_for_every_architecture(tmp_path: Path) -> None:
    logs = list((ROOT / "build" / build.MODULE_FILE).glob("cuda_*.log"))
    if not logs:  # the module was not built here
        build.build(tmp_path / build.MODULE_FILE, tmp_path)
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
    assert len({name for name, _ in kernels}) == 58, (
        "24 of importance; for small and large networks 8 of SGD's update, 4 of Adam's, 3 of the anchored and 1 of CPC's; "
        "1 of wide layers and 1 of the whole step"
    )
    assert {arch for _, arch in kernels} == {arch.removesuffix("+PTX") for arch in native.module().cuda_archs.split()}
    # All are compiled for blocks of 256 threads, two on a multiprocessor at least: 65,536 / 512 registers a thread.
    bad = [report for report in reports if list(map(int, report[2:5])) != [0, 0, 0] or int(report[5]) > 128]
    assert not bad, "stack frame, spill stores, spill loads, registers"


def test_if_only_cuda_fails_to_compile_the_module_is_built_for_the_cpu(
    imitate_machine: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = imitated_compiler(tmp_path / "c++")
    nvcc = imitated_nvcc(tmp_path / "toolkit", extra="echo 'nvcc error: cudafe++ died (signal 11)'; exit 139")
    target = tmp_path / "built" / build.MODULE_FILE
    imitate_machine(home=tmp_path / "toolkit", CXX=str(compiler))
    build.build(target, tmp_path / "objects")
    assert target.exists()
    said = capsys.readouterr().err
    assert f"the CUDA kernels are left out, because {nvcc} failed: nvcc error: cudafe++ died (signal 11) (" in said
    assert any("NPC_EXT_WHY_NO_CUDA" in line and "cudafe++ died" in line for line in calls(compiler))
    assert "-lcudart_static" not in calls(compiler)[-1]

    imitate_machine(home=tmp_path / "toolkit", CXX=str(compiler), NPC_EXT_ARCHS="90")
    with pytest.raises(compilers.BuildError, match="the CUDA compiler failed"):
        build.build(target, tmp_path / "objects")


def test_a_failing_cpp_compiler_is_not_taken_for_a_failure_of_cuda(
    imitate_machine: Callable[..., None], tmp_path: Path
) -> None:
    compiler = imitated_compiler(tmp_path / "c++", "echo 'error: none'; exit 1")
    imitated_nvcc(tmp_path / "toolkit", extra="")
    imitate_machine(home=tmp_path / "toolkit", CXX=str(compiler))
    with pytest.raises(build.CompileError, match=r"the C\+\+ compiler failed"):
        build.build(tmp_path / build.MODULE_FILE, tmp_path / "objects")
