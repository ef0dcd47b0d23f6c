"""Loops in NVIDIA's machine code (SASS), as cuobjdump prints it, and their loads in flight.

* A loop is *packed* if it has global accesses of 16 bytes. All its global accesses should be that wide. Accesses of an
  inner loop belong to the inner loop only.
* The *loads in flight* of a loop are the most 16-byte loads that a thread has outstanding at once on any path through
  the loop's body. A load is outstanding until its result, or the result of a later load, is used. Loads for the next
  iteration count, too.
* The *main path* of a loop is the way through its body with the most 16-byte accesses, and of these the one with the
  fewest instructions: what a warp executes away from the ends of arrays. An inner loop counts once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Instruction:
    """One instruction. `registers` are all registers that it names; `target` is the address that it may jump to."""

    address: int
    text: str
    opcode: str
    registers: frozenset[str]
    target: int | None

    @property
    def kind(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a thread reads from or writes to global memory; 0 if this is not a global access."""
        if self.kind not in ("LDG", "STG", "LDGSTS", "LD", "ST"):
            return 0
        found = re.search(r"\.[US]?(8|16|64|128|256)(\.|$)", self.opcode)
        return int(found[1]) // 8 if found else 4

    @property
    def is_wide_load(self) -> bool:
        return self.width >= 16 and self.opcode.startswith("LD")


@dataclass(frozen=True)
class Loop:
    """A packed loop: its first and last address, its loads in flight, and its wide and narrow accesses.

    `accesses` and `instructions` are those of the main path.
    """

    first: int
    last: int
    loads_in_flight: int
    accesses: int
    instructions: int
    wide: tuple[Instruction, ...]
    narrow: tuple[Instruction, ...]

    def __str__(self) -> str:
        counts = Counter(instruction.opcode for instruction in (*self.wide, *self.narrow))
        accesses = ", ".join(f"{count} {opcode}" for opcode, count in sorted(counts.items()))
        return (
            f"0x{self.first:04x} to 0x{self.last:04x}: {self.loads_in_flight} loads in flight; {accesses}; "
            f"{self.instructions} instructions on the main path, of which {self.accesses} access 16 bytes"
        )


def parse(code: str) -> Iterator[Instruction]:
    """The instructions of a disassembled function."""
    for found in re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", code, re.MULTILINE):
        text = re.sub(r"^@!?U?P[0-9T]+\s+", "", found[2])
        opcode = text.split()[0]
        jump = re.match(r"(BRA|BRX|JMP|CALL|BSSY|WARPSYNC\.COLLECTIVE)\b", opcode)
        targets = re.findall(r"\b0x[0-9a-f]+", text) if jump else []
        yield Instruction(
            int(found[1], 16),
            found[2],
            opcode,
            frozenset(re.findall(r"\bR\d+\b", text)),
            int(targets[-1], 16) if targets else None,
        )


@dataclass
class Block:
    """Instructions that run one after the other, and the indices of the blocks that may follow."""

    instructions: list[Instruction]
    followers: list[int]


def blocks_of(instructions: Sequence[Instruction]) -> tuple[list[Block], list[int]]:
    """The basic blocks in order of their addresses, and the indices of those where the kernel or a call enters."""
    leaders = {instructions[0].address}
    for instruction, following in pairwise(instructions):
        if instruction.target is not None and not instruction.opcode.startswith("BSSY"):
            leaders.add(instruction.target)
        if re.match(r"(BRA|BRX|JMP|EXIT|RET|CALL)\b", instruction.opcode):
            leaders.add(following.address)
    blocks: list[Block] = []
    for instruction in instructions:
        if instruction.address in leaders:
            blocks.append(Block([], []))
        blocks[-1].instructions.append(instruction)
    number = {block.instructions[0].address: index for index, block in enumerate(blocks)}
    entries = [0]
    for index, block in enumerate(blocks):
        last = block.instructions[-1]
        if last.opcode.startswith("CALL"):
            entries += [number[last.target]] if last.target in number else []
        elif last.opcode.startswith(("BRA", "JMP", "WARPSYNC")) and last.target in number:
            block.followers.append(number[last.target])
        ends = re.fullmatch(r"(?:BRA(?:\.U)? 0x\w+|BRX\b.*|JMP 0x\w+|EXIT|RET\b.*)", last.text)
        if not ends and index + 1 < len(blocks):
            block.followers.append(index + 1)
    return blocks, entries


def natural_loops(blocks: Sequence[Block], entries: Sequence[int]) -> dict[int, set[int]]:
    """The blocks of each loop, by its head. A branch back to a block that dominates it, the head, closes a loop."""
    before: list[list[int]] = [[] for _ in blocks]
    for index, block in enumerate(blocks):
        for follower in block.followers:
            before[follower].append(index)
    # Sets of blocks are the bits of a number. A block that cannot be reached is dominated by all.
    everything = (1 << len(blocks)) - 1
    dominators = [everything] * len(blocks)
    changed = True
    while changed:
        changed = False
        for index in range(len(blocks)):
            common = 0 if index in entries else everything
            for earlier in before[index]:
                common &= dominators[earlier]
            common |= 1 << index
            changed |= common != dominators[index]
            dominators[index] = common
    loops: dict[int, set[int]] = {}
    for index, block in enumerate(blocks):
        for head in block.followers:
            if dominators[index] >> head & 1 and dominators[index] != everything:
                inside, waiting = loops.setdefault(head, {head}), [index]
                while waiting:
                    if (one := waiting.pop()) not in inside:
                        inside.add(one)
                        waiting += before[one]
    return loops


def most_in_flight(blocks: Sequence[Block], loop: set[int]) -> int:
    """The most 16-byte loads in flight on a path through a loop. Where paths meet, the one with more loads counts."""
    most = 0
    after: dict[int, list[frozenset[str]]] = {}  # for each block: the registers of each load in flight
    for _ in range(2):  # the second time with the loads that an iteration leaves in flight
        for index in sorted(loop):
            before = [after[block] for block in loop if index in blocks[block].followers and block in after]
            flying = max(before, key=lambda some: len(some), default=[])
            for instruction in blocks[index].instructions:
                # The load that is used has arrived, and so have all loads before it.
                used = [place for place, registers in enumerate(flying) if registers & instruction.registers]
                if used:
                    flying = flying[used[-1] + 1 :]
                if instruction.opcode.startswith("DEPBAR"):  # waits for loads to shared memory
                    flying = [registers for registers in flying if registers]
                if instruction.is_wide_load:
                    flying = [*flying, *loaded(instruction)]
                most = max(most, len(flying))
            after[index] = flying
    return most


def main_path(blocks: Sequence[Block], head: int, loop: set[int]) -> tuple[int, int]:
    """The 16-byte accesses and the instructions of a loop's main path."""
    best: dict[int, tuple[int, int]] = {}  # to the end of each block: accesses, and minus instructions
    for index in in_order(blocks, head, loop):
        instructions = blocks[index].instructions
        before = [best[other] for other in best if index in blocks[other].followers]
        accesses, fewest = max(before, default=(0, 0))
        wide = sum(instruction.width >= 16 for instruction in instructions)
        best[index] = accesses + wide, fewest - len(instructions)
    accesses, fewest = max(ways for index, ways in best.items() if head in blocks[index].followers)
    return accesses, -fewest


def in_order(blocks: Sequence[Block], head: int, loop: set[int]) -> list[int]:
    """A loop's blocks from its head on, each after all that come before it on a path without a branch back."""
    seen, reversed_order = {head}, list[int]()
    waiting = [(head, iter(blocks[head].followers))]
    while waiting:
        index, followers = waiting[-1]
        follower = next((one for one in followers if one in loop and one not in seen), None)
        if follower is None:
            reversed_order.append(index)
            waiting.pop()
        else:
            seen.add(follower)
            waiting.append((follower, iter(blocks[follower].followers)))
    return reversed_order[::-1]


def loaded(load: Instruction) -> list[frozenset[str]]:
    """The registers of each 16 bytes that are loaded; empty if they go to shared memory directly."""
    if load.opcode.startswith("LDGSTS"):
        return [frozenset()] * (load.width // 16)
    first = map(int, re.findall(r"\bR(\d+)\b", load.text.split("[")[0]))
    return [frozenset(f"R{register + k}" for k in range(4)) for register in first]


def packed_loops(instructions: Sequence[Instruction]) -> Iterator[Loop]:
    """The packed loops of a kernel, in the order of their addresses."""
    blocks, entries = blocks_of(instructions)
    loops = natural_loops(blocks, entries)
    for head, loop in sorted(loops.items(), key=lambda item: min(item[1])):
        inner = {index for other in loops.values() if other < loop for index in other}
        outside = [instruction for index in sorted(loop - inner) for instruction in blocks[index].instructions]
        wide = tuple(instruction for instruction in outside if instruction.width >= 16)
        if wide:
            narrow = tuple(instruction for instruction in outside if 0 < instruction.width < 16)
            ends = blocks[min(loop)].instructions[0].address, blocks[max(loop)].instructions[-1].address
            yield Loop(*ends, most_in_flight(blocks, loop), *main_path(blocks, head, loop), wide, narrow)
