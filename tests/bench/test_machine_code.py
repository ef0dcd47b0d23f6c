"""What the CUDA kernels' machine code does with memory: wide accesses only, and enough loads in flight.

bench/machine_code/sass.py says what a packed loop is and which loads are in flight.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

from bench import ROOT
from bench.machine_code import __main__, sass
from bench.machine_code.__main__ import PACKAGES, table
from bench.machine_code.kernels import OBJECTS, SHARED_KIB, Kernel, compiled, compiler_version, cuobjdump, kernels
from npc_ext.kernels import build, compilers

from ..kernels.imitations import needs_nvcc

needs_cuobjdump = pytest.mark.skipif(
    cuobjdump() is None, reason=f"there is no cuobjdump with nvdisasm (pip install {PACKAGES})"
)


@dataclass(frozen=True)
class Least:
    """What a kernel must have: loads in flight in so many of its packed loops, and what that takes a multiprocessor.

    More than `instructions` for each KiB take more than half as long as the memory of an H200.
    """

    loads: int
    loops: int = 1
    blocks: int = 2
    kib: int = 64
    instructions: int = 111


# The first name that fits counts. A batch is four packs of importance's n and dL/dn and of the update's value and
# gradient, two with momentum, and one or two of what the other updates have beside these: two moments, stiffness,
# anchor and path, or C. Updates have a loop for parameters of neurons, and one for others.
PACKED = {
    r"importance_kernel<.*\bPack<.*>": Least(loads=8),
    r"update_kernel<\w+, momentum\b.*": Least(loads=6, loops=2),
    r"update_kernel\b.*": Least(loads=8, loops=2),
    r"adam_update_kernel<float\b.*": Least(loads=8, loops=2),
    r"adam_update_kernel\b.*": Least(loads=6, loops=2),
    r"anchored_update_kernel\b.*": Least(loads=12),
    r"connection_update_kernel\b.*": Least(loads=8, loops=6),  # for each of three types: a sum, and the update
    r"step_kernel\b.*": Least(loads=6, loops=12),  # for each of three types: importance by rows, by columns, the update
}
NOT_PACKED = {
    r"importance_kernel<.*\bSingle<.*>": "for tensors that do not lie on 16 bytes",
    r"wide_average_kernel": "of one number a neuron, most of it out of the cache",
}


def faults(kernel: Kernel, least: Least) -> list[str]:
    """A sentence for each rule that a kernel's machine code breaks."""
    found = []
    if kernel.spills or kernel.stack:
        found.append(f"{kernel.spills} accesses to spilled registers, and {kernel.stack} bytes of stack")
    for loop in kernel.loops:
        if loop.narrow:
            first = ", ".join(f"{instruction.opcode} at 0x{instruction.address:04x}" for instruction in loop.narrow[:4])
            found.append(f"{len(loop.narrow)} accesses of less than 16 bytes in a packed loop: {first}")
    deep = [loop for loop in kernel.loops if loop.loads_in_flight >= least.loads]
    if len(deep) < least.loops:
        depths = [loop.loads_in_flight for loop in kernel.loops]
        found.append(f"loads in flight in packed loops: {depths}; wanted {least.loads} in {least.loops} of them")
    if kernel.blocks < least.blocks:
        found.append(f"{kernel.registers} registers leave {kernel.blocks} blocks; wanted {least.blocks}")
    if kernel.instructions_per_kib > least.instructions:
        found.append(f"{kernel.instructions_per_kib:.0f} instructions a KiB; wanted at most {least.instructions}")
    if kernel.kib_in_flight < least.kib:
        found.append(f"{kernel.kib_in_flight} KiB in flight a multiprocessor; wanted {least.kib}")
    return found


def expected(kernel: Kernel) -> Least | None:
    """What is asked of a kernel; None of those that are exempt."""
    if any(re.fullmatch(name, kernel.name) for name in NOT_PACKED):
        return None
    asked = [least for name, least in PACKED.items() if re.fullmatch(name, kernel.name)]
    assert asked, f"say in PACKED what {kernel.name} must have, or in NOT_PACKED why nothing"
    return asked[0]


@lru_cache
def built(arch: str) -> list[Kernel]:
    return kernels(sorted(OBJECTS.glob("cuda_*.o")), arch)


@pytest.mark.slow
@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("arch", SHARED_KIB)
def test_packed_kernels_move_16_bytes_at_a_time_with_enough_loads_in_flight(arch: str) -> None:
    if not built(arch):
        pytest.skip(f"{OBJECTS} has no code for sm_{arch}")
    packed = [(kernel, least) for kernel in built(arch) if (least := expected(kernel))]
    found = [f"{kernel.name}: {fault}" for kernel, least in packed for fault in faults(kernel, least)]
    command = f"python -m bench.machine_code --arch {arch} --loops"
    assert not found, "\n".join([f"on sm_{arch} ({command} shows every loop):", *found])
    names = [kernel.name for kernel in built(arch)]
    unused = [name for name in (*PACKED, *NOT_PACKED) if not any(re.fullmatch(name, kernel) for kernel in names)]
    assert not unused, f"no kernel has such a name: {unused}"


def broken_kernels(tmp_path: Path, file: str, function: str, body: str) -> list[Kernel]:
    """The updates with anchors, for sm_90, from sources in which a function of a header has another body."""
    csrc = tmp_path / "csrc"
    shutil.copytree(build.source_dir(), csrc)
    header = csrc / "cuda" / file
    pattern = rf"(void {function}\([^{{]*\) \{{\n).*?(\n\}}\n)"
    text, count = re.subn(pattern, lambda match: match[1] + body + match[2], header.read_text(), flags=re.DOTALL)
    assert count == 1, f"{file} has {count} functions {function}()"
    header.write_text(text)
    return kernels([compiled(csrc / "cuda" / "anchored.cu", "90", tmp_path)], "90")


# What compilers made of a copy of a struct in larger loops.
IN_PIECES = "  for (int k = 0; k < P::size; ++k) to[k] = pack.at[k];"
# Adds up the numbers one by one, in a chain that the compiler may not shorten.
BUSY = """
  if constexpr (P::size == 1) {
    *to = pack.at[0];
  } else {
    float sum = 0.0f;
    for (int round = 0; round < 40; ++round) {
      for (int k = 0; k < P::size; ++k) sum = sum * 1.5f + to_float(pack.at[k]);
    }
    P changed = pack;
    from_float(sum, changed.at[0]);
    Words words;
    memcpy(&words, &changed, sizeof(words));
    store_16_bytes(to, words);
  }"""
# The condition is never true of numbers, but the machine has to look.
USED_AT_ONCE = """
  if (wanted) words = *static_cast<const Words*>(from);
  asm volatile("{ .reg .pred p; setp.eq.u32 p, %0, 0x7fc12345; @p trap; }" ::"r"(words.at[0]) : "memory");"""


@pytest.mark.slow
@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize(
    ("file", "function", "body", "least", "fault"),
    [
        pytest.param(
            *("packs.h", "store", IN_PIECES, Least(loads=1)),
            r"accesses of less than 16 bytes in a packed loop: STG\.E",
            id="a store that falls apart",
        ),
        pytest.param(
            *("runtime.h", "load_16_bytes_if", USED_AT_ONCE, Least(loads=2)),
            r"loads in flight in packed loops: \[(?:[01], )*1(?:, [01])*\]",
            id="loads that are used one by one",
        ),
        pytest.param(
            "packs.h", "store", BUSY, Least(loads=1), "instructions a KiB; wanted", id="too many instructions"
        ),
    ],
)
def test_worse_machine_code_is_found(
    tmp_path: Path, file: str, function: str, body: str, least: Least, fault: str
) -> None:
    broken = broken_kernels(tmp_path, file, function, body)
    assert broken
    for kernel in broken:
        assert re.search(fault, "\n".join(faults(kernel, least)))


def disassembled(code: str) -> list[sass.Loop]:
    """The packed loops of a program with an instruction a line; `name:` before one is what branches go to."""
    lines = [line.strip() for line in code.strip().splitlines()]
    places = {line.split(":")[0]: f"0x{16 * index:x}" for index, line in enumerate(lines) if ":" in line}
    text = ""
    for index, line in enumerate(lines):
        instruction = re.sub(r"^\w+:\s*|(?<=BRA )\w+$", lambda match: places.get(match[0], ""), line)
        text += f"        /*{16 * index:04x}*/                   {instruction} ;    /* 0x0 */\n"
    return list(sass.packed_loops(list(sass.parse(text))))


def test_loads_count_until_one_of_them_is_used() -> None:
    (loop,) = disassembled("""
        again: LDG.E.128 R4, desc[UR4][R2.64]
        LDG.E.128 R8, desc[UR4][R2.64+0x10]
        FADD R20, R4, R5
        LDG.E.128.CONSTANT R12, desc[UR4][R2.64+0x20]
        FADD R20, R20, R11
        FADD R20, R20, R12
        @P0 BRA again
        EXIT
    """)
    assert (loop.loads_in_flight, len(loop.wide), loop.narrow) == (2, 3, ())


def test_what_an_iteration_loads_for_the_next_one_is_in_flight() -> None:
    (loop,) = disassembled("""
        again: FADD R20, R4, R8
        LDG.E.128 R4, desc[UR4][R2.64]
        LDG.E.128 R8, desc[UR4][R2.64+0x10]
        LDG.E.128 R12, desc[UR4][R2.64+0x20]
        FADD R20, R20, R16
        LDG.E.128 R16, desc[UR4][R2.64+0x30]
        @P0 BRA again
        EXIT
    """)
    assert loop.loads_in_flight == 4


def test_loads_on_two_ways_of_which_one_is_taken_do_not_add_up() -> None:
    (loop,) = disassembled("""
        again: @P1 BRA other
        LDG.E.128 R4, desc[UR4][R2.64]
        BRA join
        other: LDG.E.128 R8, desc[UR4][R2.64]
        LDG.E.128 R12, desc[UR4][R2.64]
        join: FADD R20, R8, R4
        FADD R20, R20, R12
        @P0 BRA again
        EXIT
    """)
    assert loop.loads_in_flight == 2


def test_the_main_path_has_the_most_accesses_and_of_these_the_fewest_instructions() -> None:
    (loop,) = disassembled("""
        again: LDG.E.128 R4, desc[UR4][R2.64]
        @P1 BRA skip
        @P2 BRA short
        FADD R20, R4, R5
        FADD R20, R20, R6
        short: STG.E.128 desc[UR4][R2.64], R4
        skip: IADD3 R2, R2, 0x10, RZ
        @P0 BRA again
        EXIT
    """)
    assert (loop.accesses, loop.instructions) == (2, 6)  # without the two FADD, but not past the store


def test_the_main_path_may_go_through_blocks_in_any_order() -> None:
    (loop,) = disassembled("""
        BRA head
        middle: STG.E.128 desc[UR4][R2.64], R4
        @P0 BRA head
        EXIT
        head: LDG.E.128 R4, desc[UR4][R2.64]
        BRA far
        tail: FADD R20, R4, R5
        BRA middle
        far: FADD R20, R4, R6
        BRA tail
    """)
    assert (loop.accesses, loop.instructions) == (2, 8)


def test_a_kernel_without_packed_loops_is_found() -> None:
    found = faults(Kernel("", "90", 32, 0, 0, 0, 0, ()), Least(loads=1))
    assert "loads in flight in packed loops: []; wanted 1 in 1 of them" in found


def test_a_loop_without_wide_accesses_is_none_of_the_packed_ones_and_a_loop_owns_only_what_is_in_no_other() -> None:
    (loop,) = disassembled("""
        outer: LDG.E R3, desc[UR4][R2.64]
        inner: LDG.E.128 R4, desc[UR4][R2.64]
        STG.E.64 desc[UR4][R2.64], R4
        STG.E.U16 desc[UR4][R2.64], R6
        LDS R10, [R11]
        @P0 BRA inner
        STG.E desc[UR4][R2.64], R3
        @P1 BRA outer
        tail: LDG.E R3, desc[UR4][R2.64]
        STG.E desc[UR4][R2.64], R3
        @P2 BRA tail
        EXIT
    """)
    assert [instruction.opcode for instruction in loop.narrow] == ["STG.E.64", "STG.E.U16"]
    assert (loop.first, loop.last) == (0x10, 0x50)


def test_blocks_of_a_multiprocessor_follow_from_registers_and_shared_memory() -> None:
    def blocks(registers: int, shared: int, arch: str = "90") -> int:
        return Kernel("", arch, registers, 0, shared, 0, 0, ()).blocks

    assert [blocks(registers, 0) for registers in (32, 40, 64, 65, 80, 81, 128, 129)] == [8, 6, 4, 3, 3, 2, 2, 1]
    assert [blocks(32, 48 * 1024, arch) for arch in ("80", "90")] == [3, 4]
    assert blocks(32, 56 * 1024) == 4, "228 KiB hold four times 56 KiB and 1 KiB for the system"


PAGE = ROOT / "docs" / "development" / "machine-code.md"


@pytest.mark.slow
@needs_nvcc
@needs_cuobjdump
def test_the_page_about_kernels_shows_this_machine_code() -> None:
    page = PAGE.read_text()
    named = re.search(r"Compiled for sm_90 by (nvcc [\d.]+)\.", page)
    assert named
    if named[1] != compiler_version():
        pytest.skip(f"the page was made with {named[1]}, and this is {compiler_version()}")
    if not built("90"):
        pytest.skip(f"{OBJECTS} has no code for sm_90")
    assert table(built("90")) in page, (
        "put what `python -m bench.machine_code` prints into docs/development/machine-code.md"
    )


def test_what_is_missing_is_named_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(__main__, "cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(__main__, "OBJECTS", tmp_path)
    monkeypatch.setattr(compilers, "why_no_nvcc", lambda: "no nvcc was found")
    source = tmp_path / "kernel.cu"
    source.touch()
    for arguments, said in (
        ([], f"{tmp_path} has no objects of CUDA kernels; name a .cu file, or build with nvcc: "),
        ([str(source)], "a .cu file cannot be compiled: no nvcc was found"),
    ):
        with pytest.raises(SystemExit):
            __main__.main(arguments)
        assert said in capsys.readouterr().err
