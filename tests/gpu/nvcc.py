"""nvcc's PTX of a CUDA source, or the reason why there is none."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path


class NvccError(Exception):
    """The message is nvcc's."""


@functools.cache
def compile_ptx(
    source: Path,
    architecture: int = 80,
    defines: tuple[str, ...] = (),
    include: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
) -> str:
    """PTX of `source` for `architecture`; needs no GPU. Raises `NvccError`."""
    command = ["nvcc", f"-arch=sm_{architecture}", "-O3", "-std=c++17", "-ptx", "-o", "/dev/stdout", str(source)]
    command += [*(f"-D{d}" for d in defines), *(f"-I{i}" for i in include), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise NvccError(done.stderr)
    return done.stdout


def missing() -> str | None:
    return None if shutil.which("nvcc") else "nvcc is not installed"
