"""Runs the kernels' tests again under sanitizers: the CPU's kernels, and the CUDA kernels compiled for the CPU.

Other tests here break kernels on purpose, and show that the sanitizers report it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from npc_ext.kernels import compilers

from .. import cuda_on_cpu

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
THREAD = "-O2 -fno-omit-frame-pointer -fsanitize=thread"  # with -O1 the compiler itself fails
SUPPRESSIONS = cuda_on_cpu.HERE / "thread_sanitizer.supp"
KERNEL_TESTS = [
    f"tests/kernels/test_{name}.py"
    for name in ("importance", "every_update", "update", "rounding", "anchored_update", "workspace")
]
# A launch takes a quarter of a second under the thread sanitizer. These tests have few launches, and
# together they cover every kernel, layout, dtype and option.
OTHER_UPDATES = "(adam_update or anchored_update or connection_update)"
FEW_LAUNCHES = (
    f"random or (networks_of_any and not {OTHER_UPDATES}) or (updates_agree and bfloat16 and {OTHER_UPDATES}) "
    "or network_step or begin_anywhere or (relu_backward and ((64 and 200) or (5 and 7))) or kernels_round "
    "or (many_neurons and 4097) or (any_number_of_positions and 49)"
)


def runtime(name: str) -> str:
    """The sanitizer's library, which must be loaded before Python."""
    compiler = compilers.compiler_command()
    path = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    return path.strip()


def run(arguments: list[str], libraries: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [runtime(name) for name in libraries]
    if not all(os.path.isabs(path) for path in paths):
        pytest.skip("the compiler comes without sanitizer libraries")
    # Without random addresses, because the thread sanitizer needs its memory at fixed addresses.
    fixed = [setarch, platform.machine(), "-R"] if (setarch := shutil.which("setarch")) else []
    return subprocess.run(
        [*fixed, sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": " ".join(paths), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def run_with_address_sanitizer(
    arguments: list[str], cache: Path, csrc: Path = cuda_on_cpu.CSRC
) -> subprocess.CompletedProcess[str]:
    # Compiled here, because the compiler is slow under the sanitizer.
    cuda_on_cpu.compiled(tuple(ADDRESS.split()), csrc)
    # With -O0 and -g1, the CPU's kernels compile three times as fast, and their tests take as long.
    settings = {"NPC_EXT_CACHE": str(cache), "NPC_EXT_NVCC": "", "NPC_EXT_CXXFLAGS": f"{ADDRESS} -O0 -g1"}
    build = "from npc_ext.kernels import just_in_time; just_in_time.build_cached()"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, env={**os.environ, **settings}, check=True)
    return run(
        arguments,
        ["libasan.so", "libubsan.so"],
        **settings,
        CUDA_ON_CPU_FLAGS=ADDRESS,
        CUDA_ON_CPU_CSRC=str(csrc),
        # Python leaks memory. The sanitizer checks the ends of torch's allocations, too.
        ASAN_OPTIONS="detect_leaks=0",
    )


def run_with_thread_sanitizer(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    cuda_on_cpu.compiled(tuple(THREAD.split()))  # here, because the compiler does not run under the sanitizer
    return run(
        arguments,
        ["libtsan.so"],
        CUDA_ON_CPU_FLAGS=THREAD,
        OMP_NUM_THREADS="1",
        TSAN_OPTIONS=f"halt_on_error=1 exitcode=66 report_thread_leaks=0 suppressions={SUPPRESSIONS}",
        **environment,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sanitized")


@pytest.fixture(scope="module")
def runs(cache: Path) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """The kernels' tests under both sanitizers, at the same time."""
    tests = ["-m", "pytest", *KERNEL_TESTS, "-qs", "-p", "no:cacheprovider", "--hypothesis-profile=sanitizers", "-k"]
    of_address = f"not opcheck and not compiled and (not cuda_on_cpu or {FEW_LAUNCHES})"
    of_thread = f"workspace or (cuda_on_cpu and ({FEW_LAUNCHES}))"
    with ThreadPoolExecutor(2) as pool:
        yield {
            "address": pool.submit(run_with_address_sanitizer, [*tests, of_address], cache),
            "thread": pool.submit(run_with_thread_sanitizer, [*tests, of_thread]),
        }


@pytest.mark.parametrize("sanitizer", ["address", "thread"])  # address: and undefined behaviour
def test_kernels_are_clean_under_the_sanitizers(
    sanitizer: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]
) -> None:
    result = runs[sanitizer].result()
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert " passed" in result.stdout


def test_the_sanitizer_objects_to_a_kernel_that_reads_one_element_too_many(cache: Path) -> None:
    # The kernel is called with one row more than the tensors have.
    script = (
        "import torch; from npc_ext.kernels import native; n = torch.randn(4, 40); out = torch.empty(40); m = native.module();"
        "m.cpu.importance(m.cpu.Threads(1), n.data_ptr(), n.data_ptr(), out.data_ptr(), 0, 0, (5, 40), (40, 1), (40, 1),"
        " 1, 0)"
    )
    result = run_with_address_sanitizer(["-c", script], cache)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


def test_the_address_sanitizer_objects_to_cuda_kernels_whose_index_is_off_by_one(cache: Path, tmp_path: Path) -> None:
    csrc = shutil.copytree(cuda_on_cpu.CSRC, tmp_path / "csrc")
    kernel = csrc / "cuda" / "importance.h"
    sound, broken = "load_if(slot.wanted, slot.n, n[k])", "load_if(slot.wanted, slot.n + 1, n[k])"
    assert sound in kernel.read_text()
    kernel.write_text(kernel.read_text().replace(sound, broken))
    tests = [KERNEL_TESTS[0], "-qs", "-p", "no:cacheprovider", "-k", "cuda_on_cpu and repeats"]
    result = run_with_address_sanitizer(["-m", "pytest", *tests], cache, csrc)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


@pytest.mark.parametrize("function", ["sum_over_block", "grid_barrier"])
def test_the_thread_sanitizer_objects_to_a_missing_barrier(function: str) -> None:
    # The sanitizer remembers the last four accesses to a word, so it sees the race in most launches, but not in all.
    script = (
        "from npc_ext import ops; from tests import cuda_on_cpu; from tests.kernels.arguments import activations, call, network\n"
        "cuda_on_cpu.take_over(setattr)\n"
        "given = {**activations(), **network('update_')}\n"
        "del given['measured']\n"
        "for _ in range(40): call(ops.network_step_, given)\n"
        "print('not seen')"
    )
    result = run_with_thread_sanitizer(["-c", script], CUDA_ON_CPU_WITHOUT_BARRIER_IN=function)
    assert result.returncode == 66, result.stdout + result.stderr[-5000:]
    assert "ThreadSanitizer: data race" in result.stderr
