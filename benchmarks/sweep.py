"""Times ours and torch's against a size, both called in turn in one process: the body of the sweeps.

Prints the worst ratio of our time to torch's, the largest step of ours from a size to the next, and every size where
ours is slower; writes the numbers and a picture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import idle
import torch
from matplotlib.figure import Figure
from peer import Call, CannotRun
from rich.console import Console
from rich.progress import track

from tcompress.timing import alternate

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
TICKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
#: Of one size: {the variable's name: size, "ours_us": …, "torch_us": …}, microseconds a call, medians.
Point = dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """What is swept.

    Attributes:
        variable: its letter. meaning: for the axis. sizes: unless the command line gives others.
        calls: ours and torch's at a size.
        about: the other sizes and options, for the file of numbers.
    """

    variable: str
    meaning: str
    sizes: Iterable[int]
    calls: Callable[[int], tuple[Call, Call]]
    about: dict[str, Any]

    @property
    def key(self) -> str:
        return self.variable.lower()

    def measure(self, sizes: Iterable[int], seconds: float) -> list[Point]:
        """Each size for so many seconds."""
        points = []
        for size in track(list(sizes), "measuring", console=Console(stderr=True)):
            with torch.inference_mode():
                ours, torchs = alternate(self.calls(size), seconds)
            points.append({self.key: size, "ours_us": ours.median * 1e6, "torch_us": torchs.median * 1e6})
        return points


def largest_step(points: list[Point], key: str) -> tuple[int, float]:
    """The size with the largest ratio of our time at the next size to that there, and the ratio."""
    times = {int(p[key]): p["ours_us"] for p in points}
    ratio, size = max((times[n + 1] / times[n], n) for n in times if n + 1 in times)
    return size, ratio


def summary(points: list[Point], variable: str) -> list[str]:
    """The lines that are printed."""
    key = variable.lower()
    ratios = {int(p[key]): p["ours_us"] / p["torch_us"] for p in points}
    worst = max(ratios, key=ratios.__getitem__)
    lines = [f"worst ratio to torch's time: {ratios[worst]:.2f} at {variable} = {worst}"]
    if any(b[key] - a[key] == 1 for a, b in pairwise(points)):
        size, ratio = largest_step(points, key)
        lines.append(f"largest step: from {variable} = {size} to {size + 1}, {ratio:.2f} times the time")
    slower = [f"{size} ({ratio:.2f}×)" for size, ratio in ratios.items() if ratio > 1]
    where = f"at {variable} = {', '.join(slower)}" if slower else f"at no {variable}"
    return [*lines, f"slower than torch {where}"]


def chart(title: str, sweep: Sweep, points: list[Point]) -> Figure:
    """Both times against the size, on logarithmic axes, which show 1 beside 512."""
    figure = Figure(figsize=(12, 6), dpi=100, layout="constrained")
    axes: Any = figure.add_subplot()
    sizes = [p[sweep.key] for p in points]
    axes.plot(sizes, [p["torch_us"] for p in points], color="#8d99ae", marker=".", label="torch float32")
    axes.plot(sizes, [p["ours_us"] for p in points], color="#d1495b", marker=".", label="ours")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [size for size in TICKS if min(sizes) <= size <= max(sizes)]
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.set_xlabel(f"{sweep.variable}, {sweep.meaning}")
    axes.set_ylabel("µs a call, median")
    axes.set_title(title)
    axes.grid(which="both", alpha=0.25)
    axes.legend()
    return figure


def add_options(parser: argparse.ArgumentParser, variable: str) -> None:
    """Those that all sweeps have."""
    parser.add_argument("--seconds", type=float, default=0.5, help=f"for each {variable}, ours and torch's together")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds to wait for an idle machine")
    parser.add_argument(f"--{variable.lower()}", type=int, action="append", dest="sizes", help="instead of the default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)


def run(sweep: Sweep, options: argparse.Namespace, stem: str, title: str) -> None:
    """Measures, prints and writes docs/benchmarks/<stem>.json and .png, or what the options name.

    Raises:
        SystemExit: ours cannot run here, with the reason.
    """
    noisy = not idle.wait(options.patience)
    before, own = idle.now(), idle.own_seconds()
    try:
        points = sweep.measure(options.sizes or sweep.sizes, options.seconds)
    except CannotRun as reason:
        raise SystemExit(f"sweep: not run: {reason}") from reason
    noisy |= idle.others(before, idle.now(), idle.own_seconds() - own) > idle.LIMIT
    target, picture = options.json or DOCS / f"{stem}.json", options.png or DOCS / f"{stem}.png"
    for path in (target, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    about = {**sweep.about, "threads": threads, "noisy": noisy, "torch": torch.__version__}
    target.write_text(json.dumps({**about, "points": points}, indent=1) + "\n")
    title = f"{title}, {threads} threads"
    chart(title + (", noisy" if noisy else ""), sweep, points).savefig(picture)
    print("\n".join(summary(points, sweep.variable)))
    print("noisy: others used the processors" if noisy else "the machine was idle otherwise")
    print(f"{target}\n{picture}")
