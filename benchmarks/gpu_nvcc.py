"""Compiles the CUDA C++ kernels of csrc/cuda for a GPU that need not be there."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
#: setup.py's, as far as they change the code.
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr")


def nvcc() -> str | None:
    """The compiler, or None."""
    return shutil.which("nvcc")


def sources(folder: Path = CUDA) -> list[Path]:
    """The files to compile."""
    return sorted(folder.glob("*.cu"))


def compile_source(source: Path, architecture: int) -> bytes:
    """A file's kernels as a cubin.

    Raises:
        subprocess.CalledProcessError: nvcc refuses it; what it says is in `stderr`.
    """
    compiler = nvcc()
    assert compiler is not None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [compiler, "-cubin", f"-arch=sm_{architecture}", *FLAGS, "-o", str(cubin), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return cubin.read_bytes()


def readable(names: list[str]) -> list[str]:
    """Kernels' names without namespaces, types of arguments, and casts."""
    text = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout
    return [_short(line) for line in text.splitlines()]


def _short(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|\(\w+\)", "", name.removeprefix("void "))
    depth = 0
    for at, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            name = name[:at]
            break
    return re.sub(r"\w+::", "", name)
