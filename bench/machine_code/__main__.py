"""What the kernels' machine code says about their memory traffic: `python -m bench.machine_code` prints a table."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from npc_ext.kernels import build, compilers

from ..rows import NOT_MEASURED
from ..tables import markdown
from .kernels import OBJECTS, SHARED_KIB, Kernel, compiled, compiler_version, cuobjdump, kernels

PACKAGES = "nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
# Peak bandwidth of a card's memory in bytes a second, and the instructions of warps that it can issue in a second: four
# a cycle on each of 132 multiprocessors, at 1.98 GHz. The clock follows from the 67 TFLOPS of float32 in NVIDIA's data
# sheets of both cards, which are two operations a cycle in 128 lanes.
CARDS = {"H100": 3.35e12, "H200": 4.8e12}
INSTRUCTIONS = 4 * 132 * 1.98e9


def table(found: Sequence[Kernel]) -> str:
    """The table of docs/development/machine-code.md: kernels with packed loops, and what their loads allow."""
    rows: list[list[str]] = []
    for kernel in found:
        name = re.sub(r"(, )?\w*Network<[^<>]*>", "", kernel.name).replace("<>", "")  # for any number of parameters
        if not kernel.loops:
            continue
        counts = [kernel.loads_in_flight, kernel.registers, kernel.blocks, kernel.kib_in_flight]
        issued = [kernel.instructions_per_kib * peak / 1024 / INSTRUCTIONS for peak in CARDS.values()]
        numbers = [*map(str, counts), f"{kernel.instructions_per_kib:.0f}", *(f"{share:.0%}" for share in issued)]
        row = [f"`{name}`", *numbers, NOT_MEASURED]
        if row not in rows:
            rows.append(row)
    header = ["kernel", "loads in flight", "registers", "blocks", "KiB in flight", "instructions per KiB"]
    return markdown([*header, *(f"issue, {card}" for card in CARDS), "measured share"], rows)


def _found(files: Sequence[Path], arch: str, name: re.Pattern[str]) -> list[Kernel]:
    """The kernels of files (default: of the build) whose names match. Raises ValueError if there are none."""
    if cuobjdump() is None:
        raise ValueError(f"there is no cuobjdump with nvdisasm; install them (pip install {PACKAGES})")
    if absent := [str(file) for file in files if not file.exists()]:
        raise ValueError(f"there is no {', '.join(absent)}")
    if any(file.suffix == ".cu" for file in files) and (why := compilers.why_no_nvcc()):
        raise ValueError(f"a .cu file cannot be compiled: {why}")
    if not files and not (files := sorted(OBJECTS.glob("cuda_*.o"))):
        raise ValueError(
            f"{OBJECTS} has no objects of CUDA kernels; name a .cu file, or build with nvcc: {build.how_to_build()}"
        )
    if OBJECTS in files[0].parents and (why := _why_stale()):
        raise ValueError(
            f"the objects in {OBJECTS} are older than the sources ({why}); build them again: {build.how_to_build()}"
        )
    with tempfile.TemporaryDirectory() as folder:
        objects = [compiled(file, arch, Path(folder)) if file.suffix == ".cu" else file for file in files]
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
            print(
                f"  {loop}",
                *(f"    narrow: 0x{instruction.address:04x} {instruction.text}" for instruction in loop.narrow[:8]),
                sep="\n",
            )


if __name__ == "__main__":
    main()
