"""The just-in-time build: once among processes, never half done, with errors that say everything."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from npc_ext.kernels import build, compilers, just_in_time

from .imitations import NOBODY, calls, imitated_compiler, script

ROOT = Path(__file__).resolve().parents[2]


# Loads the build and native.py alone, without torch, so that a process starts quickly.
LOAD = """
import os, sys, types
exec(os.environ.get("FIRST", ""))
package = types.ModuleType("npc_ext"); package.__path__ = [sys.argv[1]]; sys.modules["npc_ext"] = package
from npc_ext.kernels import build, native
native._prebuilt = lambda: (None, "no module built ahead of time")
import time; started = time.perf_counter()
found = native.status()
assert found.module is None or found.module.__file__ in found.origin
print(found.origin if found.module else found.reason, time.perf_counter() - started)
"""


def environment(cache: Path, **more: str) -> dict[str, str]:
    # -O0 makes no difference to what is tested here, but compiles much faster.
    return {**os.environ, "NPC_EXT_CACHE": str(cache), "NPC_EXT_CXXFLAGS": "-O0", "NPC_EXT_NVCC": "", **more}


def start(
    cache: Path, package: Path = ROOT / "npc_ext", code: str = LOAD, stderr: int = subprocess.PIPE, **more: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(package)],
        env=environment(cache, **more),
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output, errors


def load(cache: Path, compiler: Path, **more: str) -> tuple[str, str]:
    """Loads the kernels with this compiler, in another process. Returns its output and its errors."""
    return finish(start(cache, CXX=str(compiler), **more))


def modules(cache: Path) -> list[Path]:
    return sorted(cache.rglob("_C*"))


def copied_package(folder: Path, *ignored: str) -> Path:
    """A copy of the package with its sources next to it."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    return shutil.copytree(ROOT / "npc_ext", folder / "npc_ext", ignore=shutil.ignore_patterns("__pycache__", *ignored))


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_that_start_together_build_once_and_the_next_loads_that_in_milliseconds(tmp_path: Path) -> None:
    # Without pybind11, the kernels are compiled with torch's copy of its headers.
    first = "sys.modules['pybind11'] = None"
    results = [finish(process) for process in [start(tmp_path, FIRST=first), start(tmp_path, FIRST=first)]]
    assert all("built just in time" in output for output, _ in results)
    assert sum("compiling" in errors for _, errors in results) == 1
    (module,) = modules(tmp_path)
    assert sorted(path.name for path in module.parent.iterdir()) == [build.MODULE_FILE, "lock"]
    before = module.stat().st_mtime_ns
    output, errors = finish(start(tmp_path))
    assert not errors
    assert module.stat().st_mtime_ns == before
    assert float(output.split()[-1]) < 0.5


@pytest.mark.slow
def test_a_failing_compilers_whole_output_reaches_the_user(tmp_path: Path) -> None:
    package = copied_package(tmp_path, "*.so")
    source = tmp_path / "csrc" / "cpu" / "isa.cpp"
    source.write_text(source.read_text() + "\nint broken = not_a_name;\n")
    imitated = imitated_compiler(tmp_path / "imitated")
    real = " ".join(compilers.compiler_command())
    compiler = script(
        tmp_path / "c++", f'#!/bin/sh\ncase "$*" in *isa.cpp*) exec {real} "$@";; esac\nexec {imitated} "$@"\n'
    )
    output, _ = finish(start(tmp_path / "cache", package, CXX=str(compiler)))
    assert "the C++ compiler failed" in output
    assert "‘not_a_name’ was not declared" in output or "'not_a_name'" in output
    assert not list((tmp_path / "cache").glob("*/_C*"))


def test_a_builder_killed_half_way_blocks_and_poisons_nothing_and_the_next_one_goes_on(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.touch()
    waits = f'case "$source" in *isa.cpp) while [ -e {blocked} ]; do sleep 0.02; done;; esac'
    compiler = imitated_compiler(tmp_path / "c++", waits)
    process = start(tmp_path / "cache", CXX=str(compiler))
    wait_until(lambda: len(list(tmp_path.rglob("*.o"))) >= 7)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.glob("cache/*/_C*"))
    blocked.unlink()
    before = len(calls(compiler))
    output, _ = load(tmp_path / "cache", compiler)
    assert "built just in time" in output
    assert len(calls(compiler)) - before <= 3, "what was blocked, perhaps its neighbour, and the link"
    assert not list(tmp_path.rglob("objects"))


def test_a_build_that_failed_is_remembered_and_not_tried_again(tmp_path: Path) -> None:
    compiler = imitated_compiler(tmp_path / "c++", "echo 'error: out of ideas'; exit 1")
    first, _ = load(tmp_path / "cache", compiler)
    tried = len(calls(compiler))
    second, errors = load(tmp_path / "cache", compiler)
    assert "error: out of ideas" in first and "error: out of ideas" in second
    assert "compiling" not in errors and len(calls(compiler)) == tried > 0
    (remembered,) = (tmp_path / "cache").rglob("failed.txt")
    assert f"to compile again, delete {remembered})" in second
    remembered.unlink()
    load(tmp_path / "cache", compiler)
    assert len(calls(compiler)) > tried


@pytest.mark.parametrize("words", ["No space left on device", "Disk quota exceeded"])
def test_a_full_disk_is_named_and_tried_again(tmp_path: Path, words: str) -> None:
    compiler = imitated_compiler(tmp_path / "c++", f"echo 'c++: error: {words}'; exit 1")
    output, _ = load(tmp_path / "cache", compiler)
    assert f"cannot write to {tmp_path / 'cache'} ({words.lower()}: free some there or in /" in output
    assert "point NPC_EXT_CACHE at a folder that can be written and has space" in output
    assert not list(tmp_path.rglob("failed.txt"))


def test_compilers_are_asked_to_speak_english(tmp_path: Path) -> None:
    words = '[ "$LC_ALL" = C ] && echo "No space left on device" || echo "Kein Platz mehr verfügbar"; exit 1'
    output, _ = load(tmp_path / "cache", imitated_compiler(tmp_path / "c++", words), LC_ALL="de_DE.UTF-8")
    assert "no space left on device" in output


@pytest.mark.parametrize(
    "end",
    [
        "echo 'c++: fatal error: Killed signal terminated program cc1plus'; exit 1",
        "echo 'cc1plus: out of memory allocating 65536 bytes'; exit 1",
        "kill -9 $PPID",  # the shell that ninja runs it in
    ],
)
def test_a_compiler_that_was_killed_is_not_taken_for_one_that_fails(tmp_path: Path, end: str) -> None:
    output, _ = load(tmp_path / "cache", imitated_compiler(tmp_path / "c++", end))
    assert "the C++ compiler was killed, or ran out of memory" in output
    assert not list(tmp_path.rglob("failed.txt"))


def test_a_compiled_module_that_does_not_load_is_deleted_and_reported(tmp_path: Path) -> None:
    broken, cache = tmp_path / "broken", tmp_path / "cache"
    broken.write_text("no module")
    compiler = imitated_compiler(tmp_path / "c++", module=broken)
    output, _ = load(cache, compiler)
    assert re.search(r"the compiled module does not load, and was deleted: ImportError: .*file too short", output)
    assert f"is {compiler} a C++ compiler for {sys.executable}?" in output
    assert not modules(cache)


def test_a_cached_module_that_does_not_load_is_reported_and_built_again(tmp_path: Path) -> None:
    compiler, cache = imitated_compiler(tmp_path / "c++"), tmp_path / "cache"
    load(cache, compiler)
    modules(cache)[0].write_text("no module")
    output, errors = load(cache, compiler)
    assert re.search(r"_C\S+ does not load \(.*file too short\); it is deleted and built again", errors)
    assert "built just in time" in output


def of_nobody(tmp_path: Path, **more: str) -> tuple[str, str]:
    compiler = tmp_path / "c++"
    if not compiler.exists():
        imitated_compiler(compiler)
    setting = {"NPC_EXT_CACHE": "", "XDG_CACHE_HOME": "", "TMPDIR": str(tmp_path), "FIRST": NOBODY, **more}
    return load(tmp_path, compiler, **setting)


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({}, "there is no home folder"),
        ({"XDG_CACHE_HOME": "/proc/nowhere"}, "the just-in-time build cannot write to /proc/nowhere/npc_ext (["),
        ({"FIRST": "", "HOME": "/proc/nowhere"}, "cannot write to /proc/nowhere/.cache/npc_ext (["),
    ],
)
def test_without_a_home_folder_kernels_are_kept_in_a_temporary_one(
    tmp_path: Path, setting: dict[str, str], why: str
) -> None:
    folder = tmp_path / f"npc_ext-{os.getuid()}"
    output, errors = of_nobody(tmp_path, **setting)
    assert f"built just in time: {folder}" in output
    assert why in errors and f"so the kernels are kept in {folder}" in errors
    assert folder.stat().st_mode & 0o077 == 0
    output, errors = of_nobody(tmp_path, **setting)
    assert f"built just in time: {folder}" in output
    assert not errors


def test_a_temporary_folder_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / f"npc_ext-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    output, _ = of_nobody(tmp_path)
    assert "not a folder that only this user can write" in output
    assert "point NPC_EXT_CACHE at a folder that can be written and has space" in output
    assert not modules(folder)


@pytest.mark.slow
def test_a_lock_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    compiler = imitated_compiler(tmp_path / "c++")
    load(tmp_path / "cache", compiler)
    (lock,) = (tmp_path / "cache").rglob("lock")
    modules(tmp_path / "cache")[0].unlink()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        output, errors = load(tmp_path / "cache", compiler, NPC_EXT_LOCK_TIMEOUT="1.2")
    assert f"waiting for another process to build the kernels (it holds {lock}) ..." in errors
    assert f"the lock file {lock} has been held for 1 seconds by a process that compiles nothing" in output
    assert "end that process or delete the lock file" in output
    assert not list(tmp_path.rglob("failed.txt"))


def test_a_file_system_without_locks_builds_all_the_same(tmp_path: Path) -> None:
    first = f"import fcntl\ndef none(*_): raise OSError({errno.ENOLCK}, 'No locks available')\nfcntl.flock = none"
    compiler = imitated_compiler(tmp_path / "c++")
    output, errors = load(tmp_path / "cache", compiler, FIRST=first)
    assert "built just in time" in output
    assert "lock cannot be locked ([Errno" in errors
    assert not list(tmp_path.rglob("building-*"))


def test_a_lock_lives_as_long_as_the_compiler(tmp_path: Path) -> None:
    """If only Python is killed, the next process does not write into the objects that are being compiled."""
    blocked = tmp_path / "blocked"
    blocked.touch()
    compiler = imitated_compiler(tmp_path / "c++", f"while [ -e {blocked} ]; do sleep 0.02; done")
    process = start(tmp_path / "cache", CXX=str(compiler))
    wait_until(lambda: calls(compiler))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (lock,) = (tmp_path / "cache").rglob("lock")
    try:
        with lock.open("w") as wanted, pytest.raises(BlockingIOError):
            fcntl.flock(wanted, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        blocked.unlink()
    output, _ = load(tmp_path / "cache", compiler)
    assert "built just in time" in output
    process.communicate(timeout=60)


def test_progress_is_shown_on_a_terminal_only(tmp_path: Path) -> None:
    compiler = imitated_compiler(tmp_path / "c++")
    _, errors = load(tmp_path / "piped", compiler)
    assert re.fullmatch(
        r"npc_ext: compiling its kernels for this machine, once \(\d files, for CPUs only\), because no module built "
        r"ahead of time \.\.\.\n",
        errors,
    )
    ours, theirs = pty.openpty()
    finish(start(tmp_path / "terminal", stderr=theirs, CXX=str(compiler)))
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    os.close(theirs)
    count = len(build.sources(compilers.Cuda())) + 1
    assert f"npc_ext: {count} of {count} done, the last one {build.MODULE_FILE}" in shown
    assert "npc_ext: 1 of" in shown


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


def test_tools_that_are_missing_are_named_before_anything_is_compiled(tmp_path: Path) -> None:
    compiler = imitated_compiler(tmp_path / "c++")
    hide = (
        "import sysconfig; paths = sysconfig.get_paths; sys.modules['ninja'] = None\n"
        "sysconfig.get_paths = lambda *options: {**paths(*options), 'include': '/nowhere'}"
    )
    output, errors = load(tmp_path / "cache", compiler, FIRST=hide, PATH="/nowhere")
    assert "Python.h is missing in /nowhere; install Python's headers" in output
    assert "; ninja is missing, which runs the compilers: pip install ninja" in output
    assert not errors and not (tmp_path / "cache").exists()


def test_a_folder_whose_files_cannot_be_executed_is_named(tmp_path: Path) -> None:
    first = (
        "import subprocess; run = subprocess.run\n"
        "def noexec(command, **options):\n"
        "    if '-I' not in command: return run(command, **options)\n"
        "    said = 'ImportError: _C.so: failed to map segment from shared object'\n"
        "    return subprocess.CompletedProcess(command, 1, said)\n"
        "subprocess.run = noexec"
    )
    output, _ = load(tmp_path / "cache", imitated_compiler(tmp_path / "c++"), FIRST=first)
    assert re.search(
        r"failed to map segment .*may code from .*cache\S+ be executed \(.* mounted with noexec\)\? .*NPC_EXT_CACHE",
        output,
    )


@pytest.mark.parametrize("checkout", [True, False])
def test_a_module_built_ahead_of_time_is_built_again_by_the_command_that_messages_name(
    checkout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = copied_package(tmp_path, "*.so")
    monkeypatch.setattr(build, "PACKAGE", package)
    if not checkout:
        assert build.how_to_build() == "'pip install --force-reinstall --no-deps .' in a checkout of npc_ext"
        return
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command, folder = re.fullmatch(r"'python (.*)' in (.*)", build.how_to_build()).groups()  # type: ignore[union-attr]
    assert folder == str(tmp_path)
    compiler = imitated_compiler(tmp_path / "c++")
    for _ in range(2):
        variables = environment(tmp_path, CXX=str(compiler))
        subprocess.run([sys.executable, *command.split()], cwd=folder, env=variables, capture_output=True, check=True)
        (package / build.MODULE_FILE).unlink()


def test_a_stale_module_is_not_run(tmp_path: Path) -> None:
    package = copied_package(tmp_path)
    header = tmp_path / "csrc" / "rules.h"
    header.write_text(header.read_text() + "\n// edited\n")
    # Compiled anew, and that is what runs (LOAD asserts it); without a compiler, nothing runs.
    keep_prebuilt = LOAD.replace("native._prebuilt = ", "unused = ")

    def loaded(**setting: str) -> tuple[str, str]:
        return finish(start(tmp_path / "cache", package, keep_prebuilt, **setting))

    why = (
        "the module built ahead of time is older than the sources next to it (csrc/rules.h changed since; to build it "
        "again: 'pip install --force-reinstall --no-deps .' in a checkout of npc_ext)"
    )
    keep_flags = {"NPC_EXT_CXXFLAGS": ""}
    output, _ = loaded(CXX="/nowhere/c++", **keep_flags)
    assert f"{why}; no C++ compiler" in output
    output, errors = loaded(CXX=str(imitated_compiler(tmp_path / "c++")), **keep_flags)
    assert "built just in time" in output
    assert f"because {why} ..." in errors
    assert "(NPC_EXT_CXXFLAGS, csrc/rules.h changed since;" in loaded(CXX="/nowhere/c++")[0]


@pytest.mark.parametrize("change", ["flags", "compiler", "arguments", "includes", "sources"])
def test_the_cache_key_changes_with(change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = just_in_time.cache_key()
    if change == "sources":
        csrc = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
        (csrc / "new.h").write_text("")
        monkeypatch.setattr(build, "source_dir", lambda: csrc)
    else:
        name, value = {
            "flags": ("NPC_EXT_CXXFLAGS", "-g"),
            "compiler": ("CXX", str(script(tmp_path / "c++", "#!/bin/sh\n"))),
            "arguments": ("CXX", f"{compilers.compiler_command()[0]} -m64"),
            "includes": ("CPATH", str(tmp_path)),
        }[change]
        monkeypatch.setenv(name, value)
    assert just_in_time.cache_key() != before
