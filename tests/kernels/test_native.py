"""Which compiled module is used, on the CPU and on each GPU, and what is said where there is none."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from npc_ext import EWC, NPC, ops
from npc_ext.kernels import build, compilers, just_in_time, native
from npc_ext.optim import base

from .. import cuda_on_cpu
from .imitations import needs_nvcc

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Forgets what is known about imitated modules and GPUs."""
    caches = native.why_no_cuda, native.status_on
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_status_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise RuntimeError("something new")

    monkeypatch.setattr(native, "_prebuilt", fail)
    found = native.status.__wrapped__()
    assert (found.module, found.reason) == (None, "RuntimeError: something new")


@pytest.mark.parametrize(("backend", "looks"), [("auto", 1), ("native", 1), ("reference", 0)])
def test_kernels_are_loaded_or_compiled_when_an_optimizer_is_built(
    backend: Any, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:

    for optimizer in (NPC, EWC):
        asked = []
        monkeypatch.setattr(native, "status", lambda asked=asked: asked.append(1))
        monkeypatch.setattr(native, "module", lambda asked=asked: asked.append(1))
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        optimizer(model, lr=0.1, backend=backend)
        assert len(asked) == looks


@needs_nvcc
def test_the_module_has_cuda_kernels_and_needs_no_driver_to_be_imported() -> None:
    found = native.module()
    assert found.cuda_archs
    libraries = subprocess.run(["ldd", found.__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in libraries


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@needs_nvcc
def test_a_launch_without_a_driver_says_so() -> None:
    cuda = native.module().cuda
    target = cuda.Stream(0, 0)
    with pytest.raises(
        RuntimeError,
        match=r"npc_ext: reading the current device failed: cudaError.*; there is no NVIDIA driver, but the kernels "
        r"were compiled with CUDA .* update the driver",
    ):
        cuda.importance(target, 0, 0, 0, 0, 0, (2, 3), (3, 1), (3, 1), 1, 0)


def test_a_module_without_cuda_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: Any = SimpleNamespace(__file__="/cache/key/_C.so", why_no_cuda="nvcc is ill")
    monkeypatch.setattr(native, "status", lambda: native.Native(compiled, "test"))
    said = "the module was built without CUDA kernels, because nvcc is ill; fix that and "
    assert native.why_no_cuda() == f"{said}delete /cache/key: the next use compiles it again"
    native.why_no_cuda.cache_clear()
    compiled.__file__ = str(build.PACKAGE / build.MODULE_FILE)
    assert native.why_no_cuda() == f"{said}build it again: {build.how_to_build()}"


def test_gpu_tensors_without_cuda_kernels_fall_back_and_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(native, "why_not_on", lambda device: "the module was compiled without CUDA")
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
    compiled: Any = SimpleNamespace(__file__=str(build.PACKAGE / build.MODULE_FILE), why_no_cuda="no nvcc was found")
    monkeypatch.setattr(native, "status", lambda: native.Native(compiled, "test"))
    on_gpu = SimpleNamespace(is_cpu=False, is_cuda=True, device=torch.device("cuda:0"))
    model: Any = SimpleNamespace(named_parameters=lambda: [("weight", on_gpu)])
    with pytest.raises(
        native.NativeUnavailableError,
        match=r"'weight' is on cuda:0 and the module was built without CUDA kernels, because no nvcc was found; fix that "
        r"and build it again: 'python setup.py build_ext --inplace' in ",
    ):
        base.require_native(model)


def on_gpu_without(
    monkeypatch: pytest.MonkeyPatch, *obstacles: tuple[str, bool], why_no_nvcc: str = ""
) -> list[SimpleNamespace]:
    """A GPU on which each module that is loaded has its obstacle: the first one, and one built just in time."""
    modules = [
        SimpleNamespace(
            __file__=f"/{next(_numbers)}/_C.so",
            cuda=SimpleNamespace(why_not_on=lambda device, obstacle=obstacle: obstacle),
        )
        for obstacle in obstacles
    ]
    monkeypatch.setattr(native, "status", lambda: native.Native(modules[0], "test"))  # type: ignore[arg-type]
    monkeypatch.setattr(native, "module", lambda: modules[0])
    monkeypatch.setattr(native, "why_no_cuda", lambda: "")
    monkeypatch.setattr(native, "import_from", lambda path: modules[-1])
    monkeypatch.setattr(just_in_time, "build_cached", lambda: Path(modules[-1].__file__))
    monkeypatch.setattr(compilers, "why_no_nvcc", lambda: why_no_nvcc)
    return modules


CODE = "the module has code for sm_90, but GPU 0 is sm_80 (cudaErrorNoKernelImageForDevice)"


def test_a_module_without_code_for_the_gpu_is_compiled_for_it_just_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = on_gpu_without(monkeypatch, (CODE, True), ("", False))
    found = native.status_on(0)
    assert found.module is modules[1]
    assert found.origin == f"built just in time: {modules[1].__file__}"


def test_a_module_that_runs_on_the_gpu_is_used_there(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = on_gpu_without(monkeypatch, ("", False))
    assert native.status_on(0).module is modules[0]


@pytest.mark.parametrize(
    ("obstacles", "why_no_nvcc", "reason"),
    [
        ([("the driver is too old", False)], "", "^the driver is too old$"),
        ([(CODE, True)], "it is lost", "is sm_80 .*cannot be compiled for this GPU, because it is lost; fix that, and"),
        ([(CODE, True)], "", "is sm_80 .*; unset NPC_EXT_ARCHS"),
        ([(CODE, True), (CODE, True)], "", "is sm_80 .*; unset NPC_EXT_ARCHS"),
    ],
)
def test_what_cannot_run_on_a_gpu_is_explained(
    obstacles: list[tuple[str, bool]], why_no_nvcc: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu_without(monkeypatch, *obstacles, why_no_nvcc=why_no_nvcc)
    found = native.status_on(0)
    assert found.module is None
    assert re.search(reason, found.reason)
    with pytest.raises(native.NativeUnavailableError, match="npc_ext's CUDA kernels do not run on GPU 0: "):
        native.module_on(0)


def test_a_failing_compiler_is_part_of_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu_without(monkeypatch, (CODE, True))

    def fail() -> Path:
        raise compilers.BuildError("the C++ compiler failed")

    monkeypatch.setattr(just_in_time, "build_cached", fail)
    assert "compiling it for this GPU failed: the C++ compiler failed" in native.status_on(0).reason


def test_the_module_knows_its_driver_and_the_gpus_architecture() -> None:
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
