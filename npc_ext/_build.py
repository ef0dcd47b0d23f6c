"""What to compile and how, for the ahead-of-time build (setup.py) and the just-in-time build (_native.py) alike.

Imports neither torch nor the rest of the package: setup.py loads this file by its path. The kernels include no torch
header, so the module depends on the C and C++ libraries and on the Python version only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# The GPUs that a build without one present is for: Turing to Blackwell, and PTX for what comes after.
_ARCHS = ("75", "80", "86", "89", "90", "100", "120")
_OLDEST_CUDA = (12, 1)  # the first to pass 32 KiB of arguments to a kernel

MODULE_FILE = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
_PACKAGE = Path(__file__).resolve().parent
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
    """Every translation unit of the module for this machine's processor family, and for CUDA where nvcc is found."""
    isas = ["baseline", "avx2", "avx512"] if _X86 else ["baseline"]
    kernels = [Source(f"cpu/kernels_{isa}.cpp", (*_FAST, *_ISA_FLAGS[isa])) for isa in isas]
    shared = [Source(f"cpu/{name}.cpp", tuple(_FAST)) for name in ("importance", "update", "isa", "parallel")]
    cuda = (
        [
            Source(f"cuda/{name}.cu", tuple(_FAST))
            for name in (
                *("step", "importance", "update", "adam", "connections", "anchored"),
                *("wide", "workspace", "support"),
            )
        ]
        if nvcc()
        else []
    )
    return [*cuda, Source("bindings.cpp", ("-O1",)), *kernels, *shared]


def flags() -> list[str]:
    """Compiler flags of every translation unit, before its own."""
    cuda = ["-DNPC_CUDA", f"-DNPC_EXT_CUDA_ARCHS='\"{' '.join(archs())}\"'"] if nvcc() else []
    return [*_FLAGS, *(["-DNPC_X86"] if _X86 else []), *cuda]


def user_flags() -> list[str]:
    """Flags from NPC_EXT_CXXFLAGS (for sanitizers, say); they come last, so that they win."""
    return os.environ.get("NPC_EXT_CXXFLAGS", "").split()


def build_key() -> str:
    """Changes with the sources and the flags: a module that carries another key is stale.

    Not with what else a machine has, a CUDA compiler for example: a module may be built on one and run on another.
    """
    digest = hashlib.sha256()
    root = source_dir()
    for path in sorted(path for kind in ("*.h", "*.cpp", "*.cu") for path in root.rglob(kind)):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    digest.update(repr((_FLAGS, _FAST, _CUDA_FLAGS, _ISA_FLAGS, _X86, user_flags())).encode())
    return digest.hexdigest()[:16]


def cache_key() -> str:
    """`build_key` with what else decides the result: compilers, GPUs and the Python that will import it.

    A compiler is known by its file, size and time, which takes microseconds; asking it for its version would not.
    """
    cuda = nvcc()
    compilers = [Path(compiler_command()[0]), *([cuda] if cuda else [])]
    known = [(str(path), stat.st_size, stat.st_mtime_ns) for path in compilers for stat in [path.stat()]]
    identity = (build_key(), known, archs() if cuda else (), sys.version, MODULE_FILE)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def compiler_command() -> list[str]:
    """The C++ compiler: $CXX with its arguments, or the first of c++, g++, clang++ on the path; its file resolved."""
    wanted = os.environ.get("CXX", "").split()
    for candidate in [wanted] if wanted else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(candidate[0]):
            return [str(Path(found).resolve()), *candidate[1:]]
    got = f"CXX={' '.join(wanted)} does not name a program" if wanted else "none of c++, g++, clang++ is on the PATH"
    raise BuildError(f"no C++ compiler: {got}; install one (for example 'apt install g++') or set CXX")


@lru_cache(maxsize=1)
def nvcc() -> Path | None:
    """The CUDA compiler: NPC_EXT_NVCC, else that of CUDA_HOME, else on the path, else in /usr/local/cuda; None without.

    NPC_EXT_NVCC="" builds for the CPU only.
    """
    named, home = os.environ.get("NPC_EXT_NVCC"), os.environ.get("CUDA_HOME")
    if named is not None:
        if named and not shutil.which(named):
            raise BuildError(f"NPC_EXT_NVCC={named} does not name a program; unset it or name nvcc")
        candidates = [named]
    else:
        candidates = [f"{home}/bin/nvcc" if home else "", "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next((path for candidate in candidates if candidate and (path := shutil.which(candidate))), None)
    if found is None or platform.system() != "Linux":
        return None
    version = re.search(r"release (\d+)\.(\d+)", _output_of([found, "--version"]))
    if version is None or (int(version[1]), int(version[2])) < _OLDEST_CUDA:
        oldest = ".".join(map(str, _OLDEST_CUDA))
        print(f"npc_ext: {found} is older than CUDA {oldest}, so it is not used", file=sys.stderr, flush=True)
        return None
    return Path(found)


@lru_cache(maxsize=1)
def archs() -> tuple[str, ...]:
    """The GPU architectures to compile for, as ("90", "120+PTX").

    NPC_EXT_ARCHS ("80;90+PTX"), else TORCH_CUDA_ARCH_LIST in torch's notation ("8.0 9.0+PTX"), else those of the GPUs
    in this machine, else all from Turing on.
    """
    for name in ("NPC_EXT_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        if value := os.environ.get(name):
            listed = [one.upper() for one in re.split(r"[;,\s]+", value.strip())]
            for one in listed:
                if not re.fullmatch(r"\d+\.?\d[AF]?(\+PTX)?", one):
                    raise BuildError(
                        f"{name}={value} has the entry {one!r}; expected architectures as in '8.0;9.0+PTX'"
                    )
            return tuple(one.replace(".", "").replace("A", "a").replace("F", "f") for one in listed)
    present = _output_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]).split()
    here = sorted({one.replace(".", "") for one in present if re.fullmatch(r"\d+\.\d", one)}, key=int)
    return tuple(here) or (*_ARCHS[:-1], f"{_ARCHS[-1]}+PTX")


def _output_of(command: list[str]) -> str:
    """What a program prints; nothing if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def nvcc_flags() -> list[str]:
    """Flags of nvcc for every .cu file, with machine code for each architecture and PTX where asked for."""
    codes = []
    for arch in archs():
        number = arch.removesuffix("+PTX")
        codes.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            codes.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    # Every kernel's registers and spills go to the build's log, which a test reads.
    shared = [*_CUDA_FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
    return [*shared, "-ccbin", compiler_command()[0], *codes]


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
    if compiler := nvcc():
        # The runtime is linked in, so that the module needs no CUDA to be imported, and no particular one to run.
        link = f"-L{_quote(_cuda_libraries(compiler))} -lcudart_static -lrt -lpthread {link}"
    lines = [
        f"cxx = {' '.join(_quote(part) for part in compiler_command())}",
        f"nvcc = {_quote(str(nvcc()))}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cuda",
        # ptxas' report stays beside the object; what goes wrong is shown.
        "  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared {' '.join([*flags(), *user_flags()])} $in -o $out {link}",
    ]
    cuda = " ".join(["-DNPC_CUDA", *map(_quote, nvcc_flags())]) if nvcc() else ""
    objects = []
    for source in sources():
        name = f"{Path(source.path).with_suffix('.o')}".replace("/", "_")
        objects.append(name)
        rule, shared = ("cuda", cuda) if source.path.endswith(".cu") else ("compile", common)
        lines += [
            f"build {name}: {rule} {_escape(str(root / source.path))}",
            f"  flags = {shared} {' '.join(source.flags)} {' '.join(user_flags()) if rule == 'compile' else ''}",
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


def _cuda_libraries(compiler: Path) -> str:
    """The folder of the CUDA runtime; nvcc may be a script or a link far from it, but knows its place."""
    dry_run = subprocess.run([compiler, "--dryrun", __file__], capture_output=True, text=True, check=False)
    if top := re.search(r"^#\$ TOP=(.*)$", dry_run.stderr, re.MULTILINE):
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
