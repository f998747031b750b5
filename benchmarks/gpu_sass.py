"""Machine code of NVIDIA GPUs (SASS), read from a cubin by the tools that Triton ships: what a kernel takes of the
machine, and what its hottest loop issues.

The hot loop is a backward branch with what lies before it down to its target; of all loops the one with the most matrix
instructions, of several with as many the shortest: of attention's two, that without masks. Where no loop has any, the
longest.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

#: Which instructions make up a line of the mix; an opcode is listed by how it begins, the first hit counts.
CATEGORIES = {
    "mma": ("HMMA", "IMMA", "HGMMA", "IGMMA", "QGMMA", "DMMA"),
    "exp2": ("MUFU",),
    "async copy": ("LDGSTS", "UTMALDG", "UBLKCP"),
    "shared": ("LDSM", "LDS", "STSM", "STS"),
    "spill": ("LDL", "STL"),
    "wait": ("BAR", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "SYNCS", "WARPGROUP", "ARRIVES", "NOP", "YIELD", "FENCE"),
    "global": ("LDG", "STG", "RED", "ATOM", "LD.", "ST."),
    "convert": ("F2F", "I2F", "F2I", "FRND"),
    "float": ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "FSET", "HADD", "HMUL", "HFMA", "FCHK", "HMNMX"),
    "shuffle": ("SHFL", "REDUX", "VOTE"),
    "move": ("MOV", "IMAD.MOV", "PRMT", "UMOV", "S2R", "S2UR", "R2UR", "CS2R"),
    "branch": ("BRA", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "BREAK"),
}
#: What is left: address arithmetic, predicates, bits; on the 32-bit integer units, those of the warp among them.
INTEGER = "integer"


@dataclass(frozen=True)
class Loop:
    """Of the hottest loop: instructions, how many of each category, and the work of its matrix instructions in units
    of those of 8.x, of 16 by 8 results a warp: an instruction of 9.0 does that of many."""

    instructions: int
    mix: dict[str, int]
    mma_units: int

    @property
    def mma_share(self) -> float:
        """Matrix instructions among those issued."""
        return self.mix.get("mma", 0) / self.instructions

    @property
    def mma_unit_share(self) -> float:
        """The same as if every unit were an instruction: on 8.x the same number, on 9.0 one to compare with it."""
        others = self.instructions - self.mix.get("mma", 0)
        return self.mma_units / (others + self.mma_units)


@dataclass(frozen=True)
class Machine:
    """What a kernel takes: registers a thread, bytes of stack a thread, of static shared memory, instructions that
    spill registers, and the most threads that its launch bounds allow, if it has any."""

    registers: int
    stack: int
    static_shared: int
    spills: int
    threads: int | None
    hot: Loop | None


def _tool(name: str, *arguments: str) -> str:
    import triton  # the tools lie in its package; importing this file needs none

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


def inspect(cubin: bytes) -> dict[str, Machine]:
    """Of every kernel in a cubin, by its name in the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
        attributes = _tool("cuobjdump", "-elf", file.name)
    sections = re.split(r"^\s*\.section\s+\.text\.", code, flags=re.M)[1:]
    texts = {re.match(r"[^,\s]+", s)[0]: s for s in sections}  # type: ignore[index]
    threads = {}
    for info in re.split(r"^\.nv\.info\.", attributes, flags=re.M)[1:]:
        if bound := re.search(r"EIATTR_MAX_THREADS\s.*?Value:\s*0x([0-9a-f]+) 0x([0-9a-f]+) 0x([0-9a-f]+)", info, re.S):
            threads[info.split()[0]] = int(bound[1], 16) * int(bound[2], 16) * int(bound[3], 16)
    found = {}
    for name, line in re.findall(r"Function (\S+?):\s*\n?\s*(REG:.*)", usage):
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", line)}
        opcodes, loops = parse(texts[name])
        spills = sum(o.startswith(CATEGORIES["spill"]) for o in opcodes)
        found[name] = Machine(
            used["REG"], used["STACK"], used["SHARED"], spills, threads.get(name), hottest(opcodes, loops)
        )
    return found


def parse(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Opcodes of nvdisasm's listing, without predicates and operands, and its loops: (first, last) instruction."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        if instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
            if instruction[1].startswith("BRA") and (target := re.search(r"\.L_x_\d+", instruction[2])):
                branches.append((len(opcodes), target[0]))
            opcodes.append(instruction[1])
    loops = [(labels[t], at) for at, t in branches if labels.get(t, at) < at]  # a branch to itself ends the code
    return opcodes, loops


def hottest(opcodes: list[str], loops: list[tuple[int, int]]) -> Loop | None:
    """See the head of this file."""
    found = [_loop(opcodes[first : last + 1]) for first, last in loops]
    if any(loop.mma_units for loop in found):
        return max(found, key=lambda loop: (loop.mma_units, -loop.instructions))
    return max(found, key=lambda loop: loop.instructions, default=None)


def _loop(body: list[str]) -> Loop:
    mix = Counter(category(o) for o in body)
    return Loop(len(body), dict(sorted(mix.items())), sum(mma_units(o) for o in body))


def category(opcode: str) -> str:
    for name, beginnings in CATEGORIES.items():
        if opcode.startswith(beginnings):
            return name
    return INTEGER


def mma_units(opcode: str) -> int:
    """Products of 16 x 8 x 32 bytes that a warp's part of the instruction makes.

    HMMA.16816 (16-bit floats) and IMMA.16832 (bytes) make one; HMMA.1688 and IMMA.16816 a half, counted as one. A
    warpgroup's HGMMA.64xNx16 and IGMMA.64xNx32 give each of its four warps 16 x N.
    """
    if category(opcode) != "mma":
        return 0
    if shape := re.search(r"GMMA\.64x(\d+)x\d+", opcode):
        return int(shape[1]) // 8
    return 1
