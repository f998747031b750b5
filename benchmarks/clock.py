"""Measures the processor's clock while it runs, with a chain of dependent multiplications.

A 32-bit `imul` takes 3 cycles on every x86 core since 2008, the small ones too (a 64-bit one takes 5 there), and each
waits for the one before. Dependent additions would not do: Golden Cove renames an addition of an immediate away. The
time of a chain is its length times three over the clock. Other processors are not supported: the latency of their
multiplication differs from core to core (3 to 5 cycles on Arm).

    python benchmarks/clock.py
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

CYCLES = 3
UNROLL = 64
SOURCE = f"""
extern "C" unsigned chain(unsigned x, long turns) {{
    for (; turns > 0; --turns)
        asm volatile(".rept {UNROLL}\\n\\timul %0, %0\\n\\t.endr" : "+r"(x));
    return x;
}}
"""


def supported() -> bool:
    """Whether this machine's clock can be measured: x86-64 and a compiler."""
    return platform.machine() in ("x86_64", "AMD64") and shutil.which("g++") is not None


@cache
def _chain() -> ctypes._NamedFuncPointer:
    """The compiled chain; the library is kept in the temporary directory for later processes of the same user."""
    name = f"tcompress-clock-{os.getuid()}-{hashlib.sha256(SOURCE.encode()).hexdigest()[:16]}.so"
    path = Path(tempfile.gettempdir()) / name
    if not path.exists() or path.lstat().st_uid != os.getuid():
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder) / "clock.cpp", Path(folder) / "clock.so"
            source.write_text(SOURCE)
            command = ["g++", "-O2", "-shared", "-fPIC", str(source), "-o", str(library)]
            subprocess.run(command, check=True, capture_output=True)
            own = path.with_suffix(f".{os.getpid()}")
            shutil.copy(library, own)
            own.replace(path)
    function = ctypes.CDLL(str(path)).chain
    function.argtypes, function.restype = (ctypes.c_uint, ctypes.c_long), ctypes.c_uint
    return function


def _one_core(turns: int, repeats: int) -> float:
    """GHz: the fastest repeat, because an interruption can only lengthen one."""
    chain = _chain()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        chain(3, turns)
        seconds.append(time.perf_counter() - start)
    return turns * UNROLL * CYCLES / min(seconds) / 1e9


def measure(threads: int = 1, turns: int = 20_000, repeats: int = 5) -> float | None:
    """The clock in GHz with so many threads busy at once, the median over them; None where it is not `supported`.

    The default takes about 5 ms: shorter than the steps in which a processor changes its clock, so that a measurement
    right after a computation still finds the clock of that computation.
    """
    if not supported():
        return None
    _chain()
    with ThreadPoolExecutor(threads) as pool:
        return statistics.median(pool.map(lambda _: _one_core(turns, repeats), range(threads)))


if __name__ == "__main__":
    import torch

    ghz = measure(torch.get_num_threads())
    print("not supported on this machine" if ghz is None else f"{ghz:.2f} GHz, {torch.get_num_threads()} threads busy")
