"""What to compile and how, for the ahead-of-time build (setup.py) and the just-in-time build (native.py) alike.

Imports neither torch nor the rest of the package: setup.py loads this file by its path. The kernels include no torch
header, so the module depends on the C and C++ libraries and on the Python version only.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# The GPUs that a build without one present is for: Turing to Blackwell, and PTX for what comes after.
_ARCHS = ("75", "80", "86", "89", "90", "100", "120")
_OLDEST_CUDA = (12, 1)  # the first to pass 32 KiB of arguments to a kernel
# Names of GPU generations in torch's notation.
_GENERATIONS = {
    "PASCAL": ("60", "61"),
    "VOLTA": ("70",),
    "TURING": ("75",),
    "AMPERE": ("80", "86"),
    "ADA": ("89",),
    "HOPPER": ("90",),
    "BLACKWELL": ("100", "120"),
}
# Programs that run the compiler that is named after them, or that has their name as a link ("masquerading").
_LAUNCHERS = {"ccache", "sccache", "distcc", "icecc", "buildcache", "env", "nice"}
# What compilers read from the environment.
_VARIABLES = ("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")

# What compilers say that were killed, by the kernel when memory runs out for example: the next attempt may go well.
_KILLED = re.compile(
    r"Killed|Terminated|signal 9|[Oo]ut of memory|Cannot allocate memory|memory exhausted|interrupted by user"
)

MODULE_FILE = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
_PACKAGE = Path(__file__).resolve().parent.parent
_X86 = platform.machine().lower() in ("x86_64", "amd64")

# No fast math: rounding and NaN keep their meaning. The two exceptions only say that nobody reads errno or the
# floating-point exception flags, without which loops with sqrt do not vectorize.
_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
_FAST = ["-O3"]
# Products are not fused with sums: where they are would be the compiler's choice, kernel by kernel, and a step has the
# same bits whichever kernels take it. The kernels are limited by memory, so it should cost no time.
_CUDA_FLAGS = ["-std=c++17", "-fmad=false"]
_ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says why and how to fix it."""


class CompileError(BuildError):
    """The compiler fails, or what it made does not load: the next attempt would end in the same way."""


class _CudaError(CompileError):
    """Only CUDA kernels, or the CUDA runtime, failed."""


class _DiskFullError(BuildError):
    """There is no space left where the objects are written."""


@dataclass(frozen=True)
class Source:
    """One translation unit: its path below csrc/, the flags that only it gets, and its name if the path has several."""

    path: str
    flags: tuple[str, ...] = ()
    variant: str = ""


@dataclass(frozen=True)
class Cuda:
    """How the CUDA kernels are compiled. Without a compiler: why they are not.

    Attributes:
        nvcc: the compiler, or None for the CPU only.
        archs: GPU architectures, as ("90", "120+PTX").
        libraries: the folder of the CUDA runtime.
        reason: why there is no compiler; the module remembers it.
        notices: what whoever builds should read.
        release: the compiler's version.
    """

    nvcc: Path | None = None
    archs: tuple[str, ...] = ()
    libraries: str = ""
    reason: str = ""
    notices: tuple[str, ...] = ()
    release: str = ""


def say(sentence: str) -> None:
    """Prints a sentence to standard error, if that is open."""
    with suppress(OSError, ValueError, AttributeError):
        print(f"npc_ext: {sentence}", file=sys.stderr, flush=True)


def source_dir() -> Path:
    """csrc/ inside an installed package, or beside the package in a source checkout."""
    installed = _PACKAGE / "csrc"
    return installed if installed.is_dir() else _PACKAGE.parent / "csrc"


def sources(plan: Cuda) -> list[Source]:
    """Every translation unit of the module for this machine's processor family, and for CUDA where it is compiled."""
    isas = ["baseline", "avx2", "avx512"] if _X86 else ["baseline"]
    kernels = [Source("cpu/kernels.cpp", (f"-DNPC_ISA={isa}", *_FAST, *_ISA_FLAGS[isa]), isa) for isa in isas]
    shared = [Source(f"cpu/{name}.cpp", tuple(_FAST)) for name in ("importance", "update", "isa", "parallel")]
    cuda = (
        [
            Source(f"cuda/{name}.cu", tuple(_FAST))
            for name in (
                *("step", "importance", "update", "adam", "connections", "anchored"),
                *("wide", "workspace", "support"),
            )
        ]
        if plan.nvcc
        else []
    )
    return [*cuda, Source("bindings.cpp", ("-O1",)), *kernels, *shared]


def flags(plan: Cuda) -> list[str]:
    """Compiler flags of every translation unit, before its own."""
    cuda = ["-DNPC_CUDA", f"-DNPC_EXT_CUDA_ARCHS='\"{' '.join(plan.archs)}\"'"] if plan.nvcc else []
    return [*_FLAGS, *(["-DNPC_X86"] if _X86 else []), *cuda]


def user_flags() -> list[str]:
    """Flags from NPC_EXT_CXXFLAGS (for sanitizers, say); they come last, so that they win."""
    return os.environ.get("NPC_EXT_CXXFLAGS", "").split()


def _parts() -> dict[str, str]:
    """What the module is made from, with a digest of each: the sources by their path below csrc/, and the flags."""
    root = source_dir()
    files = sorted(path for kind in ("*.h", "*.cpp", "*.cu") for path in root.rglob(kind))
    parts = {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
    parts["the-compiler-flags"] = repr((_FLAGS, _FAST, _CUDA_FLAGS, _ISA_FLAGS, _X86)).encode()
    parts["NPC_EXT_CXXFLAGS"] = repr(user_flags()).encode()
    return {name: hashlib.sha256(content).hexdigest()[:16] for name, content in parts.items()}


def _key_of(parts: dict[str, str]) -> str:
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:16]


def build_key() -> str:
    """Changes with the sources and the flags: a module that carries another key is stale.

    Not with what else a machine has, a CUDA compiler for example: a module may be built on one and run on another.
    """
    return _key_of(_parts())


def _manifest() -> str:
    """The build key and what it was computed from, as the module carries it."""
    parts = _parts()
    return f"npc_ext-{_key_of(parts)} " + " ".join(f"{name}={digest}" for name, digest in parts.items())


def why_stale(module: bytes) -> str:
    """Empty if a compiled module was made from these sources and flags, else what differs."""
    now = _parts()
    if f"npc_ext-{_key_of(now)} ".encode() in module:
        return ""
    found = re.search(rb"npc_ext-[0-9a-f]{16} ((?:[\w./-]+=[0-9a-f]{16} ?)+)", module)
    if found is None:
        return "it does not say which sources it was made from"
    then = dict(part.split("=") for part in found[1].decode().split())
    differing = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    named = [name if "." not in name else f"csrc/{name}" for name in differing]
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    return f"{', '.join(named[:3])}{more} changed since"


def cache_key(plan: Cuda | None = None) -> str:
    """`build_key` with what else decides the result: compilers, GPUs and the Python that will import it.

    A compiler is known by its file, size and time, which takes microseconds; asking it for its version would not.
    """
    plan = cuda(just_in_time=True) if plan is None else plan
    command = compiler_command()
    programs = [*command, str(_compiler_in(command)), *([str(plan.nvcc)] if plan.nvcc else [])]
    files = [Path(found).resolve() for program in programs if (found := shutil.which(program))]
    known = [(str(path), status.st_size, status.st_mtime_ns) for path in files for status in [path.stat()]]
    library = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) else ""
    variables = [os.environ.get(name) for name in _VARIABLES]
    identity = (build_key(), command, known, plan.release, plan.archs, variables, library, sys.version, MODULE_FILE)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def compiler_command() -> list[str]:
    """The C++ compiler: $CXX with its launcher and arguments, or the first of c++, g++, clang++ on the path.

    Links are not resolved: a program such as ccache looks at the name that it is called by.
    """
    value = os.environ.get("CXX", "").strip()
    try:
        wanted = [value] if shutil.which(value) else shlex.split(value)
    except ValueError as error:
        raise BuildError(f"CXX={value} cannot be read as a command: {error}; correct it or unset CXX") from error
    for candidate in [wanted] if wanted else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(candidate[0]):
            command = [os.path.abspath(found), *candidate[1:]]
            _compiler_in(command)
            return command
    got = f"CXX={' '.join(wanted)} does not name a program" if wanted else "none of c++, g++, clang++ is on the PATH"
    raise BuildError(f"no C++ compiler: {got}; install one (for example 'apt install g++') or set CXX")


def _compiler_in(command: list[str]) -> Path:
    """The compiler itself, for nvcc: not the launcher before it, nor one that is called by the compiler's name."""
    words = (one for one in command if Path(one).name not in _LAUNCHERS and not re.match(r"-|\w+=", one))
    name = next(words, None)
    found = name and shutil.which(name)
    if not name or not found:
        got = f"{name} is not a program" if name else "there is no compiler behind it"
        raise BuildError(
            f"no C++ compiler: CXX={' '.join(command)} begins with a launcher, but {got}; install one (for example "
            "'apt install g++') or set CXX, as in CXX='ccache g++'"
        )
    same_name = [shutil.which(Path(name).name, path=folder) for folder in os.get_exec_path()]
    for path in [found, *same_name]:
        if path and Path(path).resolve().name not in _LAUNCHERS:
            return Path(os.path.abspath(path))
    return Path(os.path.abspath(found))


# --------------------------------------------------------------------------------------------------------------- CUDA


@dataclass(frozen=True)
class _Toolkit:
    nvcc: Path
    release: str
    libraries: str
    archs: tuple[str, ...]  # that nvcc knows; empty if it does not say


def nvcc() -> Path | None:
    """The CUDA compiler: NPC_EXT_NVCC, else that of CUDA_HOME, else on the path, else in /usr/local/cuda; None without.

    NPC_EXT_NVCC="" builds for the CPU only.
    """
    toolkit, _ = _toolkit()
    return toolkit.nvcc if toolkit else None


@lru_cache(maxsize=1)
def _toolkit() -> tuple[_Toolkit | None, tuple[str, ...]]:
    """The first CUDA toolkit that works, and what is wrong with those that were looked at before it."""
    named, home = os.environ.get("NPC_EXT_NVCC"), os.environ.get("CUDA_HOME")
    if named == "" or platform.system() != "Linux":
        return None, ()
    if named and not shutil.which(named):
        raise BuildError(f"NPC_EXT_NVCC={named} does not name a program; unset it or name nvcc")
    in_home = f"{home}/bin/nvcc" if home else ""
    wrong: list[str] = []
    for candidate in [named] if named else [in_home, "nvcc", "/usr/local/cuda/bin/nvcc"]:
        if found := candidate and shutil.which(candidate):
            try:
                return _toolkit_of(Path(os.path.abspath(found))), tuple(wrong)
            except BuildError as error:
                if named:
                    raise BuildError(f"NPC_EXT_NVCC={named}: {error}") from error
                if str(error) not in wrong:
                    wrong.append(str(error))
        elif candidate and candidate == in_home:
            wrong.append(f"CUDA_HOME={home} has no bin/nvcc")
    return None, tuple(wrong)


def _toolkit_of(compiler: Path) -> _Toolkit:
    status, output = _run([str(compiler), "--version"])
    version = re.search(r"release (\d+)\.(\d+)", output)
    if version is None:
        last = (output.strip().splitlines() or ["it prints nothing"])[-1]
        raise BuildError(f"{compiler} --version does not work (exit status {status}: {last})")
    if (int(version[1]), int(version[2])) < _OLDEST_CUDA:
        raise BuildError(f"{compiler} is older than CUDA {'.'.join(map(str, _OLDEST_CUDA))}")
    libraries = _cuda_libraries(compiler)
    archs = re.findall(r"compute_(\d+)", _output_of([str(compiler), "--list-gpu-arch"]))
    return _Toolkit(compiler, f"{version[1]}.{version[2]}", libraries, tuple(sorted(archs, key=int)))


def asked_for_cuda() -> bool:
    """Whether the user asked this package for CUDA kernels: what is wrong with them is an error then."""
    return bool(os.environ.get("NPC_EXT_NVCC") or os.environ.get("NPC_EXT_ARCHS"))


def cuda(just_in_time: bool = False) -> Cuda:
    """Whether and how to compile the CUDA kernels. What is wrong is only noted, unless the user asked for them.

    Just in time they are compiled only if torch can use them and for the GPUs of this machine, unless the user asked.
    """
    if os.environ.get("NPC_EXT_NVCC") == "":
        return Cuda(reason="NPC_EXT_NVCC is empty, which asks for the CPU only")
    if just_in_time and not asked_for_cuda():
        if not _torch_has_cuda():
            return Cuda(reason="torch was built without CUDA; NPC_EXT_ARCHS names the GPUs to compile for all the same")
        if not _gpus_here():
            return Cuda(reason="there is no GPU on this machine; NPC_EXT_ARCHS names those to compile for all the same")
    toolkit, wrong = _toolkit()
    if toolkit is None:
        reason = "; ".join(wrong) or "there is no nvcc"
        if wrong and asked_for_cuda():
            raise BuildError(f"NPC_EXT_ARCHS asks for CUDA kernels, but {reason}; fix that or unset NPC_EXT_ARCHS")
        said = wrong or asked_for_cuda()
        return Cuda(reason=reason, notices=(f"the CUDA kernels are left out: {reason}",) if said else ())
    notices = tuple(f"{one}, so {toolkit.nvcc} is used" for one in wrong)
    try:
        found, more = _architectures(just_in_time)
    except BuildError as error:
        if asked_for_cuda():
            raise
        return Cuda(reason=str(error), notices=(*notices, f"the CUDA kernels are left out: {error}"))
    return Cuda(toolkit.nvcc, found, toolkit.libraries, "", (*notices, *more), toolkit.release)


def archs(just_in_time: bool = False) -> tuple[str, ...]:
    """The GPU architectures to compile for, as ("90", "120+PTX").

    NPC_EXT_ARCHS ("80;90+PTX"), else (not just in time) TORCH_CUDA_ARCH_LIST in torch's notation ("8.0 9.0+PTX",
    "Ampere;Hopper", "native", "all"), else those of the GPUs in this machine, else all from Turing on that nvcc knows.
    """
    return _architectures(just_in_time)[0]


def _architectures(just_in_time: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`archs`, and notices about those that were asked for but left out."""
    toolkit, _ = _toolkit()
    known = toolkit.archs if toolkit else ()
    for name in ["NPC_EXT_ARCHS"] if just_in_time else ["NPC_EXT_ARCHS", "TORCH_CUDA_ARCH_LIST"]:
        if value := os.environ.get(name, "").strip(";, \t\n"):
            listed = [arch for entry in re.split(r"[;,\s]+", value) for arch in _archs_of(entry, name, value, known)]
            unknown = [arch for arch in listed if known and re.sub(r"\D+", "", arch) not in known]
            if not unknown:
                return tuple(dict.fromkeys(listed)), ()
            compiler = toolkit.nvcc if toolkit else "nvcc"
            said = f"{name}={value} has {', '.join(unknown)}, and {compiler} knows {', '.join(known)} only"
            kept = tuple(dict.fromkeys(arch for arch in listed if arch not in unknown))
            if not kept or name == "NPC_EXT_ARCHS":
                raise BuildError(f"{said}; change {name} or unset it")
            return kept, (f"{said}; compiling for {', '.join(kept)}",)
    return _archs_here(known) or _all_archs(known), ()


def _archs_of(entry: str, name: str, value: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The architectures that one entry of a variable stands for."""
    wanted = entry.upper().removesuffix("+PTX")
    if wanted == "NATIVE":
        found = _archs_here(known)
        if not found:
            raise BuildError(f"{name}={value} asks for the GPUs of this machine, but there are none; name them")
    elif wanted == "ALL":
        found = _all_archs(known)
    elif wanted in _GENERATIONS:
        found = _GENERATIONS[wanted]
    elif re.fullmatch(r"\d+\.?\d[AF]?", wanted):
        found = (wanted.replace(".", "").replace("A", "a").replace("F", "f"),)
    else:
        raise BuildError(f"{name}={value} has the entry {entry!r}; expected architectures as in '8.0;9.0+PTX'")
    with_ptx = entry.upper().endswith("+PTX") and not found[-1].endswith("+PTX")
    return (*found[:-1], f"{found[-1]}+PTX") if with_ptx else found


def _all_archs(known: tuple[str, ...]) -> tuple[str, ...]:
    """All from Turing on that nvcc knows, and PTX of the newest for GPUs that come later."""
    found = [arch for arch in _ARCHS if not known or arch in known]
    return (*found[:-1], f"{found[-1]}+PTX") if found else ()


def _archs_here(known: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the GPUs in this machine; for a GPU that is newer than nvcc, PTX of the newest that it knows."""
    found = []
    for arch in _gpus_here():
        older = [one for one in known if int(one) < int(arch)]
        if not known or arch in known:
            found.append(arch)
        elif older:
            found.append(f"{older[-1]}+PTX")
        else:
            raise BuildError(f"this machine has a GPU of sm_{arch}, and its nvcc knows {', '.join(known)} only")
    return tuple(dict.fromkeys(found))


def _gpus_here() -> tuple[str, ...]:
    """The architectures of the GPUs in this machine, as ("80", "90")."""
    present = _output_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]).split()
    here = {one.replace(".", "") for one in present if re.fullmatch(r"\d+\.\d", one)}
    # Containers may come without nvidia-smi. CUDA is asked only if the program has initialized it, for forks' sake.
    gpus = getattr(sys.modules.get("torch"), "cuda", None)
    if not here and gpus is not None and gpus.is_initialized():
        found = [gpus.get_device_capability(index) for index in range(gpus.device_count())]
        here = {f"{major}{minor}" for major, minor in found}
    return tuple(sorted(here, key=int))


def _torch_has_cuda() -> bool:
    """Whether torch was built with CUDA; it is not imported, so that a broken one is no trouble here."""
    try:
        torch = importlib.util.find_spec("torch")
        version = Path(torch.origin).with_name("version.py").read_text() if torch and torch.origin else ""
    except (ImportError, ValueError, OSError):
        return False
    return re.search(r"^cuda\b[^=\n]*=\s*['\"]\d", version, re.MULTILINE) is not None


def _run(command: list[str]) -> tuple[int | None, str]:
    """A program's exit status (None if it cannot be run, or hangs) and all that it prints."""
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    return result.returncode, result.stdout


def _output_of(command: list[str]) -> str:
    """What a program prints; nothing if it is not there, fails or hangs."""
    status, output = _run(command)
    return output if status == 0 else ""


def nvcc_flags(plan: Cuda | None = None) -> list[str]:
    """Flags of nvcc for every .cu file, with machine code for each architecture and PTX where asked for."""
    codes = []
    for arch in archs() if plan is None else plan.archs:
        number = arch.removesuffix("+PTX")
        codes.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            codes.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    # Every kernel's registers and spills go to the build's log, which a test reads.
    shared = [*_CUDA_FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
    return [*shared, "-ccbin", str(_compiler_in(compiler_command())), *codes]


# -------------------------------------------------------------------------------------------------------- just in time


def cache_dirs() -> list[Path]:
    """Where just-in-time builds are kept; the first that can be written gets a new one.

    NPC_EXT_CACHE alone if it is set, else npc_ext in the user's cache folder, else one of this user in the temporary
    directory.
    """
    if named := os.environ.get("NPC_EXT_CACHE"):
        return [Path(named)]
    found = []
    with suppress(RuntimeError):  # no HOME, and no entry of this user in the system's list
        found.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npc_ext")
    with suppress(OSError):  # there is no temporary directory that can be written
        user = os.getuid() if hasattr(os, "getuid") else "user"
        found.append(Path(tempfile.gettempdir()) / f"npc_ext-{user}")
    if not found:
        raise BuildError(
            "the just-in-time build has no folder for its results: there is neither a home folder nor a temporary one; "
            "point NPC_EXT_CACHE at a folder that can be written"
        )
    return found


def _is_temporary(folder: Path) -> bool:
    return not os.environ.get("NPC_EXT_CACHE") and folder.name != "npc_ext"


def _check_private(folder: Path) -> None:
    """Raises OSError if others can write to a folder in the temporary directory: its modules are executed."""
    found = os.lstat(folder)
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    if not stat.S_ISDIR(found.st_mode) or not mine or found.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "not a folder that only this user can write", str(folder))


def build_cached(why: str = "") -> Path:
    """The just-in-time build: returns at once if it is there, else compiles it, once among all processes.

    `why` says why it is needed. A build that failed is remembered beside its objects and not tried again.
    """
    plan = cuda(just_in_time=True)
    key = cache_key(plan)
    folders = cache_dirs()
    for folder in folders:
        if _is_temporary(folder):
            try:
                _check_private(folder)
            except OSError:
                continue
        if os.path.exists(folder / key / MODULE_FILE):
            return folder / key / MODULE_FILE
        _raise_remembered(folder / key)
    troubles: list[str] = []
    for folder in folders:
        try:
            if _is_temporary(folder):
                folder.mkdir(mode=0o700, exist_ok=True)
                _check_private(folder)
                say(f"{'; '.join(troubles) or 'there is no home folder'}, so the kernels are kept in {folder}")
            (folder / key).mkdir(parents=True, exist_ok=True)
            return _build_in(folder / key, plan, why)
        except (OSError, _DiskFullError) as error:
            troubles.append(f"the just-in-time build cannot write to {folder} ({error})")
    raise BuildError(f"{'; '.join(troubles)}; make it writable or point NPC_EXT_CACHE at a folder that is")


def _raise_remembered(folder: Path) -> None:
    failed = folder / "failed.txt"
    try:
        reason = failed.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    raise CompileError(f"{reason}\n(this was remembered and not tried again; to compile again, delete {failed})")


def _build_in(folder: Path, plan: Cuda, why: str) -> Path:
    """Compiles in a cache folder what no other process has compiled there meanwhile."""
    target, objects = folder / MODULE_FILE, folder / "objects"
    with _locked(folder / "lock", lambda: _newest(objects)) as lock:
        if target.exists():
            return target
        _raise_remembered(folder)
        gpus = f"and GPUs of {', '.join(f'sm_{arch}' for arch in plan.archs)}" if plan.nvcc else "only"
        because = f", because {why}" if why else ""
        say(f"compiling its kernels for this machine, once ({len(sources(plan))} files, for CPUs {gpus}){because} ...")
        # The objects stay until all is done, so that a build that was interrupted goes on. Without a lock another
        # process may be at work on the same ones.
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
    """Changes while something is compiled into a folder."""
    try:
        return max((path.stat().st_mtime_ns for path in folder.iterdir()), default=0)
    except OSError:
        return 0


@contextmanager
def _locked(path: Path, progress: Callable[[], object]) -> Iterator[int | None]:
    """Holds the lock file and yields its descriptor, or None where the file system has no locks.

    The lock is the operating system's, so a killed builder releases it. Waits as long as there is progress, and then
    for NPC_EXT_LOCK_TIMEOUT seconds: the lock of another machine that died may stay, on a network file system.
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
            # Explicitly, because a program that the compiler left running may have inherited the descriptor.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def discard(module: Path) -> None:
    """Deletes a just-in-time build that does not load, as far as that is allowed."""
    with suppress(OSError):
        module.unlink()


# -------------------------------------------------------------------------------------------------------------- build


def build(target: Path, folder: Path, plan: Cuda | None = None, lock: int | None = None) -> None:
    """Compiles and links the module in `folder` with ninja and moves it to `target` in one step.

    If only CUDA fails, and the user did not ask for it, the module is built for the CPU only, and that is said.
    Raises BuildError with the compiler's whole output. ninja keeps the descriptor `lock` open as long as it runs.
    """
    plan = cuda() if plan is None else plan
    for notice in plan.notices:
        say(notice)
    try:
        _compile(folder, plan, lock)
    except _CudaError as error:
        if asked_for_cuda():
            raise
        lines = str(error).splitlines()
        cause = next((line for line in lines[1:] if re.search(r"\b(error|fatal|cannot)\b", line, re.I)), lines[-1])
        reason = f"{plan.nvcc} failed: {cause.strip()}"
        say(f"{lines[0]}\n" + "\n".join(lines[-15:]))
        say(
            f"the CUDA kernels are left out, because {reason} (NPC_EXT_NVCC=/path/to/nvcc names another compiler, "
            "NPC_EXT_NVCC= builds for the CPU only)"
        )
        _compile(folder, Cuda(reason=reason), lock)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A copy beside the target first: os.replace is atomic only within one file system.
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copy2(folder / MODULE_FILE, staged)
        os.replace(staged, target)
    finally:
        staged.unlink(missing_ok=True)


def _compile(folder: Path, plan: Cuda, lock: int | None) -> None:
    """Makes the module in `folder` and sees that it loads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(_ninja_file(plan))
    output, status = [], 0
    with _ninja() as ninja, _Progress() as progress:
        try:
            process = subprocess.Popen(
                [*ninja, "-C", str(folder)],
                env={**os.environ, "NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"},  # messages that are understood below
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                pass_fds=() if lock is None else (lock,),
            )
        except OSError as error:
            raise BuildError(f"ninja cannot be run: {error}; pip install --force-reinstall ninja") from error
        with process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if done := re.match(r"\[(\d+)/(\d+)\] (\S+)\n", line):
                        progress.show(f"npc_ext: {done[1]} of {done[2]} done, the last one {done[3]}")
                    else:
                        output.append(line)
            except BaseException:
                process.terminate()
                raise
        status = process.returncode
    if status != 0:
        said = "".join(output)
        if full := re.search(r"No space left on device|Disk quota exceeded", said):
            raise _DiskFullError(f"{full[0].lower()}: free some there or in {tempfile.gettempdir()}")
        failed = re.findall(r"^FAILED: (?:\[code=-?\d+\] )?(\S+)", said, re.MULTILINE)
        only_cuda = bool(plan.nvcc and failed) and all(one.startswith("cuda_") or one == MODULE_FILE for one in failed)
        if not only_cuda and (status < 0 or status > 128 or _KILLED.search(said)):  # by a signal
            raise BuildError(
                f"the C++ compiler was killed, or ran out of memory (exit status {status}); try again, if need be with "
                f"more free memory:\n{said}"
            )
        kind = _CudaError if only_cuda else CompileError
        raise kind(f"the {'CUDA' if only_cuda else 'C++'} compiler failed (exit status {status}):\n{said}")
    _check_that_it_loads(folder / MODULE_FILE, _CudaError if plan.nvcc else CompileError)


def _check_that_it_loads(module: Path, kind: type[CompileError]) -> None:
    """Deletes a module that does not import, and raises with the loader's message."""
    # Sanitized code loads only where the sanitizer's library is in the process before Python.
    if not sys.executable or any("-fsanitize" in flag for flag in user_flags()):
        return
    script = (
        "import sys; from importlib.machinery import ExtensionFileLoader as Loader; from importlib import util; "
        "loader = Loader('npc_ext._C', sys.argv[1]); "
        "loader.exec_module(util.module_from_spec(util.spec_from_loader('npc_ext._C', loader)))"
    )
    status, output = _run([sys.executable, "-I", "-S", "-c", script, str(module)])
    if status:
        module.unlink(missing_ok=True)
        last = (output.strip().splitlines() or [f"exit status {status}"])[-1]
        raise kind(
            f"the compiled module does not load, and was deleted: {last}; is {' '.join(compiler_command())} a C++ "
            f"compiler for {sys.executable}?"
        )


class _Progress:
    """One line on a terminal that is written over again and again; nothing where standard error is none."""

    def __init__(self) -> None:
        self._shown = sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()

    def __enter__(self) -> _Progress:
        return self

    def show(self, text: str) -> None:
        if self._shown:
            sys.stderr.write(f"\r{text}\x1b[K")
            sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        self.show("")


def _ninja_file(plan: Cuda) -> str:
    """The build as ninja's own language; every path is escaped for it."""
    root = source_dir()
    includes = [f"-I{path}" for path in (_python_include(), _pybind11_include())]
    common = " ".join([*flags(plan), *(_quote(include) for include in includes)])
    # Only the bindings carry these, so that a change of one source does not compile all others.
    defines = {"NPC_EXT_BUILD_KEY": _manifest(), "NPC_EXT_WHY_NO_CUDA": plan.reason}
    of_bindings = " ".join(_quote(f"-D{name}={_c_string(value)}") for name, value in defines.items())
    link = "-undefined dynamic_lookup" if sys.platform == "darwin" else "-ldl"
    if plan.nvcc:
        # The runtime is linked in, so that the module needs no CUDA to be imported, and no particular one to run.
        link = f"-L{_quote(plan.libraries)} -lcudart_static -lrt -lpthread {link}"
    lines = [
        f"cxx = {' '.join(_quote(part) for part in compiler_command())}",
        f"nvcc = {_quote(str(plan.nvcc))}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  description = $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cuda",
        # ptxas' report stays beside the object; what goes wrong is shown.
        "  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)",
        "  description = $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared {' '.join([*flags(plan), *user_flags()])} $in -o $out {link}",
        "  description = $out",
    ]
    cuda_flags = " ".join(["-DNPC_CUDA", *map(_quote, nvcc_flags(plan))]) if plan.nvcc else ""
    objects = []
    for source in sources(plan):
        variant = f"_{source.variant}" if source.variant else ""
        name = f"{Path(source.path).with_suffix('')}{variant}.o".replace("/", "_")
        objects.append(name)
        rule, shared = ("cuda", cuda_flags) if source.path.endswith(".cu") else ("compile", common)
        if source.path == "bindings.cpp":
            shared = f"{shared} {of_bindings}"
        lines += [
            f"build {name}: {rule} {_escape(str(root / source.path))}",
            f"  flags = {shared} {' '.join(source.flags)} {' '.join(user_flags()) if rule == 'compile' else ''}",
        ]
    lines += [f"build {MODULE_FILE}: link {' '.join(objects)}", f"default {MODULE_FILE}", ""]
    return "\n".join(lines)


def _c_string(text: str) -> str:
    """A string literal of C++, in one line of printable ASCII."""
    printable = "".join(one if " " <= one <= "~" else "?" for one in text.replace("\n", " "))
    return '"' + printable.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _escape(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _quote(argument: str) -> str:
    """For the shell that ninja runs commands in, with ninja's own escape for dollars."""
    return "'" + argument.replace("'", "'\\''").replace("$", "$$") + "'"


def _python_include() -> str:
    include = sysconfig.get_paths()["include"]
    if not (Path(include) / "Python.h").exists():
        raise BuildError(
            f"Python.h is missing in {include}; install Python's headers (for example 'apt install python3-dev')"
        )
    return include


def _cuda_libraries(compiler: Path) -> str:
    """The folder of the CUDA runtime; nvcc may be a script or a link far from it, but knows its place."""
    _, dry_run = _run([str(compiler), "--dryrun", __file__])
    if top := re.search(r"^#\$ TOP=(.*)$", dry_run, re.MULTILINE):
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if (path := Path(top[1].strip()) / folder).joinpath("libcudart_static.a").exists():
                return str(path.resolve())
    raise BuildError(
        f"libcudart_static.a is not with {compiler}; install the whole CUDA toolkit, or set NPC_EXT_NVCC='' to build "
        "for the CPU only"
    )


def _pybind11_include() -> str:
    try:
        import pybind11
    except ImportError as error:
        # torch brings the same headers; its place is found without importing it.
        torch = importlib.util.find_spec("torch")
        if torch and torch.origin and (Path(torch.origin).parent / "include" / "pybind11").is_dir():
            return str(Path(torch.origin).parent / "include")
        raise BuildError("pybind11 is missing; it compiles the kernels: pip install 'npc_ext[jit]'") from error
    return pybind11.get_include()


@contextmanager
def _ninja() -> Iterator[list[str]]:
    """The ninja program: the Python package's if it is there, else the one on the path."""
    try:
        from ninja import BIN_DIR

        yield [str(Path(BIN_DIR) / "ninja")]
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise BuildError("ninja is missing; it compiles the kernels: pip install 'npc_ext[jit]'") from None
        yield [found]
