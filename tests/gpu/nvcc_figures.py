"""What nvcc says about a kernel without a GPU: registers, spills, stack, and the instructions of its loops."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

CUDA = Path(__file__).parent.parent.parent / "csrc" / "cuda"


@dataclass(frozen=True)
class Figures:
    """Of one kernel, as ptxas -v prints them; bytes."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


@dataclass(frozen=True)
class Loop:
    """Instructions between a label and the branch back to it, none twice."""

    mix: Counter[str]

    @property
    def instructions(self) -> int:
        return sum(self.mix.values())

    @property
    def mma(self) -> int:
        return sum(count for name, count in self.mix.items() if "MMA" in name)

    @property
    def mma_share(self) -> float:
        return self.mma / self.instructions


def nvdisasm() -> str | None:
    """The one that Triton ships."""
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "nvdisasm"
    return str(path) if path.exists() else None


@dataclass(frozen=True)
class Built:
    """What nvcc made of a source: files, and what ptxas said."""

    ptx: Path
    cubin: Path
    log: str

    def figures(self) -> dict[str, Figures]:
        """By kernel (its mangled name)."""
        pattern = (
            r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers"
        )
        found = re.findall(pattern, self.log, flags=re.S)
        return {name: Figures(int(used), int(stack), int(st), int(ld)) for name, stack, st, ld, used in found}


def build(nvcc: str, source: str, architecture: int, flags: list[str]) -> Built:
    """csrc/cuda/`source`.cu; kept in the user's temporary folder until a file of csrc/cuda changes, so that one
    compilation serves the tests of the PTX and those of the machine code. A second process waits for the first."""
    command = [nvcc, *flags, f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", "--keep"]
    inputs = sorted([*CUDA.iterdir(), *(CUDA.parent / "cpu").glob("*_kind.h")])
    key = hashlib.sha256(b"".join(p.read_bytes() for p in inputs) + " ".join(command).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"tcompress-nvcc-{os.getuid()}" / f"{source}_{key}"
    folder.mkdir(parents=True, exist_ok=True)
    log, cubin = folder / "ptxas.log", folder / f"{source}.cubin"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            made = [*command, "--keep-dir", str(folder), "-o", str(cubin), str(CUDA / f"{source}.cu")]
            done = subprocess.run(made, capture_output=True, text=True, check=True)
            part = log.with_suffix(".part")
            part.write_text(done.stderr)
            part.replace(log)
    return Built(folder / f"{source}.ptx", cubin, log.read_text())


def loops(disassembler: str, cubin: Path) -> dict[str, list[Loop]]:
    """The innermost loops with matrix instructions, by kernel, in the order of the code."""
    text = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    result: dict[str, list[Loop]] = {}
    for section in re.split(r"\n(?=\.text\.)", text):
        named = re.match(r"\.text\.(\S+):", section)
        if named:
            result[named.group(1)] = _loops_of(section)
    return result


def _loops_of(section: str) -> list[Loop]:
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in section.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if label:
            labels[label.group(1)] = len(code)
        elif instruction:
            code.append(instruction.group(1))
    ranges = []
    for end, instruction in enumerate(code):
        branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction)
        if branch and labels.get(branch.group(1), end + 1) <= end:
            ranges.append((labels[branch.group(1)], end + 1))
    inner = [r for r in ranges if not any(o != r and r[0] <= o[0] and o[1] <= r[1] for o in ranges)]
    found = [Loop(Counter(_name(line) for line in code[start:end])) for start, end in inner]
    return [loop for loop in found if loop.mma]


def _name(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]
