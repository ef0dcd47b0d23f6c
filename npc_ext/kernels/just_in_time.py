"""The just-in-time build: compiles the module once among all processes, and keeps it in a cache folder."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .build import MODULE_FILE, CompileError, DiskFullError, build, build_key, sources
from .compilers import BuildError, Cuda, check_tools, compiler_command, compiler_in, cuda, say

# Environment variables that compilers read.
_VARIABLES = ("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
_may_compile = True


class NotBuiltError(BuildError):
    """The module is not built yet. Nothing is missing to build it, but this process only looks."""


def compile_nothing() -> None:
    """From now on, this process only finds modules that are built already, as `python -m npc_ext` does."""
    global _may_compile
    _may_compile = False


def cache_key(plan: Cuda | None = None) -> str:
    """`build_key` with everything else that decides the result: compilers, GPUs and the Python that will import it.

    A compiler is identified by its file, size and time. This takes microseconds; asking for its version would not.
    """
    plan = cuda(just_in_time=True) if plan is None else plan
    command = compiler_command()
    programs = [*command, str(compiler_in(command)), *([str(plan.nvcc)] if plan.nvcc else [])]
    files = [Path(found).resolve() for program in programs if (found := shutil.which(program))]
    known = [(str(path), status.st_size, status.st_mtime_ns) for path in files for status in [path.stat()]]
    library = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) else ""
    variables = [os.environ.get(name) for name in _VARIABLES]
    identity = (build_key(), command, known, plan.release, plan.archs, variables, library, sys.version, MODULE_FILE)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def build_cached(why: str = "") -> Path:
    """Returns the module built just in time. Compiles it first if it is missing, once among all processes.

    A build that failed is remembered beside its objects and is not tried again.

    Args:
        why: why the module is needed, for the message.

    Raises:
        BuildError: the build failed, now or before, something is missing for it, or there is no folder for it.
        NotBuiltError: it is not built yet, and `compile_nothing` was called.
    """
    plan = cuda(just_in_time=True)
    try:
        key = cache_key(plan)
    except BuildError:
        check_tools()  # names everything that is missing, and not only the compiler
        raise
    folders = _folders()
    for folder, temporary in folders.items():
        if temporary:
            try:
                _check_private(folder)
            except OSError:
                continue
        if os.path.exists(folder / key / MODULE_FILE):
            return folder / key / MODULE_FILE
        _raise_remembered(folder / key)
    check_tools()
    if not _may_compile:
        raise NotBuiltError("the kernels are not built yet")
    problems: list[str] = []
    for folder, temporary in folders.items():
        try:
            if temporary:
                folder.mkdir(mode=0o700, exist_ok=True)
                _check_private(folder)
                say(f"{'; '.join(problems) or 'there is no home folder'}, so the kernels are kept in {folder}")
            (folder / key).mkdir(parents=True, exist_ok=True)
            return _build_in(folder / key, plan, why)
        except (OSError, DiskFullError) as error:
            problems.append(f"the just-in-time build cannot write to {folder} ({error})")
    raise BuildError(
        f"{'; '.join(problems)}; fix that, or point NPC_EXT_CACHE at a folder that can be written and has space"
    )


def discard(module: Path) -> None:
    """Deletes a module that does not load, if permissions allow."""
    with suppress(OSError):
        module.unlink()


def _folders() -> dict[Path, bool]:
    """The folders where builds are kept, and whether each is in the temporary directory.

    A new build goes to the first that can be written. NPC_EXT_CACHE is the only one if it is set. Else they are npc_ext
    in the user's cache folder and a folder of this user in the temporary directory.
    """
    if named := os.environ.get("NPC_EXT_CACHE"):
        return {Path(named): False}
    found = {}
    with suppress(RuntimeError):  # no HOME, and the system does not know this user
        found[Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npc_ext"] = False
    with suppress(OSError):  # there is no temporary directory that can be written
        user = os.getuid() if hasattr(os, "getuid") else "user"
        found[Path(tempfile.gettempdir()) / f"npc_ext-{user}"] = True
    if not found:
        raise BuildError(
            "the just-in-time build has no folder for its results: there is neither a home folder nor a temporary one; "
            "point NPC_EXT_CACHE at a folder that can be written"
        )
    return found


def _check_private(folder: Path) -> None:
    """Raises OSError if other users can write to a folder in the temporary directory: its modules are executed."""
    found = os.lstat(folder)
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    if not stat.S_ISDIR(found.st_mode) or not mine or found.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "not a folder that only this user can write", str(folder))


def _raise_remembered(folder: Path) -> None:
    """Raises the error of a build that failed before, if there is one."""
    failed = folder / "failed.txt"
    try:
        reason = failed.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    raise CompileError(f"{reason}\n(this was remembered and not tried again; to compile again, delete {failed})")


def _build_in(folder: Path, plan: Cuda, why: str) -> Path:
    """Compiles the module in a cache folder, unless another process has done so in the meantime."""
    target, objects = folder / MODULE_FILE, folder / "objects"
    with _locked(folder / "lock", lambda: _newest(objects)) as lock:
        if target.exists():
            return target
        _raise_remembered(folder)
        gpus = f"and GPUs of {', '.join(f'sm_{arch}' for arch in plan.archs)}" if plan.nvcc else "only"
        because = f", because {why}" if why else ""
        say(f"compiling its kernels for this machine, once ({len(sources(plan))} files, for CPUs {gpus}){because} ...")
        # The objects stay until the build is finished, so that the next process can continue an interrupted one.
        # Without a lock, another process may be writing the same objects.
        private = None if lock is not None else Path(tempfile.mkdtemp(dir=folder, prefix="building-"))
        try:
            build(target, private or objects, plan, lock)
        except CompileError as error:
            with suppress(OSError):
                (folder / "failed.txt").write_text(str(error), encoding="utf-8")
            raise
        finally:
            if private:
                shutil.rmtree(private, ignore_errors=True)
        shutil.rmtree(objects, ignore_errors=True)
    return target


def _newest(folder: Path) -> int:
    """Changes while files are compiled into a folder."""
    try:
        return max((path.stat().st_mtime_ns for path in folder.iterdir()), default=0)
    except OSError:
        return 0


@contextmanager
def _locked(path: Path, progress: Callable[[], object]) -> Iterator[int | None]:
    """Holds the lock file and yields its descriptor, or None where the file system has no locks.

    The operating system holds the lock, so it is released when the builder is killed. On a network file system, the
    lock of another machine that died may stay. So this waits as long as there is progress, and then for
    NPC_EXT_LOCK_TIMEOUT seconds.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield None
        return
    value = os.environ.get("NPC_EXT_LOCK_TIMEOUT") or "600"
    if not re.fullmatch(r"\d+(\.\d*)?", value):
        raise BuildError(f"NPC_EXT_LOCK_TIMEOUT={value} is not a number of seconds; correct it or unset it")
    patience = float(value)
    seen, started, since, told = progress(), time.monotonic(), time.monotonic(), False
    descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    assert descriptor is not None
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            except OSError as error:
                say(f"{path} cannot be locked ({error}): processes that start together may all compile")
                os.close(descriptor)
                descriptor = None
                break
            now = time.monotonic()
            if (latest := progress()) != seen:
                seen, since = latest, now
            if now - since > patience:
                raise BuildError(
                    f"the lock file {path} has been held for {now - started:.0f} seconds by a process that compiles "
                    "nothing, perhaps one of another machine that died; end that process or delete the lock file, and "
                    "try again (NPC_EXT_LOCK_TIMEOUT sets the seconds to wait)"
                )
            if not told and now - started > 1:
                told = True
                say(f"waiting for another process to build the kernels (it holds {path}) ...")
            time.sleep(0.1)
        yield descriptor
    finally:
        if descriptor is not None:
            # Unlocked explicitly, because a program that the compiler left running may have inherited the descriptor.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
