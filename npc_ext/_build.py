"""What to compile and how, for the ahead-of-time build (setup.py) and the just-in-time build (_native.py) alike.

Imports neither torch nor the rest of the package: setup.py loads this file by its path. The kernels include no torch
header, so the module depends on the C and C++ libraries and on the Python version only.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MODULE_FILE = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
_PACKAGE = Path(__file__).resolve().parent
_X86 = platform.machine().lower() in ("x86_64", "amd64")

# No fast math: rounding and NaN keep their meaning. The two exceptions only say that nobody reads errno or the
# floating-point exception flags, without which loops with sqrt do not vectorize.
_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
_FAST = ["-O3"]
_ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says why and what mends it."""


@dataclass(frozen=True)
class Source:
    """One translation unit: its path below csrc/ and the flags that it alone gets."""

    path: str
    flags: tuple[str, ...] = ()


def source_dir() -> Path:
    """csrc/ inside an installed package, or beside the package in a source checkout."""
    installed = _PACKAGE / "csrc"
    return installed if installed.is_dir() else _PACKAGE.parent / "csrc"


def sources() -> list[Source]:
    """Every translation unit of the module for this machine's processor family."""
    isas = ["baseline", "avx2", "avx512"] if _X86 else ["baseline"]
    kernels = [Source(f"cpu/kernels_{isa}.cpp", (*_FAST, *_ISA_FLAGS[isa])) for isa in isas]
    shared = [Source(f"cpu/{name}.cpp", tuple(_FAST)) for name in ("importance", "update", "isa", "parallel")]
    return [Source("bindings.cpp", ("-O1",)), *kernels, *shared]


def flags() -> list[str]:
    """Compiler flags of every translation unit, before its own."""
    return [*_FLAGS, *(["-DNPC_X86"] if _X86 else [])]


def user_flags() -> list[str]:
    """Flags from NPC_EXT_CXXFLAGS (for sanitizers, say); they come last, so that they win."""
    return os.environ.get("NPC_EXT_CXXFLAGS", "").split()


def build_key() -> str:
    """Changes with the sources and the flags: a module that carries another key is stale."""
    digest = hashlib.sha256()
    root = source_dir()
    for path in sorted([*root.rglob("*.h"), *root.rglob("*.cpp")]):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    digest.update(repr((sources(), flags(), user_flags())).encode())
    return digest.hexdigest()[:16]


def cache_key() -> str:
    """`build_key` with what else decides the result: the compiler and the Python that will import it.

    The compiler is known by its file, size and time, which takes microseconds; asking it for its version would not.
    """
    compiler = Path(compiler_command()[0])
    stat = compiler.stat()
    identity = (build_key(), str(compiler), stat.st_size, stat.st_mtime_ns, sys.version, MODULE_FILE)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def compiler_command() -> list[str]:
    """The C++ compiler: $CXX with its arguments, or the first of c++, g++, clang++ on the path; its file resolved."""
    wanted = os.environ.get("CXX", "").split()
    for candidate in [wanted] if wanted else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(candidate[0]):
            return [str(Path(found).resolve()), *candidate[1:]]
    got = f"CXX={' '.join(wanted)} does not name a program" if wanted else "none of c++, g++, clang++ is on the PATH"
    raise BuildError(f"no C++ compiler: {got}; install one (for example 'apt install g++') or set CXX")


def cache_dir() -> Path:
    """Where just-in-time builds are kept: NPC_EXT_CACHE, else npc_ext in the user's cache folder."""
    if named := os.environ.get("NPC_EXT_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npc_ext"


def cached_module() -> Path:
    """Where the just-in-time build of these sources with this compiler and Python is, or will be."""
    return cache_dir() / cache_key() / MODULE_FILE


def build_cached() -> Path:
    """The just-in-time build: returns at once if it is there, else compiles it, once among all processes.

    The lock is the operating system's, so a killed builder releases it; the module appears under its name only when
    it is complete, so a killed builder leaves nothing that could be taken for one.
    """
    target = cached_module()
    if target.exists():
        return target
    try:
        from filelock import FileLock
    except ImportError as error:
        raise BuildError(f"{error}; the just-in-time build needs it: pip install 'npc_ext[jit]'") from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / "lock"):
            if not target.exists():
                for abandoned in target.parent.glob("building-*"):
                    shutil.rmtree(abandoned, ignore_errors=True)
                print("npc_ext: compiling its kernels for this machine, once ...", file=sys.stderr, flush=True)
                with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as folder:
                    build(target, Path(folder))
    except OSError as error:
        raise BuildError(
            f"the just-in-time build cannot write to {target.parent} ({error}); "
            "make it writable or point NPC_EXT_CACHE at a folder that is"
        ) from error
    return target


def build(target: Path, folder: Path) -> None:
    """Compiles and links the module in `folder` with ninja and moves it to `target` in one step.

    Raises BuildError with the compiler's whole output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(_ninja_file(folder))
    with _ninja() as ninja:
        result = subprocess.run(
            [*ninja, "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    if result.returncode != 0:
        raise BuildError(f"the C++ compiler failed (exit status {result.returncode}):\n{result.stdout}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # A copy beside the target first: os.replace is atomic only within one file system.
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(folder / MODULE_FILE, staged)
    os.replace(staged, target)


def _ninja_file(folder: Path) -> str:
    """The build as ninja's own language; every path is escaped for it."""
    root = source_dir()
    includes = [f"-I{path}" for path in (_python_include(), _pybind11_include())]
    define = f"-DNPC_EXT_BUILD_KEY='\"{build_key()}\"'"
    common = " ".join([*flags(), define, *(_quote(include) for include in includes)])
    link = "-undefined dynamic_lookup" if sys.platform == "darwin" else "-ldl"
    lines = [
        f"cxx = {' '.join(_quote(part) for part in compiler_command())}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared {' '.join([*flags(), *user_flags()])} $in -o $out {link}",
    ]
    objects = []
    for source in sources():
        name = source.path.replace("/", "_").replace(".cpp", ".o")
        objects.append(name)
        lines += [
            f"build {name}: compile {_escape(str(root / source.path))}",
            f"  flags = {common} {' '.join([*source.flags, *user_flags()])}",
        ]
    lines += [f"build {MODULE_FILE}: link {' '.join(objects)}", f"default {MODULE_FILE}", ""]
    return "\n".join(lines)


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


def _pybind11_include() -> str:
    try:
        import pybind11
    except ImportError as error:
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
