"""Settings of all tests: threads, time limits, seeds and GPUs; and the kernels to run tests with."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import FrameType

# Threads that spin while they wait are very slow if other processes are busy. So this process and those
# that tests start use one thread. Tests of several threads call torch.set_num_threads. torch reads these
# variables once, so they are set before it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

from npc_ext.kernels import launch, native

from . import cuda_on_cpu

settings.register_profile("npc_ext", deadline=None, derandomize=True, max_examples=60)
settings.register_profile("sanitizers", deadline=None, derandomize=True, max_examples=15)  # they are slow
settings.load_profile("npc_ext")


def pytest_configure(config: pytest.Config) -> None:
    # Not in pyproject.toml, because pytest would then import torch before this file sets the number of threads.
    config.addinivalue_line("filterwarnings", "error::npc_ext.neurons.tap.ImportanceWarning")
    tiny = "ignore:only .* of the trained parameters:npc_ext.neurons.tap.ImportanceWarning"  # as tests' models are
    config.addinivalue_line("filterwarnings", tiny)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


# The slowest tests compile, and take a few minutes on an idle machine.
MOST_SECONDS = 600


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """Fails a test that hangs, with the place where it hangs. This also ends a child of `subprocess.run`."""

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
    """On a GPU: true float32 instead of TF32, and the same bits in every run."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    # This context manager of torch can set flags even after torch.testing._internal was imported.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        torch.backends.cuda.matmul.allow_tf32 = False
        yield
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=["baseline", "avx2", "avx512", "cuda_on_cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test with all kernels, and returns the device for its tensors.

    These are the CPU's kernels for each instruction set of this machine, the CUDA kernels compiled for the CPU, and the
    CUDA kernels on a GPU.
    """
    if request.param == "cuda":
        yield "cuda"
    elif request.param == "cuda_on_cpu":
        if request.node.callspec.params.get("dtype") == torch.float64:
            pytest.skip("float64 on CUDA is left to PyTorch")
        cuda_on_cpu.take_over(monkeypatch.setattr)
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
