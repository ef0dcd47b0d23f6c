"""What to compile and how, for the ahead-of-time build (setup.py) and the just-in-time build (just_in_time.py) alike.

This file imports neither torch nor the rest of the package, so that setup.py can use it. The kernels include no torch
header. So the module depends only on the C and C++ libraries and on the Python version.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .compilers import (
    BuildError,
    Cuda,
    asked_for_cuda,
    check_tools,
    compiler_command,
    compiler_in,
    cuda,
    ninja_command,
    pybind11_include,
    python_include,
    run,
    say,
)

# What compilers print when they are killed, for example when memory runs out. The next attempt may succeed.
_KILLED = re.compile(
    r"Killed|Terminated|signal 9|[Oo]ut of memory|Cannot allocate memory|memory exhausted|interrupted by user"
)

MODULE_FILE = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
PACKAGE = Path(__file__).resolve().parent.parent
_X86 = platform.machine().lower() in ("x86_64", "amd64")

# No fast math: rounding and NaN keep their meaning. The two exceptions only say that nothing reads errno or the
# floating-point exception flags; otherwise loops with sqrt are not vectorized. Without NDEBUG, pybind11 asserts at each
# reference count that the interpreter lock is held.
_FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-DNDEBUG",
]
_FAST = ["-O3"]
_BINDINGS = ["-O2"]
# Products are not fused with sums. Otherwise the compiler would choose where, kernel by kernel, but
# a step must have the same bits whichever kernels run it. The kernels are limited by memory, so
# this should cost no time.
_CUDA_FLAGS = ["-std=c++17", "-fmad=false"]
_CUDA_SOURCES = ("step", "importance", "update", "adam", "connections", "anchored", "wide", "workspace", "support")
_ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}


class CompileError(BuildError):
    """The compiler fails, or its module does not load. The next attempt would fail in the same way."""


class _CudaError(CompileError):
    """Only the CUDA kernels, or the CUDA runtime, failed."""


class DiskFullError(BuildError):
    """There is no space left for the objects."""


@dataclass(frozen=True)
class Source:
    """One translation unit: its path below csrc/, its extra flags, and its name if the path has several variants."""

    path: str
    flags: tuple[str, ...] = ()
    variant: str = ""


def source_dir() -> Path:
    """csrc/ inside an installed package, or beside the package in a source checkout."""
    installed = PACKAGE / "csrc"
    return installed if installed.is_dir() else PACKAGE.parent / "csrc"


def sources(plan: Cuda) -> list[Source]:
    """Every translation unit of the module for this processor family, and for CUDA where it is compiled."""
    isas = list(_ISA_FLAGS) if _X86 else ["baseline"]
    kernels = [Source("cpu/kernels.cpp", (f"-DNPC_ISA={isa}", *_FAST, *_ISA_FLAGS[isa]), isa) for isa in isas]
    shared = [Source(f"cpu/{name}.cpp", tuple(_FAST)) for name in ("importance", "update", "isa", "parallel")]
    cuda = [Source(f"cuda/{name}.cu", tuple(_FAST)) for name in _CUDA_SOURCES] if plan.nvcc else []
    return [*cuda, Source("bindings.cpp", tuple(_BINDINGS)), *kernels, *shared]


def flags(plan: Cuda) -> list[str]:
    """Compiler flags of every translation unit, before its own flags."""
    cuda = ["-DNPC_CUDA", f"-DNPC_EXT_CUDA_ARCHS='\"{' '.join(plan.archs)}\"'"] if plan.nvcc else []
    return [*_FLAGS, *(["-DNPC_X86"] if _X86 else []), *cuda]


def nvcc_flags(archs: tuple[str, ...]) -> list[str]:
    """Flags of nvcc for every .cu file, with machine code for each architecture and PTX where requested."""
    codes = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        codes.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            codes.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    # The build's log gets every kernel's registers and spills, which a test reads.
    shared = [*_CUDA_FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
    return [*shared, "-ccbin", str(compiler_in(compiler_command())), *codes]


def user_flags() -> list[str]:
    """Flags from NPC_EXT_CXXFLAGS (for sanitizers, for example). They come last, so they take precedence."""
    return os.environ.get("NPC_EXT_CXXFLAGS", "").split()


# ----------------------------------------------------------------------------------------------------- the build's key


def _parts() -> dict[str, str]:
    """What the module is made from, with a digest of each: the sources by their path below csrc/, and the flags."""
    root = source_dir()
    files = sorted(path for kind in ("*.h", "*.cpp", "*.cu") for path in root.rglob(kind))
    parts = {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
    parts["the-compiler-flags"] = repr((_FLAGS, _FAST, _BINDINGS, _CUDA_FLAGS, _ISA_FLAGS, _X86)).encode()
    parts["NPC_EXT_CXXFLAGS"] = repr(user_flags()).encode()
    return {name: hashlib.sha256(content).hexdigest()[:16] for name, content in parts.items()}


def _key_of(parts: dict[str, str]) -> str:
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:16]


def build_key() -> str:
    """Changes with the sources and the flags: a module with another key is stale.

    It does not depend on anything else on the machine, for example a CUDA compiler: a module may be built on one
    machine and run on another.
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


def how_to_build() -> str:
    """The command that builds the module ahead of time once more."""
    if (PACKAGE.parent / "setup.py").exists():
        return f"'python setup.py build_ext --inplace' in {PACKAGE.parent}"
    return "'pip install --force-reinstall --no-deps .' in a checkout of npc_ext"


# ---------------------------------------------------------------------------------------------------------- the build


def build(target: Path, folder: Path, plan: Cuda | None = None, lock: int | None = None) -> None:
    """Compiles and links the module in `folder` with ninja and moves it to `target` in one step.

    If only CUDA fails and the user did not ask for it, builds the module for the CPU only and says so. ninja keeps the
    descriptor `lock` open as long as it runs.

    Raises:
        BuildError: the build failed, or something is missing for it; the message has the compiler's whole output.
    """
    check_tools()
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
    """Makes the module in `folder` and checks that it loads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(_ninja_file(plan))
    command, output = [*ninja_command(), "-C", str(folder)], []
    with _Progress() as progress:
        try:
            process = subprocess.Popen(
                command,
                env={**os.environ, "NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"},  # the code below reads the messages
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
    if process.returncode != 0:
        raise _error_of(process.returncode, "".join(output), plan)
    _check_that_it_loads(folder / MODULE_FILE, _CudaError if plan.nvcc else CompileError)


def _error_of(status: int, said: str, plan: Cuda) -> BuildError:
    """The exception for a build that failed with an exit status and an output."""
    if full := re.search(r"No space left on device|Disk quota exceeded", said):
        return DiskFullError(f"{full[0].lower()}: free some there or in {tempfile.gettempdir()}")
    failed = re.findall(r"^FAILED: (?:\[code=-?\d+\] )?(\S+)", said, re.MULTILINE)
    only_cuda = bool(plan.nvcc and failed) and all(name.startswith("cuda_") or name == MODULE_FILE for name in failed)
    if not only_cuda and (status < 0 or status > 128 or _KILLED.search(said)):  # by a signal
        return BuildError(
            f"the C++ compiler was killed, or ran out of memory (exit status {status}); try again, if need be with "
            f"more free memory:\n{said}"
        )
    kind = _CudaError if only_cuda else CompileError
    return kind(f"the {'CUDA' if only_cuda else 'C++'} compiler failed (exit status {status}):\n{said}")


def _check_that_it_loads(module: Path, kind: type[CompileError]) -> None:
    """Deletes a module that cannot be imported, and raises with the loader's message."""
    # Sanitized code loads only where the sanitizer's library was loaded before Python.
    if not sys.executable or any("-fsanitize" in flag for flag in user_flags()):
        return
    script = (
        "import sys; from importlib.machinery import ExtensionFileLoader as Loader; from importlib import util; "
        "loader = Loader('npc_ext._C', sys.argv[1]); "
        "loader.exec_module(util.module_from_spec(util.spec_from_loader('npc_ext._C', loader)))"
    )
    status, output = run([sys.executable, "-I", "-S", "-c", script, str(module)])
    if status:
        module.unlink(missing_ok=True)
        last = (output.strip().splitlines() or [f"exit status {status}"])[-1]
        question = f"is {' '.join(compiler_command())} a C++ compiler for {sys.executable}?"
        if "failed to map segment" in last:
            question = (
                f"may code from {module.parent} be executed (not if it is mounted with noexec)? If it may not, build "
                "elsewhere (NPC_EXT_CACHE names the folder of a just-in-time build)"
            )
        raise kind(f"the compiled module does not load, and was deleted: {last}; {question}")


class _Progress:
    """One line on a terminal that is overwritten again and again. Shows nothing if standard error is not a terminal."""

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


# --------------------------------------------------------------------------------------------------------- ninja's file


_COMPILE = "-MMD -MF $out.d $flags -c $in -o $out"
_DEPENDENCIES = ("  depfile = $out.d", "  deps = gcc")


def _rule(name: str, command: str, *variables: str) -> list[str]:
    """The lines of a rule in ninja's file."""
    return [f"rule {name}", f"  command = {command}", "  description = $out", *variables]


def _ninja_file(plan: Cuda) -> str:
    """The build in ninja's own language; every path is escaped for it."""
    root = source_dir()
    common = " ".join([*flags(plan), *(_quote(f"-I{path}") for path in (python_include(), pybind11_include()))])
    # Only the bindings get these, so that a change of one source does not recompile all others.
    defines = {"NPC_EXT_BUILD_KEY": _manifest(), "NPC_EXT_WHY_NO_CUDA": plan.reason}
    of_bindings = " ".join(_quote(f"-D{name}={_c_string(value)}") for name, value in defines.items())
    link = "-undefined dynamic_lookup" if sys.platform == "darwin" else "-ldl"
    if plan.nvcc:
        # The CUDA runtime is linked statically, so the module can be imported without CUDA and runs
        # with any version of it.
        link = f"-L{_quote(plan.libraries)} -lcudart_static -lrt -lpthread {link}"
    lines = [
        f"cxx = {' '.join(_quote(part) for part in compiler_command())}",
        f"nvcc = {_quote(str(plan.nvcc))}",
        *_rule("compile", f"$cxx {_COMPILE}", *_DEPENDENCIES),
        # ptxas' report stays beside the object; it is shown if the compiler fails.
        *_rule("cuda", f"$nvcc {_COMPILE} > $out.log 2>&1 || (cat $out.log; exit 1)", *_DEPENDENCIES),
        *_rule("link", f"$cxx -shared {' '.join([*flags(plan), *user_flags()])} $in -o $out {link}"),
    ]
    cuda_flags = " ".join(["-DNPC_CUDA", *map(_quote, nvcc_flags(plan.archs))]) if plan.nvcc else ""
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
    """A C++ string literal, in one line of printable ASCII."""
    printable = "".join(character if " " <= character <= "~" else "?" for character in text.replace("\n", " "))
    return '"' + printable.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _escape(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _quote(argument: str) -> str:
    """Quotes an argument for the shell that ninja runs commands in, with dollars escaped for ninja."""
    return "'" + argument.replace("'", "'\\''").replace("$", "$$") + "'"
