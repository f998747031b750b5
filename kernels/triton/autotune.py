"""Which tile a launch takes: measured on this GPU the first time, then from a file.

    $XDG_CACHE_HOME/tcompress/triton-<GPU>-<Triton's version>.json      (~/.cache by default)
        {"int4_linear 16x4096x4096 …": {"name": "int4_linear/sm_90/16x32x128-4w4s-k2", "block_m": 16, …}, …}

 1. What this process has seen already.
 2. The file. One that is damaged is told of and taken for empty, so that tiles are measured again.
 3. Measure the candidates, the stored tile first; keep the fastest, here and in the file, which is written under
    another name and then renamed: a reader never sees half of it.

The stored tile is taken, and nothing measured or kept: with TCOMPRESS_TUNE=0; off CUDA (Triton's interpreter); while a
CUDA graph is captured, which measuring would break, if the tile is not known by then.

A measurement counts the whole launch, quantizer included. The number of tokens is rounded up to a power of two, so that
a decoding loop does not measure at each step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from .tiles import TileConfig

#: A candidate must be this much faster than the stored tile: less is noise.
MARGIN = 0.97
WARM_UP, CALLS, ROUNDS = 2, 5, 5

_known: dict[str, dict[str, Any]] = {}


def choose(
    kernel: str,
    sizes: str,
    stored: TileConfig,
    candidates: Callable[[], Sequence[TileConfig]],
    run: Callable[[TileConfig], object],
    x: torch.Tensor,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> TileConfig:
    """The tile to launch with.

    Args:
        kernel, sizes: what is launched, and everything that a compilation or its speed depends on.
        stored: what a table or a rule says.
        candidates: gives other tiles that this kernel can run with; called when they are measured.
        run: launches with a tile; what it writes is thrown away.
        x: a tensor on the device.
        measure: seconds of a call; by default CUDA events.
    """
    if os.environ.get("TCOMPRESS_TUNE", "1") == "0" or not (x.is_cuda or measure):
        return stored
    path, key = _file_of(x.device, os.environ.get("XDG_CACHE_HOME")), f"{kernel} {sizes}"
    memory = _known.setdefault(str(path), {})
    if key not in memory:
        memory.update({k: v for k, v in _read(path).items() if k not in memory})
    tile = _tile(memory.get(key), stored)
    if tile is not None:
        return tile
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return stored
    best = fastest(stored, candidates(), run, measure or _seconds)
    memory[key] = {"name": best.name, **_sizes(best)}
    _write(path, {key: memory[key]})
    return best


def fastest(
    stored: TileConfig,
    candidates: Sequence[TileConfig],
    run: Callable[[TileConfig], object],
    measure: Callable[[Callable[[], object]], float],
) -> TileConfig:
    """The fastest by MARGIN, or the stored one. A candidate that needs more shared memory or registers than the GPU
    has, found by the launch or by the assembler, is passed over; any other error is raised."""
    best, least = stored, measure(lambda: run(stored)) * MARGIN
    for tile in candidates:
        if tile == stored:
            continue
        try:
            seconds = measure(lambda tile=tile: run(tile))  # type: ignore[misc]
        except (OutOfResources, PTXASError):
            continue
        if seconds < least:
            best, least = tile, seconds
    return best


def neighbours(tile: TileConfig, **values: Sequence[int | bool]) -> list[TileConfig]:
    """Tiles that differ from `tile` in one field, which takes the given values."""
    changed = [dataclasses.replace(tile, **{k: v}) for k, several in values.items() for v in several]  # type: ignore[arg-type]
    return [other for other in changed if other != tile]


def tokens(m: int) -> int:
    """The number of tokens as a key has it."""
    return triton.next_power_of_2(max(m, 1))


@cache
def _file_of(device: torch.device, folder: str | None) -> Path:
    """Kept: asking the driver takes longer than a launch. `folder` is what `cache_file` reads."""
    return cache_file(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)


def cache_file(device: str) -> Path:
    """Where the tiles of a GPU are kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tcompress"
    return folder / f"triton-{re.sub(r'[^A-Za-z0-9.]+', '-', device)}-{triton.__version__}.json"


def _sizes(tile: TileConfig) -> dict[str, Any]:
    """All but the table that it is from."""
    return {k: v for k, v in dataclasses.asdict(tile).items() if k not in ("kernel", "architecture")}


def _tile(fields: object, like: TileConfig) -> TileConfig | None:
    """The tile that the file describes, or None if it describes none, or one of another table."""
    if not isinstance(fields, dict) or set(fields) != {"name", *_sizes(like)}:
        return None
    tile = dataclasses.replace(like, **{k: v for k, v in fields.items() if k != "name"})
    return tile if tile.name == fields["name"] else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not all(_is_tile(value) for value in content.values()):
            raise ValueError("no table of tiles")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"autotune: {path}: {error}; tiles are measured again", RuntimeWarning, stacklevel=3)
        return {}
    return content


def _is_tile(value: object) -> bool:
    """Sizes that are powers of two or small counts, and switches; a file with others must not reach the compiler."""
    if not isinstance(value, dict):
        return False
    sizes = (v for k, v in value.items() if k != "name" and v is not None)
    return all(type(v) in (int, bool) and 0 <= v <= 65536 for v in sizes)


def _write(path: Path, new: dict[str, Any]) -> None:
    """Adds tiles; where the folder cannot be written they are kept in this process alone, and that is told."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # told when it was read
            content = _read(path) | new
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(content, file, indent=1, sort_keys=True)
        try:
            os.replace(file.name, path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise
    except OSError as error:
        warnings.warn(f"autotune: {path}: {error}; tiles are not kept", RuntimeWarning, stacklevel=3)


def _seconds(call: Callable[[], object]) -> float:
    """Of the fastest of a few rounds of calls on the current stream."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / (1000 * CALLS))
    return min(times)
