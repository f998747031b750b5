"""What nvcc says about a kernel without a GPU: registers, spills, stack, and the instructions of its loops."""

from __future__ import annotations

import importlib.util
import re
import subprocess
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


def compile_cubin(nvcc: str, source: str, architecture: int, flags: list[str], folder: Path) -> tuple[Path, dict]:
    """csrc/cuda/`source`.cu to a cubin, and `Figures` by kernel (its mangled name)."""
    cubin = folder / f"{source}_{architecture}.cubin"
    command = [nvcc, *flags, f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", "-o", str(cubin)]
    done = subprocess.run([*command, str(CUDA / f"{source}.cu")], capture_output=True, text=True, check=True)
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, done.stderr, flags=re.S)
    figures = {name: Figures(int(used), int(stack), int(st), int(ld)) for name, stack, st, ld, used in found}
    return cubin, figures


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
