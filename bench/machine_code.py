"""What the kernels' machine code says about their memory traffic: `python -m bench.machine_code` prints a table.

A kernel that is limited by memory reaches the memory's bandwidth only if enough bytes are in flight at any time, and if
each access moves many of them. Both can be read off the machine code, without a GPU; sass.py says how.

    bytes in flight a multiprocessor = loads in flight of a thread * 16 * threads of a block * resident blocks
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from npc_ext.kernels import build, compilers

from .rows import NOT_MEASURED
from .sass import Loop, packed_loops, parse
from .tables import markdown

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ROOT / "build" / build.MODULE_FILE
PACKAGES = "nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
THREADS = 256  # kThreads of csrc/cuda
SHARED_KIB = {"80": 164, "90": 228, "100": 228}  # shared memory of a multiprocessor
# KiB in flight a multiprocessor that saturate a card's memory, and the memory's peak bandwidth in TB/s. The former are
# those that NVIDIA tuned cub::DeviceTransform with (cub/device/dispatch/tuning/tuning_transform.cuh). By Little's law
# they stand for a latency of 1.3 microseconds under load, on 132 multiprocessors.
CARDS = {"H100": (32, 3.35), "H200": (48, 4.8)}


@dataclass(frozen=True)
class Kernel:
    """One kernel's machine code for one architecture; shared memory is in bytes a block."""

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
        """How many blocks a multiprocessor holds: of 65,536 registers, 64 warps and the shared memory."""
        a_warp = -(-self.registers * 32 // 256) * 256
        warps = min(64, 65_536 // 4 // a_warp * 4)  # registers are divided among four schedulers
        reserved = 0 if int(self.arch) >= 100 and self.shared else 1024  # the system's, which newer reports include
        shared = -(-(self.shared + reserved) // 128) * 128
        return min(warps * 32 // THREADS, SHARED_KIB[self.arch] * 1024 // shared)

    @property
    def loads_in_flight(self) -> int:
        return max((loop.loads_in_flight for loop in self.loops), default=0)

    @property
    def kib_in_flight(self) -> int:
        return self.loads_in_flight * 16 * THREADS * self.blocks // 1024


def cuobjdump() -> Path | None:
    """NVIDIA's disassembler: from the package nvidia-cuda-cuobjdump, the path, or the toolkit of nvcc.

    It calls nvdisasm, which must be beside it or on the path.
    """
    try:
        files = metadata.files("nvidia-cuda-cuobjdump") or []
    except metadata.PackageNotFoundError:
        files = []
    packaged = [Path(str(file.locate())) for file in files if file.name == "cuobjdump"]
    found = [Path(one)] if (one := shutil.which("cuobjdump")) else []
    beside = [compiler.resolve().parent / "cuobjdump"] if (compiler := compilers.nvcc()) else []
    whole = (one for one in [*packaged, *found, *beside] if one.exists() and _has_nvdisasm(one))
    return next(whole, None)


def _has_nvdisasm(path: Path) -> bool:
    return shutil.which("nvdisasm") is not None or path.with_name("nvdisasm").exists()


def compiled(source: Path, arch: str, folder: Path) -> Path:
    """Compiles a .cu file for one architecture, with the flags of the build."""
    out = folder / f"{source.stem}.{arch}.cubin"
    flags = [flag for flag in build.nvcc_flags(()) if not flag.startswith("-Xptxas")]
    command = [compilers.nvcc(), "-DNPC_CUDA", "-O3", *flags, "-cubin", f"-arch=sm_{arch}", source, "-o", out]
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True, check=False)
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
        if "fatal" in done.stderr:  # its exit status also tells of a file without code for the GPU
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
        spills = sum(one.kind in ("LDL", "STL") for one in instructions)
        loops = tuple(packed_loops(instructions))
        found.append(Kernel(name, arch, registers, stack, shared, spills, len(instructions), loops))
    return found


def readable(names: Sequence[str]) -> list[str]:
    """Demangled names, as short as in importance_kernel<rows, relu, Pack<half>> and update_kernel<float, momentum>."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    text = re.sub(r"npc::cuda::|\(anonymous namespace\)::|^void ", "", text, flags=re.MULTILINE)
    text = text.replace("(Layout)0", "rows").replace("(Layout)1", "columns")
    text = text.replace("__nv_bfloat16", "bfloat16").replace("__half", "half").replace("> >", ">>").replace("> >", ">>")
    text = re.sub(r"Kind<(\w+), (\w+), (\w+)>", r"\1, momentum=\2, stochastic rounding=\3", text)
    text = re.sub(r"importance_kernel<(\w+), (true|false)", r"importance_kernel<\1, relu=\2", text)
    text = re.sub(r"=true|, [\w ]+=false", "", text)
    return [line.split("(")[0] for line in text.splitlines()]


def table(found: Sequence[Kernel]) -> str:
    """The table of docs/kernels.md: kernels with packed loops, and what their loads in flight allow."""
    rows: list[list[str]] = []
    for kernel in found:
        name = re.sub(r"(, )?\w*Network<[^<>]*>", "", kernel.name).replace("<>", "")  # for any number of parameters
        allowed = [min(1, kernel.kib_in_flight / needed) * peak for needed, peak in CARDS.values()]
        numbers = [kernel.loads_in_flight, kernel.registers, kernel.blocks, kernel.kib_in_flight]
        row = [f"`{name}`", *map(str, numbers), *(f"{bandwidth:.2f}" for bandwidth in allowed), NOT_MEASURED]
        if kernel.loops and row not in rows:
            rows.append(row)
    header = ["kernel", "loads in flight", "registers", "blocks", "KiB in flight"]
    return markdown([*header, *(f"TB/s, {card}" for card in CARDS), "measured share"], rows)


def compiler_version() -> str:
    """As in "nvcc 13.0.88"; empty without nvcc."""
    compiler = compilers.nvcc()
    words = subprocess.run([str(compiler), "--version"], capture_output=True, text=True).stdout if compiler else ""
    return f"nvcc {found[1]}" if (found := re.search(r"\bV([\d.]+)", words)) else ""


def _found(files: Sequence[Path], arch: str, name: re.Pattern[str]) -> list[Kernel]:
    """The kernels of files, or of the build, whose name has a match. Raises ValueError if there are none."""
    if cuobjdump() is None:
        raise ValueError(f"there is no cuobjdump with nvdisasm; install them (pip install {PACKAGES})")
    if absent := [str(one) for one in files if not one.exists()]:
        raise ValueError(f"there is no {', '.join(absent)}")
    if any(one.suffix == ".cu" for one in files) and compilers.nvcc() is None:
        raise ValueError("there is no nvcc to compile with")
    if not files and not (files := sorted(OBJECTS.glob("cuda_*.o"))):
        raise ValueError(f"{OBJECTS} has no objects of CUDA kernels; call make first, or name a .cu file")
    if OBJECTS in files[0].parents and (why := _why_stale()):
        raise ValueError(f"the objects in {OBJECTS} are older than the sources beside them ({why}); call make first")
    with tempfile.TemporaryDirectory() as folder:
        objects = [compiled(one, arch, Path(folder)) if one.suffix == ".cu" else one for one in files]
        if found := [kernel for kernel in kernels(objects, arch) if name.search(kernel.name)]:
            return found
    raise ValueError(f"no such kernel with code for sm_{arch} in {', '.join(map(str, files))}")


def _why_stale() -> str:
    built = build.PACKAGE / build.MODULE_FILE
    return build.why_stale(built.read_bytes()) if built.exists() else "there is no module"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.machine_code", description=__doc__.split("\n")[0])
    parser.add_argument(
        "files", nargs="*", type=Path, help=".cu files, objects or cubins; default: the build's objects"
    )
    parser.add_argument("--arch", default="90", choices=SHARED_KIB, help="default: 90, of H100 and H200")
    parser.add_argument("--kernel", default="", help="only kernels whose name has this regular expression")
    parser.add_argument("--loops", action="store_true", help="each packed loop, instead of the table")
    options = parser.parse_args(arguments)
    try:
        found = _found(options.files, options.arch, re.compile(options.kernel))
    except (ValueError, re.error, compilers.BuildError) as error:
        parser.error(str(error))
    if not options.loops:
        print(f"{table(found)}\n\nCompiled for sm_{options.arch} by {compiler_version()}.")
        return
    for kernel in found:
        print(
            f"{kernel.name}: {kernel.registers} registers, {kernel.blocks} blocks, {kernel.kib_in_flight} KiB in "
            f"flight, {kernel.spills} spills, {kernel.stack} bytes of stack, {kernel.instructions} instructions"
        )
        for loop in kernel.loops:
            print(f"  {loop}", *(f"    narrow: 0x{one.address:04x} {one.text}" for one in loop.narrow[:8]), sep="\n")


if __name__ == "__main__":
    main()
