"""The kernels' own tests, run again on a module built with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from npc_ext import _build

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"


def runtime(name: str) -> str:
    """The sanitizer's library, which has to be in the process before Python."""
    compiler = _build.compiler_command()
    path = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    return path.strip()


def run(arguments: list[str], cache: Path, **more: str) -> subprocess.CompletedProcess[str]:
    libraries = [runtime(name) for name in ("libasan.so", "libubsan.so")]
    if not all(os.path.isabs(library) for library in libraries):
        pytest.skip("the compiler comes without sanitizer libraries")
    environment = {
        **os.environ,
        "NPC_EXT_CACHE": str(cache),
        "NPC_EXT_CXXFLAGS": FLAGS,
        "LD_PRELOAD": " ".join(libraries),
        # Python itself leaks; torch's allocations go through the sanitizer and are checked at their ends.
        "ASAN_OPTIONS": "detect_leaks=0",
        **more,
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sanitized")


def test_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers(cache: Path) -> None:
    tests = ["tests/test_importance.py", "tests/test_update.py"]
    options = ["-q", "-p", "no:cacheprovider", "-k", "not opcheck and not compiled"]
    result = run(["-m", "pytest", *tests, *options], cache)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert " passed" in result.stdout


def test_the_sanitizer_objects_to_a_kernel_that_reads_one_element_too_many(cache: Path) -> None:
    # The same module, told that the tensors are one row longer than they are.
    script = (
        "import torch; from npc_ext import _native; n = torch.randn(4, 40); out = torch.empty(40);"
        "_native.module().importance(n.data_ptr(), n.data_ptr(), out.data_ptr(), 0, (5, 40), (40, 1), (40, 1), 1, 0, 1)"
    )
    result = run(["-c", script], cache)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
