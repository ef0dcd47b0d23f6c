"""The just-in-time build: once among processes, never half done, with errors that say everything."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from npc_ext.kernels import build

ROOT = Path(__file__).resolve().parents[2]
# Loads build.py and native.py alone: no torch, so that a process starts in a moment.
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
    # -O0 makes no difference to what is tested here and a large one to how long it takes.
    return {**os.environ, "NPC_EXT_CACHE": str(cache), "NPC_EXT_CXXFLAGS": "-O0", "NPC_EXT_NVCC": "", **more}


def start(cache: Path, package: Path = ROOT / "npc_ext", **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, str(package)],
        env=environment(cache, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


# A C++ compiler that compiles nothing: its module is the one that is here. It says what it is called with.
COMPILER = """#!/bin/sh
echo "$0 $*" >> "{log}"
while [ $# -gt 0 ]; do case "$1" in
  -o) out=$2; shift;; -MF) rules=$2; shift;; -shared) module="{module}";; -c) source=$2;;
esac; shift; done
{extra}
if [ -n "$module" ]; then cp "$module" "$out"; else echo > "$out"; fi
if [ -n "$rules" ]; then echo "$out:" > "$rules"; fi
"""
NVCC = """#!/bin/sh
case "$1" in
  --version) echo 'Cuda compilation tools, release {release}, V{release}.0'; exit;;
  --dryrun) echo '#$ TOP={top}' >&2; exit;;
  --list-gpu-arch) echo compute_75; echo compute_80; echo compute_90; exit;;
esac
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def imitated_compiler(path: Path, extra: str = "", module: Path | str | None = None) -> Path:
    """The path of a compiler that takes no time; `path`.log has how it was called, a line each time."""
    from npc_ext.kernels import native

    module = module or str(native.module().__file__)
    return script(path, COMPILER.format(log=f"{path}.log", module=module, extra=extra))


def imitated_nvcc(folder: Path, release: str = "13.0", extra: str = "exit 0", library: bool = True) -> Path:
    """The path of an nvcc in a toolkit of its own, which knows three architectures."""
    if library:
        script(folder / "lib64" / "libcudart_static.a", "")
    more = COMPILER.format(log=f"{folder}.log", module="", extra=extra)
    return script(folder / "bin" / "nvcc", NVCC.format(release=release, top=folder) + more)


def calls(compiler: Path) -> list[str]:
    log = Path(f"{compiler}.log")
    return log.read_text().splitlines() if log.exists() else []


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
    assert sorted(path.name for path in modules(built)[0].parent.iterdir()) == [build.MODULE_FILE, "lock"]


def test_a_second_import_takes_milliseconds_and_compiles_nothing(built: Path) -> None:
    before = modules(built)[0].stat().st_mtime_ns
    output, errors = finish(start(built))
    assert not errors
    assert modules(built)[0].stat().st_mtime_ns == before
    assert float(output.split()[-1]) < 0.5


def test_a_failing_compilers_whole_output_reaches_the_user(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "npc_ext", tmp_path / "npc_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    source = tmp_path / "csrc" / "cpu" / "isa.cpp"
    source.write_text(source.read_text() + "\nint broken = not_a_name;\n")
    output, _ = finish(start(tmp_path / "cache", tmp_path / "npc_ext"))
    assert "the C++ compiler failed" in output
    assert "‘not_a_name’ was not declared" in output or "'not_a_name'" in output
    assert not list((tmp_path / "cache").glob("*/_C*"))


def test_a_builder_killed_half_way_blocks_and_poisons_nothing_and_the_next_one_goes_on(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.touch()
    waits = f'case "$source" in *isa.cpp) while [ -e {blocked} ]; do sleep 0.02; done;; esac'
    compiler = imitated_compiler(tmp_path / "c++", waits)
    process = start(tmp_path / "cache", CXX=str(compiler))
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.o"))) < 7 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.glob("cache/*/_C*"))
    blocked.unlink()
    before = len(calls(compiler))
    output, _ = finish(start(tmp_path / "cache", CXX=str(compiler)))
    assert "built just in time" in output
    assert len(calls(compiler)) - before <= 3, "what was blocked, perhaps its neighbour, and the link"
    assert not list(tmp_path.rglob("objects"))


def test_a_build_that_failed_is_remembered_and_not_tried_again(tmp_path: Path) -> None:
    compiler = imitated_compiler(tmp_path / "c++", "echo 'error: out of ideas'; exit 1")
    first, _ = finish(start(tmp_path / "cache", CXX=str(compiler)))
    tried = len(calls(compiler))
    second, errors = finish(start(tmp_path / "cache", CXX=str(compiler)))
    assert "error: out of ideas" in first and "error: out of ideas" in second
    assert "compiling" not in errors and len(calls(compiler)) == tried > 0
    (remembered,) = (tmp_path / "cache").rglob("failed.txt")
    assert f"to compile again, delete {remembered})" in second
    remembered.unlink()
    finish(start(tmp_path / "cache", CXX=str(compiler)))
    assert len(calls(compiler)) > tried


@pytest.mark.parametrize("words", ["No space left on device", "Disk quota exceeded"])
def test_a_full_disk_is_named_and_tried_again(tmp_path: Path, words: str) -> None:
    compiler = imitated_compiler(tmp_path / "c++", f"echo 'c++: error: {words}'; exit 1")
    output, _ = finish(start(tmp_path / "cache", CXX=str(compiler)))
    assert f"cannot write to {tmp_path / 'cache'} ({words.lower()}: free some there or in /" in output
    assert not list(tmp_path.rglob("failed.txt"))


def test_compilers_are_asked_to_speak_english(tmp_path: Path) -> None:
    words = '[ "$LC_ALL" = C ] && echo "No space left on device" || echo "Kein Platz mehr verfügbar"; exit 1'
    compiler = imitated_compiler(tmp_path / "c++", words)
    output, _ = finish(start(tmp_path / "cache", CXX=str(compiler), LC_ALL="de_DE.UTF-8"))
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
    compiler = imitated_compiler(tmp_path / "c++", end)
    output, _ = finish(start(tmp_path / "cache", CXX=str(compiler)))
    assert "the C++ compiler was killed, or ran out of memory" in output
    assert not list(tmp_path.rglob("failed.txt"))


@pytest.mark.parametrize("behind", ["cached", "compiled"])
def test_a_module_that_does_not_load_is_deleted_and_reported(tmp_path: Path, behind: str) -> None:
    broken = tmp_path / "broken"
    broken.write_text("no module")
    cache = tmp_path / "cache"
    if behind == "compiled":
        compiler = imitated_compiler(tmp_path / "c++", module=broken)
        output, _ = finish(start(cache, CXX=str(compiler)))
        assert re.search(r"the compiled module does not load, and was deleted: ImportError: .*file too short", output)
        assert f"is {compiler} a C++ compiler for {sys.executable}?" in output
        assert not modules(cache)
        return
    compiler = imitated_compiler(tmp_path / "c++")
    finish(start(cache, CXX=str(compiler)))
    modules(cache)[0].write_text("no module")
    output, errors = finish(start(cache, CXX=str(compiler)))
    assert re.search(r"_C\S+ does not load \(.*file too short\); it is deleted and built again", errors)
    assert "built just in time" in output


# A user that the system does not know, as in a container: no HOME, and no entry in its list of users.
NOBODY = "import pwd\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown; os.environ.pop('HOME', None)"


def of_nobody(tmp_path: Path, **more: str) -> tuple[str, str]:
    compiler = tmp_path / "c++"
    if not compiler.exists():
        imitated_compiler(compiler)
    setting = {"NPC_EXT_CACHE": "", "XDG_CACHE_HOME": "", "TMPDIR": str(tmp_path), "FIRST": NOBODY, **more}
    return finish(start(tmp_path, CXX=str(compiler), **setting))


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
    assert "point NPC_EXT_CACHE at a folder that is" in output
    assert not modules(folder)


def test_status_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from npc_ext.kernels import native

    def fail() -> Any:
        raise RuntimeError("something new")

    monkeypatch.setattr(native, "_prebuilt", fail)
    found = native.status.__wrapped__()
    assert (found.module, found.reason) == (None, "RuntimeError: something new")


def test_a_lock_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    compiler = imitated_compiler(tmp_path / "c++")
    finish(start(tmp_path / "cache", CXX=str(compiler)))
    (lock,) = (tmp_path / "cache").rglob("lock")
    modules(tmp_path / "cache")[0].unlink()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        output, errors = finish(start(tmp_path / "cache", CXX=str(compiler), NPC_EXT_LOCK_TIMEOUT="1.2"))
    assert f"waiting for another process to build the kernels (it holds {lock}) ..." in errors
    assert f"the lock file {lock} has been held for 1 seconds by a process that compiles nothing" in output
    assert "end that process or delete the lock file" in output
    assert not list(tmp_path.rglob("failed.txt"))


def test_a_file_system_without_locks_builds_all_the_same(tmp_path: Path) -> None:
    first = f"import fcntl\ndef none(*_): raise OSError({errno.ENOLCK}, 'No locks available')\nfcntl.flock = none"
    compiler = imitated_compiler(tmp_path / "c++")
    output, errors = finish(start(tmp_path / "cache", CXX=str(compiler), FIRST=first))
    assert "built just in time" in output
    assert "lock cannot be locked ([Errno" in errors
    assert not list(tmp_path.rglob("building-*"))


def test_a_lock_lives_as_long_as_the_compiler(tmp_path: Path) -> None:
    """If only Python is killed, the next process does not write into the objects that are being compiled."""
    blocked = tmp_path / "blocked"
    blocked.touch()
    compiler = imitated_compiler(tmp_path / "c++", f"while [ -e {blocked} ]; do sleep 0.02; done")
    process = start(tmp_path / "cache", CXX=str(compiler))
    deadline = time.monotonic() + 60
    while not calls(compiler) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (lock,) = (tmp_path / "cache").rglob("lock")
    try:
        with lock.open("w") as wanted, pytest.raises(BlockingIOError):
            fcntl.flock(wanted, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        blocked.unlink()
    output, _ = finish(start(tmp_path / "cache", CXX=str(compiler)))
    assert "built just in time" in output
    process.communicate(timeout=60)


def test_progress_is_shown_on_a_terminal_only(tmp_path: Path) -> None:
    compiler = imitated_compiler(tmp_path / "c++")
    _, errors = finish(start(tmp_path / "piped", CXX=str(compiler)))
    assert re.fullmatch(
        r"npc_ext: compiling its kernels for this machine, once \(\d files, for CPUs only\), because no module built "
        r"ahead of time \.\.\.\n",
        errors,
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD, str(ROOT / "npc_ext")],
        env=environment(tmp_path / "terminal", CXX=str(compiler)),
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    assert process.wait(60) == 0
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    os.close(theirs)
    count = len(build.sources(build.Cuda())) + 1
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


def test_a_stale_module_is_not_run(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "npc_ext", tmp_path / "npc_ext", ignore=shutil.ignore_patterns("__pycache__"))
    header = tmp_path / "csrc" / "rules.h"
    header.write_text(header.read_text() + "\n// edited\n")
    # Compiled anew, and that is what runs (LOAD asserts it); without a compiler, nothing runs.
    keep_prebuilt = LOAD.replace("native._prebuilt = ", "unused = ")

    def load(**setting: str) -> tuple[str, str]:
        command = [sys.executable, "-c", keep_prebuilt, str(tmp_path / "npc_ext")]
        setting = environment(tmp_path / "cache", **setting)
        result = subprocess.run(command, env=setting, capture_output=True, text=True, check=True)
        return result.stdout, result.stderr

    why = (
        "the module built ahead of time is older than the sources beside it (csrc/rules.h changed since; to build it "
        "anew: 'make .venv/build.stamp' or 'python setup.py build_ext --inplace')"
    )
    keep_flags = {"NPC_EXT_CXXFLAGS": ""}
    output, _ = load(CXX="/nowhere/c++", **keep_flags)
    assert f"{why}; no C++ compiler" in output
    output, errors = load(CXX=str(imitated_compiler(tmp_path / "c++")), **keep_flags)
    assert "built just in time" in output
    assert f"because {why} ..." in errors
    assert "(NPC_EXT_CXXFLAGS, csrc/rules.h changed since;" in load(CXX="/nowhere/c++")[0]


@pytest.mark.parametrize("change", ["flags", "compiler", "arguments", "includes", "sources"])
def test_the_cache_key_changes_with(change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = build.cache_key()
    if change == "flags":
        monkeypatch.setenv("NPC_EXT_CXXFLAGS", "-g")
    elif change == "compiler":
        compiler = tmp_path / "c++"
        compiler.write_text("#!/bin/sh\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
    elif change == "arguments":
        monkeypatch.setenv("CXX", f"{build.compiler_command()[0]} -m64")
    elif change == "includes":
        monkeypatch.setenv("CPATH", str(tmp_path))
    else:
        shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
        (tmp_path / "csrc" / "new.h").write_text("")
        monkeypatch.setattr(build, "source_dir", lambda: tmp_path / "csrc")
    assert build.cache_key() != before


def test_paths_with_spaces_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "with space" / build.MODULE_FILE
    monkeypatch.setenv("NPC_EXT_CXXFLAGS", "-O0")
    build.build(target, tmp_path / "a folder", build.Cuda())
    assert target.stat().st_size > 10_000
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize("kind", ["launcher", "masquerade", "clang", "arguments"])
def test_a_compiler_is_called_as_it_was_named_and_nvcc_gets_it_without_its_launcher(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = imitated_compiler(tmp_path / "bin" / "g++")
    # ccache runs the next program of the name that it was called by, or else the one that its arguments name.
    ccache = script(
        tmp_path / "tools" / "ccache",
        f'#!/bin/sh\necho "$0 $*" >> {tmp_path}/ccache.log\n'
        f'case $0 in */ccache) exec "$@";; esac\nexec {tmp_path}/bin/"${{0##*/}}" "$@"\n',
    )
    masquerade = tmp_path / "masquerade" / "g++"
    masquerade.parent.mkdir()
    masquerade.symlink_to(ccache)
    clang = tmp_path / "bin" / "clang++"
    clang.symlink_to(compiler)
    monkeypatch.setenv("PATH", f"{masquerade.parent}:{ccache.parent}:{compiler.parent}:{os.environ['PATH']}")
    value, first, used = {
        "launcher": (f"ccache {compiler}", [str(ccache), str(compiler)], compiler),
        "masquerade": ("g++", [str(masquerade)], compiler),
        "clang": ("clang++", [str(clang)], clang),
        "arguments": (f"'{compiler}' -m64 -DA=1", [str(compiler), "-m64", "-DA=1"], compiler),
    }[kind]
    monkeypatch.setenv("CXX", value)
    assert build.compiler_command() == first
    flags = build.nvcc_flags(build.Cuda(Path("nvcc"), ("90",)))
    assert flags[flags.index("-ccbin") + 1] == str(used)
    build.build(tmp_path / build.MODULE_FILE, tmp_path / "objects", build.Cuda())
    assert all(" -shared " in line or " -c " in line for line in calls(compiler)) and calls(compiler)
    if kind in ("launcher", "masquerade"):
        assert (tmp_path / "ccache.log").read_text().startswith(first[0])
    before = build.cache_key()
    used.write_text(used.read_text() + "# another version\n")
    assert build.cache_key() != before


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ccache", "CXX=.*ccache begins with a launcher, but there is no compiler behind it"),
        ("ccache /nowhere/g++", "CXX=.* begins with a launcher, but /nowhere/g\\+\\+ is not a program"),
        ("g++ 'x", "CXX=g\\+\\+ 'x cannot be read as a command: No closing quotation"),
        ("/nowhere/g++ -m64", "CXX=/nowhere/g\\+\\+ -m64 does not name a program"),
    ],
)
def test_a_compiler_that_is_not_there_is_named(
    value: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", f"{script(tmp_path / 'ccache', '#!/bin/sh').parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", value)
    with pytest.raises(build.BuildError, match=message):
        build.compiler_command()


def test_no_torch_header_and_no_cuda_launch_syntax_in_csrc() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert "<torch/" not in text and "<ATen/" not in text and "<<<" not in text


# ---------------------------------------------------------------------------------------------------------------- CUDA

needs_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="there is no nvcc (CUDA 12.1 or newer) on this machine")


def fresh(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Any:
    """build.py as another process would find it."""
    for name in ("NPC_EXT_ARCHS", "TORCH_CUDA_ARCH_LIST", "NPC_EXT_NVCC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("npc_ext.kernels.build_again", build.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@needs_nvcc
def test_every_cuda_kernel_keeps_to_its_registers_for_every_architecture(tmp_path: Path) -> None:
    from npc_ext.kernels import native

    logs = list((ROOT / "build" / build.MODULE_FILE).glob("cuda_*.log"))
    if not logs:  # the module came from elsewhere
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


@needs_nvcc
def test_the_module_has_cuda_kernels_and_needs_no_driver_to_be_imported() -> None:
    from npc_ext.kernels import native

    found = native.module()
    assert found.cuda_archs
    libraries = subprocess.run(["ldd", found.__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in libraries


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@needs_nvcc
def test_a_launch_without_a_driver_says_so() -> None:
    from npc_ext.kernels import native

    cuda = native.module().cuda
    target = cuda.OnStream(0, 0)
    with pytest.raises(
        RuntimeError,
        match=r"npc_ext: reading the current device failed: cudaError.*; there is no NVIDIA driver, but the kernels "
        r"were compiled with CUDA .* update the driver",
    ):
        cuda.importance(target, 0, 0, 0, 0, 0, (2, 3), (3, 1), (3, 1), 1, 0)


@pytest.mark.parametrize(
    ("environment", "archs"),
    [
        ({"NPC_EXT_ARCHS": "80;90+PTX"}, ("80", "90+PTX")),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 9.0a+PTX"}, ("80", "90a+PTX")),
        ({"NPC_EXT_ARCHS": "75", "TORCH_CUDA_ARCH_LIST": "8.0"}, ("75",)),
    ],
)
def test_architectures_are_those_asked_for(
    environment: dict[str, str], archs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fresh(monkeypatch, **environment).archs() == archs


def test_architectures_are_those_of_the_gpus_present_else_all(monkeypatch: pytest.MonkeyPatch) -> None:
    again = fresh(monkeypatch)
    monkeypatch.setattr(again, "_output_of", lambda command: "9.0\n8.0\n9.0\n")
    assert again.archs() == ("80", "90")
    again = fresh(monkeypatch)
    monkeypatch.setattr(again, "_output_of", lambda command: "")
    assert again.archs() == ("75", "80", "86", "89", "90", "100", "120+PTX")


def test_a_wrong_architecture_or_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    again = fresh(monkeypatch, NPC_EXT_ARCHS="warp9")
    with pytest.raises(
        again.BuildError, match=r"NPC_EXT_ARCHS=warp9 has the entry 'warp9'; expected .* '8.0;9.0\+PTX'"
    ):
        again.archs()
    again = fresh(monkeypatch, NPC_EXT_ARCHS="60;90", NPC_EXT_NVCC=str(imitated_nvcc(tmp_path)))
    with pytest.raises(
        again.BuildError, match=r"NPC_EXT_ARCHS=60;90 has 60, and \S+nvcc knows 75, 80, 90 only; change"
    ):
        again.cuda()
    again = fresh(monkeypatch, NPC_EXT_NVCC="/nowhere/nvcc")
    with pytest.raises(again.BuildError, match="NPC_EXT_NVCC=/nowhere/nvcc does not name a program"):
        again.nvcc()
    assert fresh(monkeypatch, NPC_EXT_NVCC="").nvcc() is None


def with_toolkit(monkeypatch: pytest.MonkeyPatch, home: Path, **environment: str) -> Any:
    """build.py where the only CUDA toolkit is in one folder, which the user did not name to this package."""
    again = fresh(monkeypatch, CUDA_HOME=str(home), PATH="/usr/bin:/bin", **environment)
    which = shutil.which
    monkeypatch.setattr(
        again.shutil,
        "which",
        lambda name, **more: None if str(name).startswith("/usr/local/cuda") else which(name, **more),
    )
    return again


@pytest.mark.parametrize(
    ("value", "archs", "said"),
    [
        ("6.0 7.0 8.0+PTX", ("80+PTX",), "has 60, 70, and {nvcc} knows 75, 80, 90 only; compiling for 80+PTX"),
        ("Ampere;Hopper+PTX", ("80", "90+PTX"), "has 86, and {nvcc} knows"),
        ("Turing;Hopper", ("75", "90"), ""),
        ("all", ("75", "80", "90+PTX"), ""),
        ("native", ("90",), ""),
        ("6.0;7.0", (), "left out: TORCH_CUDA_ARCH_LIST=6.0;7.0 has 60, 70, and {nvcc} knows 75, 80, 90 only"),
        ("warp 9", (), "left out: TORCH_CUDA_ARCH_LIST=warp 9 has the entry 'warp'; expected architectures"),
    ],
)
def test_torchs_list_of_architectures_is_taken_as_far_as_nvcc_knows_it(
    value: str, archs: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = imitated_nvcc(tmp_path)
    again = with_toolkit(monkeypatch, tmp_path, TORCH_CUDA_ARCH_LIST=value)
    monkeypatch.setattr(again, "_gpus_here", lambda: ("90",))
    plan = again.cuda()
    assert plan.archs == archs
    assert said.format(nvcc=nvcc) in "".join(plan.notices)
    assert bool(said) == bool(plan.notices)


def test_native_architectures_need_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    imitated_nvcc(tmp_path)
    again = with_toolkit(monkeypatch, tmp_path, TORCH_CUDA_ARCH_LIST="native")
    monkeypatch.setattr(again, "_gpus_here", lambda: ())
    assert "TORCH_CUDA_ARCH_LIST=native asks for the GPUs of this machine, but there are none" in again.cuda().reason


def test_a_gpu_newer_than_nvcc_gets_ptx_and_an_older_one_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    imitated_nvcc(tmp_path)
    again = with_toolkit(monkeypatch, tmp_path)
    for gpus, archs in [(("80", "120"), ("80", "90+PTX")), (("70",), ())]:
        monkeypatch.setattr(again, "_gpus_here", lambda gpus=gpus: gpus)
        plan = again.cuda()
        assert plan.archs == archs
    assert plan.reason == "this machine has a GPU of sm_70, and its nvcc knows 75, 80, 90 only"


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"library": False}, "libcudart_static.a is not with {nvcc}; install the whole CUDA toolkit"),
        ({"release": "11.8"}, "{nvcc} is older than CUDA 12.1"),
        ({"release": "unknown"}, "{nvcc} --version does not work (exit status 0: Cuda compilation tools"),
        (None, "CUDA_HOME={home} has no bin/nvcc"),
    ],
)
def test_a_toolkit_that_does_not_work_is_left_out_unless_it_was_asked_for(
    made: dict[str, Any] | None, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = tmp_path / "bin" / "nvcc" if made is None else imitated_nvcc(tmp_path, **made)
    plan = with_toolkit(monkeypatch, tmp_path).cuda()
    assert plan.nvcc is None
    assert reason.format(nvcc=nvcc, home=tmp_path) in plan.reason
    assert plan.notices == (f"the CUDA kernels are left out: {plan.reason}",)
    again = with_toolkit(monkeypatch, tmp_path, NPC_EXT_NVCC=str(nvcc))
    with pytest.raises(again.BuildError, match=f"NPC_EXT_NVCC={nvcc}"):
        again.cuda()
    again = with_toolkit(monkeypatch, tmp_path, NPC_EXT_ARCHS="90")
    with pytest.raises(again.BuildError, match=f"NPC_EXT_ARCHS asks for CUDA kernels, but .*{tmp_path}.*; fix that"):
        again.cuda()


def test_another_toolkit_is_used_where_that_of_cuda_home_does_not_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = imitated_nvcc(tmp_path / "good")
    again = with_toolkit(monkeypatch, tmp_path / "none")
    monkeypatch.setenv("PATH", f"{nvcc.parent}:/usr/bin:/bin")
    plan = again.cuda()
    assert plan.nvcc == nvcc
    assert plan.notices == (f"CUDA_HOME={tmp_path / 'none'} has no bin/nvcc, so {nvcc} is used",)


def test_if_only_cuda_fails_to_compile_the_module_is_built_for_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = imitated_compiler(tmp_path / "c++")
    nvcc = imitated_nvcc(tmp_path / "toolkit", extra="echo 'nvcc error: cudafe++ died (signal 11)'; exit 139")
    target = tmp_path / "built" / build.MODULE_FILE
    again = with_toolkit(monkeypatch, tmp_path / "toolkit", CXX=str(compiler))
    again.build(target, tmp_path / "objects")
    assert target.exists()
    said = capsys.readouterr().err
    assert f"the CUDA kernels are left out, because {nvcc} failed: nvcc error: cudafe++ died (signal 11) (" in said
    assert any("NPC_EXT_WHY_NO_CUDA" in line and "cudafe++ died" in line for line in calls(compiler))
    assert "-lcudart_static" not in calls(compiler)[-1]

    again = with_toolkit(monkeypatch, tmp_path / "toolkit", CXX=str(compiler), NPC_EXT_ARCHS="90")
    with pytest.raises(again.BuildError, match="the CUDA compiler failed"):
        again.build(target, tmp_path / "objects")


def test_a_failing_cpp_compiler_is_not_taken_for_a_failure_of_cuda(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = imitated_compiler(tmp_path / "c++", "echo 'error: none'; exit 1")
    imitated_nvcc(tmp_path / "toolkit", extra="")
    again = with_toolkit(monkeypatch, tmp_path / "toolkit", CXX=str(compiler))
    with pytest.raises(again.CompileError, match=r"the C\+\+ compiler failed"):
        again.build(tmp_path / build.MODULE_FILE, tmp_path / "objects")


def test_just_in_time_cuda_is_compiled_where_torch_has_it_and_for_the_gpu_that_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    imitated_nvcc(tmp_path)
    again = with_toolkit(monkeypatch, tmp_path, TORCH_CUDA_ARCH_LIST="7.5 8.0 9.0")
    monkeypatch.setattr(again, "_gpus_here", lambda: ("90",))
    for has_cuda, archs in [(False, ()), (True, ("90",))]:
        monkeypatch.setattr(again, "_torch_has_cuda", lambda has_cuda=has_cuda: has_cuda)
        assert again.cuda(just_in_time=True).archs == archs
    monkeypatch.setattr(again, "_gpus_here", lambda: ())
    assert "there is no GPU" in again.cuda(just_in_time=True).reason
    monkeypatch.setattr(again, "_torch_has_cuda", lambda: False)
    monkeypatch.setenv("NPC_EXT_ARCHS", "80")
    assert again.cuda(just_in_time=True).archs == ("80",)


@pytest.mark.parametrize(
    ("line", "has_cuda"),
    [
        ("cuda: Optional[str] = '12.8'", True),
        ("cuda: Optional[str] = None", False),
        ('cuda = "13.0"', True),
        ("", False),
    ],
)
def test_whether_torch_has_cuda_is_seen_without_importing_it(
    line: str, has_cuda: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script(tmp_path / "torch" / "__init__.py", "raise OSError('broken')")
    script(tmp_path / "torch" / "version.py", f"__version__ = '2.9.0'\n{line}\nhip = None\n")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build._torch_has_cuda() == has_cuda


@pytest.mark.parametrize(("backend", "looks"), [("auto", 1), ("native", 1), ("reference", 0)])
def test_kernels_are_loaded_or_compiled_when_an_optimizer_is_built(
    backend: Any, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from npc_ext import EWC, NPC
    from npc_ext.kernels import native

    for optimizer in (NPC, EWC):
        asked = []
        monkeypatch.setattr(native, "status", lambda asked=asked: asked.append(1))
        monkeypatch.setattr(native, "module", lambda asked=asked: asked.append(1))
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        optimizer(model, lr=0.1, backend=backend)
        assert len(asked) == looks


def test_a_module_without_cuda_says_why() -> None:
    from npc_ext.kernels import native

    compiled: Any = SimpleNamespace(__file__="/cache/key/_C.so", why_no_cuda="nvcc is ill")
    said = native._compiled_without_cuda(compiled)
    assert said == (
        "the module was compiled without CUDA (nvcc is ill); fix that and delete /cache/key to compile it again"
    )


def test_gpu_tensors_without_cuda_kernels_fall_back_and_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from npc_ext import ops
    from npc_ext.kernels import native

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
    from npc_ext.kernels import native
    from npc_ext.optim import base

    class Compiled:
        isas: Any = None

    monkeypatch.setattr(native, "status", lambda: native.Native(Compiled(), "test"))  # type: ignore[arg-type]
    native.why_no_cuda.cache_clear()
    native.status_on.cache_clear()
    on_gpu = SimpleNamespace(is_cpu=False, is_cuda=True, device=torch.device("cuda:0"))
    model: Any = SimpleNamespace(named_parameters=lambda: [("weight", on_gpu)])
    with pytest.raises(
        native.NativeUnavailableError,
        match=r"'weight' is on cuda:0 and the module was compiled without CUDA; install the CUDA toolkit .*'make'",
    ):
        base.require_native(model)
    native.why_no_cuda.cache_clear()
    native.status_on.cache_clear()


def on_gpu_without(
    monkeypatch: pytest.MonkeyPatch, *obstacles: tuple[str, bool], nvcc: Path | None = Path("nvcc")
) -> list[SimpleNamespace]:
    """A GPU on which each module that is loaded has its obstacle: the first one, and one built just in time."""
    from npc_ext.kernels import native

    modules = [
        SimpleNamespace(__file__=f"/{at}/_C.so", cuda=SimpleNamespace(why_not_on=lambda device, one=one: one))
        for at, one in enumerate(obstacles)
    ]
    monkeypatch.setattr(native, "status", lambda: native.Native(modules[0], "test"))  # type: ignore[arg-type]
    monkeypatch.setattr(native, "module", lambda: modules[0])
    monkeypatch.setattr(native, "why_no_cuda", lambda: "")
    monkeypatch.setattr(native, "_import_once", lambda path: modules[-1])
    monkeypatch.setattr(build, "build_cached", lambda: Path(modules[-1].__file__))
    monkeypatch.setattr(build, "nvcc", lambda: nvcc)
    return modules


CODE = "the module has code for sm_90, but GPU 0 is sm_80 (cudaErrorNoKernelImageForDevice)"


def status_on_gpu() -> Any:
    from npc_ext.kernels import native

    return native.status_on.__wrapped__(0)  # without what was seen on a GPU that is here


def test_a_module_without_code_for_the_gpu_is_compiled_for_it_just_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = on_gpu_without(monkeypatch, (CODE, True), ("", False))
    found = status_on_gpu()
    assert found.module is modules[1]
    assert found.origin == "built just in time: /1/_C.so"


def test_a_module_that_runs_on_the_gpu_is_used_there(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = on_gpu_without(monkeypatch, ("", False))
    assert status_on_gpu().module is modules[0]


@pytest.mark.parametrize(
    ("obstacles", "nvcc", "reason"),
    [
        ([("the driver is too old", False)], Path("nvcc"), "^the driver is too old$"),
        ([(CODE, True)], None, "is sm_80 .*there is no nvcc to compile it for this GPU; install the CUDA toolkit"),
        ([(CODE, True)], Path("nvcc"), "is sm_80 .*; unset NPC_EXT_ARCHS"),
        ([(CODE, True), (CODE, True)], Path("nvcc"), "is sm_80 .*; unset NPC_EXT_ARCHS"),
    ],
)
def test_what_cannot_run_on_a_gpu_is_explained(
    obstacles: list[tuple[str, bool]], nvcc: Path | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from npc_ext.kernels import native

    on_gpu_without(monkeypatch, *obstacles, nvcc=nvcc)
    found = status_on_gpu()
    assert found.module is None
    assert re.search(reason, found.reason)
    monkeypatch.setattr(native, "status_on", lambda device: found)
    with pytest.raises(native.NativeUnavailableError, match="npc_ext's CUDA kernels do not run on GPU 0: "):
        native.module_on(0)


def test_a_failing_compiler_is_part_of_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu_without(monkeypatch, (CODE, True))

    def fail() -> Path:
        raise build.BuildError("the C++ compiler failed")

    monkeypatch.setattr(build, "build_cached", fail)
    assert "compiling it for this GPU failed: the C++ compiler failed" in status_on_gpu().reason


def test_the_module_knows_its_driver_and_the_gpus_architecture() -> None:
    from .. import cuda_on_cpu

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
