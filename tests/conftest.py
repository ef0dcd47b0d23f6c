"""What all tests share: threads, time limits, seeds, GPU selection, and the kernels to run them with."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import FrameType

# Threads that wait for each other by spinning take forever where other processes are busy. So there is one in this
# process and in those that tests start. Tests of several threads ask for them with torch.set_num_threads. These have to
# be set before torch, which reads them once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

from npc_ext.kernels import launch, native

from . import cuda_on_cpu

settings.register_profile("npc_ext", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("npc_ext")


def pytest_configure(config: pytest.Config) -> None:
    # Not in pyproject.toml: pytest would import torch for it before this file sets the number of threads.
    config.addinivalue_line("filterwarnings", "error::npc_ext.neurons.tap.ImportanceWarning")
    tiny = (
        "ignore:only .* of the elements that are trained:npc_ext.neurons.tap.ImportanceWarning"  # as tests' models are
    )
    config.addinivalue_line("filterwarnings", tiny)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


# The slowest test, which compiles, takes a minute of an idle machine.
MOST_SECONDS = 600


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """Fails a test that hangs, where it hangs. A child that it waits for by `subprocess.run` ends with it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the test has taken more than {MOST_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(MOST_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _exact_gpu() -> Iterator[None]:
    """On a GPU: float32 as it is, not TF32, and the same bits in every run."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    # The context manager of torch is allowed to set flags also after torch.testing._internal was imported.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        torch.backends.cuda.matmul.allow_tf32 = False
        yield
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=["baseline", "avx2", "avx512", "cuda_on_cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test with all kernels there are and returns where its tensors have to be.

    The CPU's kernels once for each instruction set that this machine has, the CUDA kernels on the CPU, and on a GPU.
    """
    if request.param == "cuda":
        yield "cuda"
    elif request.param == "cuda_on_cpu":
        if request.node.callspec.params.get("dtype") == torch.float64:
            pytest.skip("float64 on CUDA is left to PyTorch")
        monkeypatch.setattr(launch, "_launch", cuda_on_cpu.launch)
        monkeypatch.setattr(launch, "has_relu_backward", lambda tensor: True)
        yield "cpu"
    else:
        module = native.module()
        if request.param not in module.isas():
            pytest.skip(f"this processor does not run {request.param}")
        before = module.isa_in_use()
        module.use_isa(request.param)
        yield "cpu"
        module.use_isa(before)
