"""The CUDA kernels compiled for the CPU (see cuda_on_cpu.h), as a module like npc_ext's."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock

import npc_ext.kernels.launch
from npc_ext.kernels import build, compilers, native

HERE = Path(__file__).parent
CSRC = build.source_dir()
# Those of a build with CUDA, each once: the CPU's kernels are compiled for the baseline only.
SOURCES = list(dict.fromkeys(source.path for source in build.sources(compilers.Cuda(nvcc=Path("nvcc")))))
DEFINES = ["-DNPC_CUDA", "-DNPC_CUDA_ON_CPU", '-DNPC_EXT_CUDA_ARCHS="cpu"', '-DNPC_EXT_BUILD_KEY="cuda_on_cpu"']


def compiled(flags: tuple[str, ...], csrc: Path = CSRC) -> Path:
    """Compiles the module with additional flags, unless it exists already, and returns its path."""
    compiler = compilers.compiler_command()
    common = [
        *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-O2", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
        *("-fno-math-errno", "-fno-trapping-math", "-Werror", *DEFINES, f"-I{HERE}"),
        *(f"-I{path}" for path in (compilers.python_include(), compilers.pybind11_include())),
        *flags,
        # The thread sanitizer needs real threads. Fibers, which take turns, are faster.
        *(["-DCUDA_ON_CPU_REAL_THREADS"] if "-fsanitize=thread" in flags else []),
    ]
    files = [
        path for folder in (csrc, HERE) for path in sorted(folder.rglob("*")) if path.suffix in (".h", ".cpp", ".cu")
    ]
    key = hashlib.sha256(repr((compiler, common)).encode() + b"".join(path.read_bytes() for path in files))
    objects = HERE.parents[1] / "build" / "cuda_on_cpu"
    folder = objects / key.hexdigest()[:16]
    target = folder / build.MODULE_FILE
    folder.mkdir(parents=True, exist_ok=True)

    def run(*arguments: str) -> bytes:
        result = subprocess.run([*compiler, *arguments], capture_output=True, check=False)
        assert result.returncode == 0, result.stderr.decode()
        return result.stdout

    def compile_one(source: str) -> str:
        # Modules that differ in few sources share the other objects, which are identified by the preprocessed source.
        what = ("-x", "c++", str(csrc / source))
        preprocessed = run(*common, "-E", "-P", *what)
        options = [flag for flag in flags if not flag.startswith("-D")]
        made = objects / f"{hashlib.sha256(repr((compiler, options)).encode() + preprocessed).hexdigest()[:16]}.o"
        if not made.exists():
            run(*common, "-c", *what, "-o", f"{made}.{os.getpid()}")
            os.replace(f"{made}.{os.getpid()}", made)
        return str(made)

    with FileLock(folder / "lock"):
        if not target.exists():
            with ThreadPoolExecutor(2) as pool:
                made = list(pool.map(compile_one, SOURCES))
            run("-shared", *flags, *made, "-o", str(target), "-ldl", "-lpthread")
    return target


@lru_cache
def module() -> ModuleType:
    """The module, compiled with the flags in CUDA_ON_CPU_FLAGS (for sanitizers) from CUDA_ON_CPU_CSRC (with a fault)."""
    flags = tuple(os.environ.get("CUDA_ON_CPU_FLAGS", "").split())
    return native.import_from(compiled(flags, Path(os.environ.get("CUDA_ON_CPU_CSRC", CSRC))), f"{__name__}._C")


def take_over(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Has `npc_ext.kernels.launch` use these kernels from now on, by `setattr` or pytest's `monkeypatch.setattr`."""
    set_attribute(npc_ext.kernels.launch, "_launch", launch)
    set_attribute(npc_ext.kernels.launch, "_module", lambda device: module())


def launch(kernel: str, device: torch.device, *arguments: Any, stream: int = 0) -> None:
    """Launches as on a GPU, with the CPU's memory and any stream number."""
    cuda = module().cuda
    getattr(cuda, kernel)(cuda.Stream(0, stream), *arguments)


def _variable(name: str) -> Any:
    kinds = {"capture": ctypes.c_ulonglong, **dict.fromkeys(("free_bytes", "loads", "launches"), ctypes.c_longlong)}
    library = ctypes.CDLL(str(module().__file__))
    return kinds.get(name, ctypes.c_int).in_dll(library, f"cuda_on_cpu_{name}")


def counted(what: str, function: Callable[[], object]) -> int:
    """The number of "launches" of kernels in a call, or of "loads" of 16 bytes in one access."""
    counter = _variable(what)
    before = counter.value
    function()
    return int(counter.value - before)


@contextmanager
def state(**values: int) -> Iterator[None]:
    """Sets variables of the "GPU" within the context: capture, free_bytes, driver, kernel_error (see cuda_on_cpu.h)."""
    variables = {name: _variable(name) for name in values}
    before = {name: variable.value for name, variable in variables.items()}
    for name, variable in variables.items():
        variable.value = values[name]
    try:
        yield
    finally:
        for name, variable in variables.items():
            variable.value = before[name]
