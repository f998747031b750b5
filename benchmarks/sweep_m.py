"""Times our layer and torch's float32 one against the number of tokens M: 1 … 64, then 80, 96, … 512, K = N = 1024.

    python benchmarks/sweep_m.py [--scheme W8A7] [--k 1024] [--n 1024] [--seconds 0.5] [--json FILE] [--png FILE]

Both are called in turn in one process. Prints the largest step from an M to M + 1 and every M where ours is slower.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent))
import idle
from linear_peer import tcompress_linear, torch_fp32
from peer import CannotRun

from tcompress.timing import alternate

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
MS = [*range(1, 65), *range(80, 513, 16)]


def sweep(scheme: str, k: int, n: int, seconds: float, ms: list[int]) -> list[dict[str, float]]:
    """For each M: microseconds a call (medians) of ours and of torch, after `seconds` of measurement."""
    generator = torch.Generator().manual_seed(0)
    w, b = torch.randn(n, k, generator=generator) / k**0.5, torch.randn(n, generator=generator)
    points = []
    for m in track(ms, "measuring", console=Console(stderr=True)):
        x = torch.randn(m, k, generator=generator)
        with torch.inference_mode():
            ours, torchs = alternate([tcompress_linear(scheme)(x, w, b), torch_fp32(x, w, b)], seconds)
        points.append({"m": m, "ours_us": ours.median * 1e6, "torch_us": torchs.median * 1e6})
    return points


def largest_step(points: list[dict[str, float]]) -> tuple[int, float]:
    """The M with the largest ratio of our time at M + 1 to that at M, and the ratio."""
    times = {int(p["m"]): p["ours_us"] for p in points}
    ratio, m = max((times[m + 1] / times[m], m) for m in times if m + 1 in times)
    return m, ratio


def chart(title: str, points: list[dict[str, float]]) -> Figure:
    """Both times against M, on logarithmic axes, which show M = 1 beside M = 512."""
    figure = Figure(figsize=(12, 6), dpi=100, layout="constrained")
    axes: Any = figure.add_subplot()
    ms = [p["m"] for p in points]
    axes.plot(ms, [p["torch_us"] for p in points], color="#8d99ae", marker=".", label="torch float32")
    axes.plot(ms, [p["ours_us"] for p in points], color="#d1495b", marker=".", label="ours")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [m for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if min(ms) <= m <= max(ms)]
    axes.set_xticks(ticks, [str(m) for m in ticks])
    axes.set_xlabel("M, tokens a call")
    axes.set_ylabel("µs a call, median")
    axes.set_title(title)
    axes.grid(which="both", alpha=0.25)
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="W8A7")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each M, both layers together")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds to wait for an idle machine")
    parser.add_argument("--m", type=int, action="append", help="instead of 1 … 512")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    noisy = not idle.wait(options.patience)
    before, own = idle.now(), idle.own_seconds()
    try:
        points = sweep(options.scheme, options.k, options.n, options.seconds, options.m or MS)
    except CannotRun as reason:
        raise SystemExit(f"sweep: not run: {reason}") from reason
    noisy |= idle.others(before, idle.now(), idle.own_seconds() - own) > idle.LIMIT
    stem = f"sweep_m_{options.scheme}_{options.k}x{options.n}"
    target, picture = options.json or DOCS / f"{stem}.json", options.png or DOCS / f"{stem}.png"
    for path in (target, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    about = {"scheme": options.scheme, "k": options.k, "n": options.n, "threads": threads, "noisy": noisy}
    target.write_text(json.dumps({**about, "torch": torch.__version__, "points": points}, indent=1) + "\n")
    title = f"{options.scheme}, K = {options.k}, N = {options.n}, {threads} threads"
    chart(title + (", noisy" if noisy else ""), points).savefig(picture)
    if any(b["m"] - a["m"] == 1 for a, b in pairwise(points)):
        m, ratio = largest_step(points)
        print(f"largest step: from M = {m} to {m + 1}, {ratio:.2f} times the time")
    slower = [f"{p['m']} ({p['ours_us'] / p['torch_us']:.2f}×)" for p in points if p["ours_us"] > p["torch_us"]]
    print(f"slower than torch at M = {', '.join(slower)}" if slower else "slower than torch at no M")
    print("noisy: others used the processors" if noisy else "the machine was idle otherwise")
    print(f"{target}\n{picture}")


if __name__ == "__main__":
    main()
