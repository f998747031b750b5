"""Which kernel layout a weight with zeros runs in: measured on this machine, the dense one among the candidates.

A measurement is kept by layer size, candidates, densities, types, CPU path, threads, processor and version, in
`$XDG_CACHE_HOME/tcompress/tune.json` (`~/.cache` by default): layers alike are measured once. `TCOMPRESS_TUNE=0`
measures nothing and takes a stored model of costs; what was measured before is then not looked at either. On a GPU
see `tune_gpu`.
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

from tcompress import backend, tune_gpu
from tcompress.errors import message
from tcompress.ops.sparse_prepack import LAYOUTS, WORD, blocks_of
from tcompress.ops.sparse_two_four import TWO_FOUR
from tcompress.sparse_kernel import DENSE, SparseKernel

#: A sparse layout must be this much faster than the dense one to be taken: less is noise.
MARGIN = 0.97
#: For how many tokens a layout is chosen if nothing else is said.
TOKENS = 128
ROUNDS = 7
ROUND_SECONDS = 0.004
#: A median call so many times as long as the fastest one: another process has the processor, and nothing is kept.
BUSY = 3.0
#: Likewise where other processes took this part of the processors meanwhile.
OTHERS = 0.2
#: On a busy machine, times so far above the model of costs and a call are those of a scheduler; the model is taken.
IMPLAUSIBLE = 8.0
CALL_SECONDS = 5e-5


@dataclass(frozen=True)
class Choice:
    """A layout and why it was taken.

    Attributes:
        kernel: the choice.
        tokens: for how many tokens.
        seconds: of each candidate, by layout.
        source: "measured", "measured on a busy machine" (and not kept), "cached" (measured before), "model"
            (TCOMPRESS_TUNE=0), "model: the machine is too busy to measure", "model: no GPU to measure on", or "the only
            one".
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


def choose(
    weight: torch.Tensor, kernels: Sequence[SparseKernel], tokens: int = TOKENS, dtype: torch.dtype = torch.float32
) -> Choice:
    """The fastest of some kernels for a weight.

    Args:
        weight: [N, K], float32 or int8, as the kernels take it.
        kernels: candidates, the dense one among them (`sparse_kernel.kernels_for`).
        tokens: M, the number of rows of x that counts.
        dtype: of x.

    Raises:
        TypeError: tokens is not an integer. ValueError: fewer than one token.
    """
    if not isinstance(tokens, int):
        raise TypeError(message("tune", "tokens", tokens, "an integer"))
    if tokens < 1:
        raise ValueError(message("tune", "tokens", tokens, "at least 1"))
    tuning = os.environ.get("TCOMPRESS_TUNE", "1") != "0"
    possible = not tune_gpu.concerns(weight, kernels) or tune_gpu.can_measure(weight)
    key = _key(weight, kernels, tokens, dtype) if tuning and possible else ""
    known = _read().get(key, {}) if key else {}
    if len(kernels) == 1:
        seconds, source = {kernels[0].layout: 0.0}, "the only one"
    elif not tuning:
        seconds, source = _model(weight, kernels, tokens, dtype), "model"
    elif not possible:
        seconds, source = _model(weight, kernels, tokens, dtype), "model: no GPU to measure on"
    elif known.keys() == {kernel.layout for kernel in kernels}:
        seconds, source = known, "cached"
    else:
        seconds, busy = measure(weight, kernels, tokens, dtype)
        source = "measured on a busy machine" if busy else "measured"
        if not busy:
            _write({key: seconds})
        elif _implausible(seconds, _model(weight, kernels, tokens, dtype)):
            seconds, source = _model(weight, kernels, tokens, dtype), "model: the machine is too busy to measure"
    best = min(kernels, key=lambda kernel: seconds[kernel.layout] * (MARGIN if kernel.layout == DENSE else 1))
    return Choice(best, tokens, seconds, source)


def measure(
    weight: torch.Tensor, kernels: Sequence[SparseKernel], tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, float], bool]:
    """Seconds of the fastest call of each kernel, in turns, and whether another process was in the way.

    The fastest, because a thread that loses its core makes a call hundreds of times as long.
    """
    if tune_gpu.concerns(weight, kernels):
        return tune_gpu.measure(weight, kernels, tokens, dtype), False
    n, k = weight.shape
    # Types and device in words: a program may have other defaults.
    x = torch.randn(tokens, k, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    x = x.to(dtype)
    scale = None if weight.dtype != torch.int8 else torch.full((n,), 0.01, dtype=torch.float32, device="cpu")
    packed = {kernel.layout: kernel.prepack(weight) for kernel in kernels}
    times: dict[str, list[float]] = {kernel.layout: [] for kernel in kernels}
    before = _processor_seconds()
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
    busy = any(statistics.median(values) > BUSY * fastest[layout] for layout, values in times.items())
    return fastest, busy or _others(before, _processor_seconds()) > OTHERS


def _processor_seconds() -> tuple[float, float, float]:
    """Of all processors together: passed, used by anyone, used by this process. Zeros where that cannot be known."""
    try:
        fields = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return 0.0, 0.0, 0.0
    ticks = os.sysconf("SC_CLK_TCK")
    idle = fields[3] + fields[4]
    own = os.times()
    return sum(fields) / ticks, (sum(fields) - idle) / ticks, own.user + own.system


def _others(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """The part of the processors that other processes used between two `_processor_seconds`."""
    passed, used, own = (b - a for a, b in zip(before, after, strict=True))
    return max(used - own, 0.0) / passed if passed > 0 else 0.0


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
#: Time of 2:4 weights against that of the dense layout where the kernel multiplies them as they lie: unsigned
#: activations and many tokens (docs/design/009). Elsewhere they are unpacked at each call.
TWO_FOUR_COST = {"avx2": 0.75, "avxvnni": 0.75}
TWO_FOUR_TOKENS = 32
UNPACKED_COST = 1.5
COSTS["amx"] = COSTS["avx512vnni"] | {"int8 dense": (0.3, 0.006, 0.0), "8x4": (0.5, 0.010, 8.0)}


def model_seconds(weight: torch.Tensor, kernel: SparseKernel, tokens: int) -> float:
    """What the stored model of costs says; it knows the order of the layouts rather than this machine's speed."""
    n, k = weight.shape
    integers = weight.dtype == torch.int8
    table = COSTS.get(backend.cpu_path() or "", COSTS["avx2"])
    if kernel.layout == DENSE:
        name, kept, words = ("int8" if integers else "float") + " dense", n * k / (4 if integers else 1), 0.0
    elif kernel.layout == TWO_FOUR:
        assert kernel.scheme is not None
        assert kernel.scheme.activations is not None
        straight = not kernel.scheme.activations.symmetric and tokens >= TWO_FOUR_TOKENS
        cost = TWO_FOUR_COST.get(backend.cpu_path() or "", UNPACKED_COST) if straight else UNPACKED_COST
        name, kept, words = "int8 dense", n * k / 4 * cost, 0.0
    else:
        rows = LAYOUTS[kernel.dtype][kernel.layout]
        blocks = (blocks_of(weight.to(kernel.dtype), rows) != 0).any(-1)
        kept, words = float(blocks.sum()) * rows, blocks.shape[0] * -(-blocks.shape[1] // WORD)
        name = "8x4 float" if kernel.layout == "8x4" and not integers else kernel.layout
    element, unit, word = table[name]
    cores = max(min(torch.get_num_threads(), os.cpu_count() or 1), 1)
    return (tokens * (n + k) * element + kept * tokens * unit + words * -(-tokens // 64) * word) * 1e-9 / cores


def _model(weight: torch.Tensor, kernels: Sequence[SparseKernel], tokens: int, dtype: torch.dtype) -> dict[str, float]:
    if tune_gpu.concerns(weight, kernels):
        return {kernel.layout: tune_gpu.model_seconds(weight, kernel, tokens, dtype) for kernel in kernels}
    return {kernel.layout: model_seconds(weight, kernel, tokens) for kernel in kernels}


def _implausible(seconds: dict[str, float], model: dict[str, float]) -> bool:
    return any(seconds[layout] > IMPLAUSIBLE * (value + CALL_SECONDS) for layout, value in model.items())


def _key(weight: torch.Tensor, kernels: Sequence[SparseKernel], tokens: int, dtype: torch.dtype) -> str:
    """One of all candidates: times of one measurement belong together. Density in steps of one part in fifty: layers of
    one pruned model differ by less."""
    n, k = weight.shape
    scheme = kernels[0].scheme.name if kernels[0].scheme else str(weight.dtype).removeprefix("torch.")
    layouts, on_gpu = [], tune_gpu.concerns(weight, kernels)
    for kernel in kernels:
        if on_gpu:
            layouts.append(f"{kernel.layout} {round(tune_gpu.kept(weight, kernel.layout) * 50) / 50:.2f}")
            continue
        block_rows = LAYOUTS.get(kernel.dtype, {}).get(kernel.layout)
        if block_rows is None:
            layouts.append(kernel.layout)
            continue
        kept = (blocks_of(weight.to(kernel.dtype), block_rows) != 0).any(-1)
        density = round(float(kept.float().mean()) * 50) / 50 if kept.numel() else 0.0
        layouts.append(f"{kernel.layout} {density:.2f}")
    what = f"{scheme} {str(dtype).removeprefix('torch.')} {tokens}x{k}x{n} {', '.join(layouts)}"
    if on_gpu:
        return f"{what} | {tune_gpu.device(weight)}, {_versions()}"
    return f"{what} | {backend.cpu_path()} {torch.get_num_threads()} threads | {_machine()}"


@cache
def _machine() -> str:
    """Processor and versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        name = next((v.strip() for key, v in fields.items() if key.strip() == "model name"), name)
    return f"{name}, {_versions()}"


def _versions() -> str:
    try:
        own = version("tcompress")
    except PackageNotFoundError:  # run from a source tree
        own = "source"
    return f"tcompress {own}, torch {torch.__version__}"


def cache_file() -> Path:
    """Where measurements are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tcompress" / "tune.json"


def _read() -> dict[str, dict[str, float]]:
    """What is known; a file that is damaged, or another program's, holds nothing: it is only a cache."""
    try:
        content = json.loads(cache_file().read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home folder, or lists in lists without end
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        key: times for key, times in content.items() if isinstance(times, dict) and all(map(_is_time, times.values()))
    }


def _is_time(value: object) -> bool:
    return isinstance(value, float) and 0 < value < math.inf


def _write(new: dict[str, dict[str, float]]) -> None:
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
