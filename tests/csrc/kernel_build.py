"""Compiles C++ tests together with the torch-free kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CPU = HERE.parent.parent / "csrc" / "cpu"
KERNELS = sorted(CPU.glob("*.cpp"))
KERNELS_TEST = [
    HERE / f"{name}.cpp"
    for name in (
        "kernels_test",
        "int4_kernels",
        "int4_sparse_kernels",
        "attention_kernels",
        "sparse_kernels",
        "two_four_kernels",
    )
]
FLAGS = ["-std=c++17", "-O2", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-w"]


def host_compiler() -> str:
    compiler = shutil.which("g++")
    assert compiler, "the extension could not have been built without it"
    return compiler


def compile_all(compiler: str, sources: Sequence[Path], flags: Sequence[str], folder: Path) -> list[str]:
    """Object files of `sources` in `folder`, one compiler process a processor; `flags` come before the folder of the
    kernels' headers."""
    folder.mkdir(exist_ok=True)
    targets = [str(folder / f"{source.stem}.o") for source in sources]

    def compile_one(source: Path, target: str) -> None:
        subprocess.run([compiler, *flags, "-I", str(CPU), "-c", str(source), "-o", target], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, targets))
    return targets


def link(compiler: str, objects: Sequence[str], flags: Sequence[str], program: Path) -> str:
    subprocess.run([compiler, *flags, *objects, "-o", str(program)], check=True)
    return str(program)
