"""The kernels in compiled files: registers, memory, and bytes in flight.

A memory-bound kernel reaches the memory's bandwidth only if enough bytes are in flight at any time, and if each access
moves many of them. Both can be read from the machine code, without a GPU (see sass.py).

    bytes in flight per multiprocessor = loads in flight of a thread * 16 * threads of a block * resident blocks

It also must not spend more time on instructions than the memory takes. A multiprocessor issues at most four warps'
instructions a cycle, so what counts is how many instructions a warp executes for each KiB that it moves.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from npc_ext.kernels import build, compilers

from .. import ROOT
from .sass import Loop, packed_loops, parse

OBJECTS = ROOT / "build" / build.MODULE_FILE
THREADS = 256  # kThreads of csrc/cuda
WARP = 32
SHARED_KIB = {"80": 164, "90": 228, "100": 228}  # shared memory of a multiprocessor


@dataclass(frozen=True)
class Kernel:
    """One kernel's machine code for one architecture. `shared` is in bytes per block."""

    name: str
    arch: str
    registers: int
    stack: int
    shared: int
    spills: int
    instructions: int
    loops: tuple[Loop, ...]

    @property
    def blocks(self) -> int:
        """How many blocks fit a multiprocessor, with its 65,536 registers, 64 warps and shared memory."""
        a_warp = -(-self.registers * 32 // 256) * 256
        warps = min(64, 65_536 // 4 // a_warp * 4)  # registers are divided among four schedulers
        # The system reserves 1 KiB; newer reports include it.
        reserved = 0 if int(self.arch) >= 100 and self.shared else 1024
        shared = -(-(self.shared + reserved) // 128) * 128
        return min(warps * 32 // THREADS, SHARED_KIB[self.arch] * 1024 // shared)

    @property
    def loads_in_flight(self) -> int:
        return max((loop.loads_in_flight for loop in self.loops), default=0)

    @property
    def instructions_per_kib(self) -> float:
        """Instructions that a warp executes for each KiB that it reads or writes, in the packed loop with the most."""
        return max((loop.instructions / (loop.accesses * 16 * WARP / 1024) for loop in self.loops), default=0)

    @property
    def kib_in_flight(self) -> int:
        return self.loads_in_flight * 16 * THREADS * self.blocks // 1024


def cuobjdump() -> Path | None:
    """Finds NVIDIA's disassembler in the package nvidia-cuda-cuobjdump, on the PATH, or in nvcc's toolkit.

    It calls nvdisasm, which must be next to it or on the PATH.
    """
    try:
        files = metadata.files("nvidia-cuda-cuobjdump") or []
    except metadata.PackageNotFoundError:
        files = []
    packaged = [Path(str(file.locate())) for file in files if file.name == "cuobjdump"]
    found = [Path(one)] if (one := shutil.which("cuobjdump")) else []
    of_nvcc = [compiler.resolve().parent / "cuobjdump"] if (compiler := compilers.nvcc()) else []
    whole = (tool for tool in [*packaged, *found, *of_nvcc] if tool.exists() and _has_nvdisasm(tool))
    return next(whole, None)


def _has_nvdisasm(path: Path) -> bool:
    return shutil.which("nvdisasm") is not None or path.with_name("nvdisasm").exists()


def compiled(source: Path, arch: str, folder: Path) -> Path:
    """Compiles a .cu file for one architecture, with the flags of the build."""
    out = folder / f"{source.stem}.{arch}.cubin"
    flags = [flag for flag in build.nvcc_flags(()) if not flag.startswith("-Xptxas")]
    command = [compilers.nvcc(), "-DNPC_CUDA", "-O3", *flags, "-cubin", f"-arch=sm_{arch}", source, "-o", out]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{source} does not compile:\n{done.stderr.strip()}")
    return out


def kernels(files: Iterable[Path], arch: str) -> list[Kernel]:
    """The kernels of objects or cubins for one architecture."""
    with ThreadPoolExecutor(2) as pool:
        return [kernel for some in pool.map(lambda file: _kernels(file, arch), files) for kernel in some]


def _kernels(file: Path, arch: str) -> list[Kernel]:
    def run(*what: str) -> str:
        command = [str(cuobjdump()), "-arch", f"sm_{arch}", *what, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "fatal" in done.stderr:  # the exit status is also nonzero for a file without GPU code
            raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip()}")
        return done.stdout

    usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", run("-res-usage"))
    if not usage:
        return []
    disassembly = run("-sass")
    if f"code for sm_{arch}\n" not in disassembly:  # a cubin, which has one architecture only
        return []
    code = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", disassembly, re.DOTALL))
    found = []
    for (mangled, *numbers), name in zip(usage, readable([name for name, *_ in usage]), strict=True):
        registers, stack, shared = map(int, numbers)
        instructions = list(parse(code[mangled]))
        spills = sum(instruction.kind in ("LDL", "STL") for instruction in instructions)
        loops = tuple(packed_loops(instructions))
        found.append(Kernel(name, arch, registers, stack, shared, spills, len(instructions), loops))
    return found


def readable(names: Sequence[str]) -> list[str]:
    """Short demangled names, such as importance_kernel<rows, relu, Pack<half>> and update_kernel<float, momentum>."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    text = re.sub(r"npc::cuda::|\(anonymous namespace\)::|^void ", "", text, flags=re.MULTILINE)
    text = text.replace("(Layout)0", "rows").replace("(Layout)1", "columns")
    text = text.replace("__nv_bfloat16", "bfloat16").replace("__half", "half").replace("> >", ">>").replace("> >", ">>")
    text = re.sub(r"Kind<(\w+), (\w+), (\w+)>", r"\1, momentum=\2, stochastic rounding=\3", text)
    text = re.sub(r"importance_kernel<(\w+), (true|false)", r"importance_kernel<\1, relu=\2", text)
    text = re.sub(r"=true|, [\w ]+=false", "", text)
    return [line.split("(")[0] for line in text.splitlines()]


def compiler_version() -> str:
    """As in "nvcc 13.0.88"; empty without nvcc."""
    compiler = compilers.nvcc()
    words = subprocess.run([str(compiler), "--version"], capture_output=True, text=True).stdout if compiler else ""
    return f"nvcc {found[1]}" if (found := re.search(r"\bV([\d.]+)", words)) else ""
