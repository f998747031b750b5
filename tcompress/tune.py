"""Which kernel layout a weight with zeros runs in: measured on this machine, the dense one among the candidates.

A measurement is kept by layer size, layout, density, CPU path, threads, processor and version, in
`$XDG_CACHE_HOME/tcompress/tune.json` (`~/.cache` by default): layers alike are measured once. `TCOMPRESS_TUNE=0`
measures nothing and takes a stored model of costs; what was measured before is then not looked at either.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops.sparse_prepack import LAYOUTS, WORD, blocks_of
from tcompress.ops.sparse_two_four import TWO_FOUR
from tcompress.sparse_kernel import DENSE, SparseKernel

#: A sparse layout must be this much faster than the dense one to be taken: less is noise.
MARGIN = 0.97
ROUNDS = 7
ROUND_SECONDS = 0.004
#: A median call so many times as long as the fastest one: another process has the processor, and nothing is kept.
BUSY = 3.0


@dataclass(frozen=True)
class Choice:
    """A layout and why it was taken.

    Attributes:
        kernel: the choice.
        tokens: for how many tokens.
        seconds: of each candidate, by layout.
        source: "measured", "measured on a busy machine" (and not kept), "cached" (measured before), "model"
            (TCOMPRESS_TUNE=0), or "the only one".
    """

    kernel: SparseKernel
    tokens: int
    seconds: dict[str, float]
    source: str

    @property
    def speedup(self) -> float:
        """Of the choice over the dense layout; 1 if it is the dense one."""
        if self.kernel.layout == DENSE:
            return 1.0
        return self.seconds[DENSE] / self.seconds[self.kernel.layout]


def choose(weight: torch.Tensor, kernels: Sequence[SparseKernel], tokens: int = 128) -> Choice:
    """The fastest of some kernels for a weight.

    Args:
        weight: [N, K], float32 or int8, as the kernels take it.
        kernels: candidates, the dense one among them (`sparse_kernel.kernels_for`).
        tokens: M, the number of rows of x that counts.

    Raises:
        ValueError: fewer than one token.
    """
    if tokens < 1:
        raise ValueError(message("tune", "tokens", tokens, "at least 1"))
    tuning = os.environ.get("TCOMPRESS_TUNE", "1") != "0"
    keys = {kernel.layout: _key(weight, kernel, tokens) for kernel in kernels}
    known = _read() if tuning else {}
    if len(kernels) == 1:
        seconds, source = {kernels[0].layout: 0.0}, "the only one"
    elif not tuning:
        seconds, source = {kernel.layout: model_seconds(weight, kernel, tokens) for kernel in kernels}, "model"
    elif all(key in known for key in keys.values()):
        seconds, source = {layout: known[key] for layout, key in keys.items()}, "cached"
    else:
        seconds, busy = measure(weight, kernels, tokens)
        source = "measured on a busy machine" if busy else "measured"
        if not busy:
            _write({keys[layout]: value for layout, value in seconds.items()})
    best = min(kernels, key=lambda kernel: seconds[kernel.layout] * (MARGIN if kernel.layout == DENSE else 1))
    return Choice(best, tokens, seconds, source)


def measure(weight: torch.Tensor, kernels: Sequence[SparseKernel], tokens: int) -> tuple[dict[str, float], bool]:
    """Seconds of the fastest call of each kernel, in turns, and whether another process was in the way.

    The fastest, because a thread that loses its core makes a call hundreds of times as long.
    """
    n, k = weight.shape
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(0))
    scale = None if weight.dtype == torch.float32 else torch.full((n,), 0.01)
    packed = {kernel.layout: kernel.prepack(weight) for kernel in kernels}
    times: dict[str, list[float]] = {kernel.layout: [] for kernel in kernels}
    with torch.inference_mode():
        for warm_up in (True, *[False] * ROUNDS):
            for kernel in kernels:
                calls: list[float] = []
                while not calls or sum(calls) < ROUND_SECONDS:
                    start = time.perf_counter()
                    kernel(x, packed[kernel.layout], n, scale, None, "none", None)
                    calls.append(time.perf_counter() - start)
                if not warm_up:
                    times[kernel.layout] += calls
    fastest = {layout: min(values) for layout, values in times.items()}
    return fastest, any(statistics.median(values) > BUSY * fastest[layout] for layout, values in times.items())


#: Nanoseconds by path and layout, of one core: (a token's input or output, a kept unit and token, a word of a block row
#: and 64 tokens); a unit is one float or four int8. Fitted to measurements at 128 tokens; see docs/design/008.
COSTS: dict[str, dict[str, tuple[float, float, float]]] = {
    "avx2": {
        "float dense": (0.0, 0.018, 0.0),
        "unstructured": (0.5, 0.042, 14.0),
        "8x4 float": (0.4, 0.037, 8.0),
        "int8 dense": (0.3, 0.054, 0.0),
        "1x4": (0.7, 0.065, 20.0),
        "8x4": (0.6, 0.060, 14.0),
    },
    "avx512vnni": {
        "float dense": (0.0, 0.016, 0.0),
        "unstructured": (0.5, 0.024, 12.0),
        "8x4 float": (0.4, 0.020, 8.0),
        "int8 dense": (0.3, 0.018, 0.0),
        "1x4": (0.5, 0.030, 10.0),
        "8x4": (0.5, 0.022, 8.0),
    },
}
#: Time of 2:4 weights against that of the dense layout (docs/design/009).
TWO_FOUR_COST = {"avx2": 0.75, "avxvnni": 0.75}
COSTS["amx"] = COSTS["avx512vnni"] | {"int8 dense": (0.3, 0.006, 0.0), "8x4": (0.5, 0.010, 8.0)}


def model_seconds(weight: torch.Tensor, kernel: SparseKernel, tokens: int) -> float:
    """What the stored model of costs says; it knows the order of the layouts rather than this machine's speed."""
    n, k = weight.shape
    integers = weight.dtype == torch.int8
    table = COSTS.get(backend.cpu_path() or "", COSTS["avx2"])
    if kernel.layout == DENSE:
        name, kept, words = ("int8" if integers else "float") + " dense", n * k / (4 if integers else 1), 0.0
    elif kernel.layout == TWO_FOUR:
        name, kept, words = "int8 dense", n * k / 4 * TWO_FOUR_COST.get(backend.cpu_path() or "", 1.5), 0.0
    else:
        rows = LAYOUTS[weight.dtype][kernel.layout]
        blocks = (blocks_of(weight, rows) != 0).any(-1)
        kept, words = float(blocks.sum()) * rows, blocks.shape[0] * -(-blocks.shape[1] // WORD)
        name = "8x4 float" if kernel.layout == "8x4" and not integers else kernel.layout
    element, unit, word = table[name]
    cores = max(min(torch.get_num_threads(), os.cpu_count() or 1), 1)
    return (tokens * (n + k) * element + kept * tokens * unit + words * -(-tokens // 64) * word) * 1e-9 / cores


def _key(weight: torch.Tensor, kernel: SparseKernel, tokens: int) -> str:
    """Density in steps of one part in fifty: layers of one pruned model differ by less."""
    n, k = weight.shape
    density = 1.0
    if kernel.layout in LAYOUTS[weight.dtype]:
        kept = (blocks_of(weight, LAYOUTS[weight.dtype][kernel.layout]) != 0).any(-1)
        density = round(float(kept.float().mean()) * 50) / 50 if kept.numel() else 0.0
    scheme = kernel.scheme.name if kernel.scheme else "float32"
    what = f"{scheme} {kernel.layout} {tokens}x{k}x{n} {density:.2f}"
    return f"{what} | {backend.cpu_path()} {torch.get_num_threads()} threads | {_machine()}"


@cache
def _machine() -> str:
    """Processor and versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        name = next((v.strip() for key, v in fields.items() if key.strip() == "model name"), name)
    try:
        own = version("tcompress")
    except PackageNotFoundError:  # run from a source tree
        own = "source"
    return f"{name}, tcompress {own}, torch {torch.__version__}"


def cache_file() -> Path:
    """Where measurements are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tcompress" / "tune.json"


def _read() -> dict[str, float]:
    """What is known; a file that is damaged, or another program's, holds nothing: it is only a cache."""
    try:
        content = json.loads(cache_file().read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home folder, or lists in lists without end
        return {}
    if not isinstance(content, dict):
        return {}
    return {k: v for k, v in content.items() if isinstance(v, float) and 0 < v < math.inf}


def _write(new: dict[str, float]) -> None:
    """Adds measurements; a folder that cannot be written is no reason to fail."""
    temporary = None
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            json.dump(_read() | new, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
        temporary = None
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
