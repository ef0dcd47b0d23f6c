"""Finds the compilers of this machine: the C++ compiler, and nvcc with the GPU architectures to compile for.

This file imports neither torch nor the rest of the package, so that setup.py can use it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# The architectures that a build without a GPU is for: Turing to Blackwell, and PTX for later ones. 86 and 89 run the
# code for 80, and kernels that are limited by memory gain nothing from their own.
_ARCHS = ("75", "80", "90", "100", "120")
_OLDEST_CUDA = (12, 1)  # the first that passes 32 KiB of arguments to a kernel
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
# Programs that run the compiler named after them, or that are called by its name through a link ("masquerading").
_LAUNCHERS = {"ccache", "sccache", "distcc", "icecc", "buildcache", "env", "nice"}


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says why and how to fix it."""


@dataclass(frozen=True)
class Cuda:
    """How to compile the CUDA kernels, or why they are not compiled.

    Attributes:
        nvcc: the compiler, or None to compile for the CPU only.
        archs: GPU architectures, as ("90", "120+PTX").
        libraries: the folder of the CUDA runtime.
        reason: why there is no compiler; the module remembers it.
        notices: messages for the user who builds.
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


def run(command: list[str]) -> tuple[int | None, str]:
    """Runs a program; returns its exit status (None if it cannot run or hangs) and everything it prints."""
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    return result.returncode, result.stdout


def _output_of(command: list[str]) -> str:
    """What a program prints; empty if it is missing, fails or hangs."""
    status, output = run(command)
    return output if status == 0 else ""


# ---------------------------------------------------------------------------------------------------------------- C++


def compiler_command() -> list[str]:
    """The C++ compiler: $CXX with its launcher and arguments, or the first of c++, g++, clang++ on the path.

    Links are not resolved, because programs such as ccache look at the name by which they are called.
    """
    value = os.environ.get("CXX", "").strip()
    try:
        wanted = [value] if shutil.which(value) else shlex.split(value)
    except ValueError as error:
        raise BuildError(f"CXX={value} cannot be read as a command: {error}; correct it or unset CXX") from error
    for candidate in [wanted] if wanted else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(candidate[0]):
            command = [os.path.abspath(found), *candidate[1:]]
            compiler_in(command)
            return command
    got = f"CXX={' '.join(wanted)} does not name a program" if wanted else "none of c++, g++, clang++ is on the PATH"
    raise BuildError(f"no C++ compiler: {got}; install one (for example 'apt install g++') or set CXX")


def compiler_in(command: list[str]) -> Path:
    """The compiler that a command runs, without a launcher before it or a launcher called by the compiler's name.

    nvcc needs it as its host compiler.
    """
    words = (word for word in command if Path(word).name not in _LAUNCHERS and not re.match(r"-|\w+=", word))
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


def python_include() -> str:
    """The folder of Python's headers."""
    include = sysconfig.get_paths()["include"]
    if not (Path(include) / "Python.h").exists():
        raise BuildError(
            f"Python.h is missing in {include}; install Python's headers (for example "
            f"'apt install python{sys.version_info[0]}.{sys.version_info[1]}-dev')"
        )
    return include


def pybind11_include() -> str:
    """The folder of pybind11's headers."""
    try:
        import pybind11
    except ImportError as error:
        # torch includes the same headers. This finds them without importing torch.
        torch = importlib.util.find_spec("torch")
        if torch and torch.origin and (Path(torch.origin).parent / "include" / "pybind11").is_dir():
            return str(Path(torch.origin).parent / "include")
        raise BuildError(
            "pybind11 is missing, and torch, which has the same headers, is not installed: pip install pybind11"
        ) from error
    return pybind11.get_include()


def ninja_command() -> list[str]:
    """The ninja program: that of the Python package if it is installed, else the one on the path."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise BuildError("ninja is missing, which runs the compilers: pip install ninja") from None
        return [found]
    return [str(Path(BIN_DIR) / "ninja")]


def check_tools() -> None:
    """Raises BuildError with everything that is missing to compile the kernels for the CPU."""
    missing = []
    for tool in (compiler_command, python_include, pybind11_include, ninja_command):
        try:
            tool()
        except BuildError as error:
            missing.append(str(error))
    if missing:
        raise BuildError("; ".join(missing))


# --------------------------------------------------------------------------------------------------------------- CUDA


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that works."""

    nvcc: Path
    release: str
    libraries: str
    archs: tuple[str, ...]  # those that nvcc knows; empty if it does not list them


def nvcc() -> Path | None:
    """The CUDA compiler: NPC_EXT_NVCC, else that of CUDA_HOME, on the path or in /usr/local/cuda; None without one.

    NPC_EXT_NVCC="" builds for the CPU only.
    """
    toolkit, _ = find_toolkit()
    return toolkit.nvcc if toolkit else None


def why_no_nvcc() -> str:
    """Why there is no nvcc to compile with; empty if there is one."""
    if os.environ.get("NPC_EXT_NVCC") == "":
        return "NPC_EXT_NVCC='' switches CUDA off"
    toolkit, wrong = find_toolkit()
    return "" if toolkit else "; ".join(wrong) or "no nvcc was found (the CUDA toolkit, 12.1 or newer, has it)"


@lru_cache(maxsize=1)
def find_toolkit() -> tuple[Toolkit | None, tuple[str, ...]]:
    """The first CUDA toolkit that works, and what is wrong with those tried before it."""
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


def _toolkit_of(compiler: Path) -> Toolkit:
    """The toolkit of an nvcc; raises BuildError if it does not work or is too old."""
    status, output = run([str(compiler), "--version"])
    version = re.search(r"release (\d+)\.(\d+)", output)
    if version is None:
        last = (output.strip().splitlines() or ["it prints nothing"])[-1]
        raise BuildError(f"{compiler} --version does not work (exit status {status}: {last})")
    if (int(version[1]), int(version[2])) < _OLDEST_CUDA:
        raise BuildError(f"{compiler} is older than CUDA {'.'.join(map(str, _OLDEST_CUDA))}")
    libraries = _cuda_libraries(compiler)
    archs = re.findall(r"compute_(\d+)", _output_of([str(compiler), "--list-gpu-arch"]))
    return Toolkit(compiler, f"{version[1]}.{version[2]}", libraries, tuple(sorted(archs, key=int)))


def _cuda_libraries(compiler: Path) -> str:
    """The folder of the CUDA runtime. nvcc may be a script or a link far from it, so nvcc is asked."""
    _, dry_run = run([str(compiler), "--dryrun", __file__])
    if top := re.search(r"^#\$ TOP=(.*)$", dry_run, re.MULTILINE):
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if (path := Path(top[1].strip()) / folder).joinpath("libcudart_static.a").exists():
                return str(path.resolve())
    raise BuildError(
        f"libcudart_static.a is not with {compiler}; install the whole CUDA toolkit, or set NPC_EXT_NVCC='' to build "
        "for the CPU only"
    )


def asked_for_cuda() -> bool:
    """Whether the user asked for CUDA kernels. Anything wrong with them is an error then."""
    return bool(os.environ.get("NPC_EXT_NVCC") or os.environ.get("NPC_EXT_ARCHS"))


def cuda(just_in_time: bool = False) -> Cuda:
    """Whether and how to compile the CUDA kernels. Problems are only noted, unless the user asked for the kernels.

    A just-in-time build compiles them only if torch can use them, and for the GPUs of this machine, unless the user
    asked.
    """
    if os.environ.get("NPC_EXT_NVCC") == "":
        return Cuda(reason=why_no_nvcc())
    if just_in_time and not asked_for_cuda():
        if not _torch_has_cuda():
            return Cuda(
                reason="this torch was built without CUDA (to compile them anyway, set NPC_EXT_ARCHS, as in 90)"
            )
        if not gpus_here():
            return Cuda(reason="there is no GPU here (to compile them anyway, set NPC_EXT_ARCHS, as in 90)")
    toolkit, wrong = find_toolkit()
    if toolkit is None:
        reason = why_no_nvcc()
        if wrong and asked_for_cuda():
            raise BuildError(f"NPC_EXT_ARCHS asks for CUDA kernels, but {reason}; fix that or unset NPC_EXT_ARCHS")
        said = wrong or asked_for_cuda()
        return Cuda(reason=reason, notices=(f"the CUDA kernels are left out: {reason}",) if said else ())
    notices = tuple(f"{problem}, so {toolkit.nvcc} is used" for problem in wrong)
    try:
        archs, more = architectures(just_in_time)
    except BuildError as error:
        if asked_for_cuda():
            raise
        return Cuda(reason=str(error), notices=(*notices, f"the CUDA kernels are left out: {error}"))
    return Cuda(toolkit.nvcc, archs, toolkit.libraries, "", (*notices, *more), toolkit.release)


def architectures(just_in_time: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The GPU architectures to compile for, as ("90", "120+PTX"), and notices about requested ones that are left out.

    They come from NPC_EXT_ARCHS ("80;90+PTX"), else (not just in time) from TORCH_CUDA_ARCH_LIST in torch's notation
    ("8.0 9.0+PTX", "Ampere;Hopper", "native", "all"), else from the GPUs in this machine. Without any of these they are
    all from Turing on that nvcc knows.
    """
    toolkit, _ = find_toolkit()
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
    """The architectures that one entry in the value of an environment variable stands for."""
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
    """All from Turing on that nvcc knows, and PTX of the newest for later GPUs."""
    found = [arch for arch in _ARCHS if not known or arch in known]
    return (*found[:-1], f"{found[-1]}+PTX") if found else ()


def _archs_here(known: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the GPUs in this machine. A GPU newer than nvcc gets PTX of the newest that nvcc knows."""
    found = []
    for arch in gpus_here():
        older = [candidate for candidate in known if int(candidate) < int(arch)]
        if not known or arch in known:
            found.append(arch)
        elif older:
            found.append(f"{older[-1]}+PTX")
        else:
            raise BuildError(f"this machine has a GPU of sm_{arch}, and its nvcc knows {', '.join(known)} only")
    return tuple(dict.fromkeys(found))


def gpus_here() -> tuple[str, ...]:
    """The architectures of the GPUs in this machine, as ("80", "90")."""
    capabilities = _output_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]).split()
    here = {capability.replace(".", "") for capability in capabilities if re.fullmatch(r"\d+\.\d", capability)}
    # Containers may lack nvidia-smi. CUDA is asked only if the program has initialized it, because a process must not
    # fork after that.
    gpus = getattr(sys.modules.get("torch"), "cuda", None)
    if not here and gpus is not None and gpus.is_initialized():
        found = [gpus.get_device_capability(index) for index in range(gpus.device_count())]
        here = {f"{major}{minor}" for major, minor in found}
    return tuple(sorted(here, key=int))


def _torch_has_cuda() -> bool:
    """Whether torch was built with CUDA.

    This reads a file of torch instead of importing it, because torch may be broken.
    """
    try:
        torch = importlib.util.find_spec("torch")
        version = Path(torch.origin).with_name("version.py").read_text() if torch and torch.origin else ""
    except (ImportError, ValueError, OSError):
        return False
    return re.search(r"^cuda\b[^=\n]*=\s*['\"]\d", version, re.MULTILINE) is not None
