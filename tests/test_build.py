"""The just-in-time build: once among processes, never half done, with errors that say everything."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
    return {**os.environ, "NPC_EXT_CACHE": str(cache), "NPC_EXT_CXXFLAGS": "-O0", **more}


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
def test_what_is_missing_is_named_with_its_mend(tmp_path: Path, setting: dict[str, str], message: str) -> None:
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


def test_paths_with_spaces_build(tmp_path: Path) -> None:
    target = tmp_path / "with space" / _build.MODULE_FILE
    os.environ["NPC_EXT_CXXFLAGS"] = "-O0"
    try:
        _build.build(target, tmp_path / "a folder")
    finally:
        del os.environ["NPC_EXT_CXXFLAGS"]
    assert target.stat().st_size > 10_000
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_no_torch_header_and_no_cuda_launch_syntax_in_csrc() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert "<torch/" not in text and "<ATen/" not in text and "<<<" not in text
