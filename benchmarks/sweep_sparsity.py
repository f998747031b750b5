"""Times our sparse layers and dense ones against the part of the weights that is zero: 0, 10, … 90, 95 %.

    python benchmarks/sweep_sparsity.py [--m 128] [--k 768] [--n 768] [--seconds 0.5] [--sparsity 80 ...] [--avx2]
                                        [--json FILE] [--png FILE]

A sparse layer and the dense one of its kind are called in turn in one process: float32 against torch, int8 and int4
against ours. Prints for each pattern of zeros from which sparsity on the sparse layer is the faster one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import held
import idle
import sweep
import torch
from linear import Linear
from linear_peer import tcompress_linear, torch_fp32
from matplotlib.figure import Figure
from peer import CannotRun
from rich.console import Console
from rich.progress import track
from shapes import LinearShape
from sparse import prune
from sparse_peer import ours_float, ours_int4, ours_int8

from tcompress.timing import alternate

PERCENTS = [*range(0, 91, 10), 95]
#: The kinds of layers: what each is compared with, and its name.
DENSE = {
    "float32": (torch_fp32, "torch's dense float32"),
    "int8": (tcompress_linear("int8"), "our dense int8"),
    "int4": (tcompress_linear("W4A8-g128"), "our dense W4A8-g128"),
}
#: By kind and pattern. A pattern runs on the kernel layout that refines it.
SPARSE = {
    ("float32", "unstructured"): ours_float("unstructured"),
    ("float32", "1x4"): ours_float("unstructured"),
    ("float32", "8x4"): ours_float("8x4"),
    ("float32", "16x16"): ours_float("8x4"),
    ("int8", "unstructured"): ours_int8("1x4"),
    ("int8", "2:4"): ours_int8("2:4"),
    ("int8", "1x4"): ours_int8("1x4"),
    ("int8", "8x4"): ours_int8("8x4"),
    ("int8", "16x16"): ours_int8("8x4"),
    ("int4", "8x4"): ours_int4,
    ("int4", "16x16"): ours_int4,
}
COLORS = {"unstructured": "#3d7ea6", "2:4": "#e9c46a", "1x4": "#6a4c93", "8x4": "#d1495b", "16x16": "#2a9d8f"}


@dataclass(frozen=True)
class Point:
    """Microseconds a call, medians; `percent` of the weights are zero."""

    kind: str
    pattern: str
    percent: int
    sparse_us: float
    dense_us: float

    @property
    def speedup(self) -> float:
        return self.dense_us / self.sparse_us


def measure(shape: LinearShape, percents: Sequence[int], seconds: float) -> tuple[list[Point], dict[str, str]]:
    """All kinds and patterns at a shape, so many seconds each.

    Returns:
        The points, and the reasons of what could not run, by "kind pattern".
    """
    x, w, b = Linear().inputs(shape)
    points, reasons = [], {}
    jobs = [
        (*key, percent)
        for key in SPARSE
        for percent in (percents if ":" not in key[1] else [50])
        if percent in percents
    ]
    for kind, pattern, percent in track(jobs, "measuring", console=Console(stderr=True)):
        pruned = prune(w, pattern, percent / 100)
        try:
            calls = SPARSE[kind, pattern](x, pruned, b), DENSE[kind][0](x, pruned, b)
        except CannotRun as reason:
            reasons[f"{kind} {pattern}"] = str(reason)
            continue
        with torch.inference_mode():
            sparse, dense = alternate(calls, seconds)
        points.append(Point(kind, pattern, percent, sparse.median * 1e6, dense.median * 1e6))
    return points, reasons


def crossover(points: Sequence[Point]) -> int | None:
    """Of one kind and pattern: the lowest sparsity from which on the sparse layer is never slower; or None."""
    faster = None
    for point in sorted(points, key=lambda p: -p.percent):
        if point.speedup < 1:
            break
        faster = point.percent
    return faster


def lines_of(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    """By kind and pattern, in the order of SPARSE."""
    found = {key: [p for p in points if (p.kind, p.pattern) == key] for key in SPARSE}
    return {key: line for key, line in found.items() if line}


def summary(points: Sequence[Point], reasons: dict[str, str]) -> list[str]:
    """The lines that are printed."""
    lines = []
    for (kind, pattern), line in lines_of(points).items():
        start, best = crossover(line), max(line, key=lambda p: p.speedup)
        where = f"faster from {start}% on" if start is not None else "not faster at the highest sparsity"
        lines.append(f"{kind} {pattern}: {where}; at most {best.speedup:.2f}× dense, at {best.percent}%")
    return lines + [f"{name}: not run: {reason}" for name, reason in reasons.items()]


def chart(title: str, points: Sequence[Point]) -> Figure:
    """A panel a kind: the speedup over the dense layer, 1 is dashed."""
    kinds = list(dict.fromkeys(p.kind for p in points))
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    for place, kind in enumerate(kinds):
        axes: Any = figure.add_subplot(1, len(kinds), place + 1)
        for (of, pattern), line in lines_of(points).items():
            if of == kind:
                percents, speedups = [p.percent for p in line], [p.speedup for p in line]
                axes.plot(
                    percents, speedups, color=COLORS[pattern], marker="D" if ":" in pattern else ".", label=pattern
                )
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axes.set_xlabel("weights that are zero, %")
        axes.set_title(f"{kind}: speedup over {DENSE[kind][1]}", fontsize=10)
        axes.grid(which="both", alpha=0.25)
        axes.legend()
    figure.suptitle(title)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for size, default in (("m", 128), ("k", 768), ("n", 768)):
        parser.add_argument(f"--{size}", type=int, default=default)
    sweep.add_options(parser, "sparsity")
    held.add_option(parser)
    options = parser.parse_args()
    held.apply(options.avx2)
    shape = LinearShape("sweep", options.m, options.k, options.n)
    noisy = not idle.wait(options.patience)
    before, own = idle.now(), idle.own_seconds()
    points, reasons = measure(shape, options.sizes or PERCENTS, options.seconds)
    if not points:
        raise SystemExit(f"sweep_sparsity: not run: {'; '.join(dict.fromkeys(reasons.values()))}")
    noisy |= idle.others(before, idle.now(), idle.own_seconds() - own) > idle.LIMIT
    _write(shape, options, points, reasons, noisy)


def _write(
    shape: LinearShape, options: argparse.Namespace, points: list[Point], reasons: dict[str, str], noisy: bool
) -> None:
    from tcompress.backend import cpu_path

    stem = "_".join(filter(None, ("sweep_sparsity", f"{shape.m}x{shape.k}x{shape.n}", held.isa())))
    target, picture = options.json or sweep.DOCS / f"{stem}.json", options.png or sweep.DOCS / f"{stem}.png"
    for path in (target, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    path_name = cpu_path() or "reference"
    about = {"m": shape.m, "k": shape.k, "n": shape.n, "path": path_name, "threads": torch.get_num_threads()}
    about |= {"noisy": noisy, "torch": torch.__version__, "not_run": reasons}
    target.write_text(json.dumps({**about, "points": [vars(p) for p in points]}, indent=1) + "\n")
    title = f"M = {shape.m}, K = {shape.k}, N = {shape.n}, {path_name}, {about['threads']} threads"
    chart(title + (", noisy" if noisy else ""), points).savefig(picture)
    print("\n".join(summary(points, reasons)))
    print("noisy: others used the processors" if noisy else "the machine was idle otherwise")
    print(f"{target}\n{picture}")


if __name__ == "__main__":
    main()
