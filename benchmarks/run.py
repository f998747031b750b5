"""Runs the benchmarks, each peer in a process of its own and all of them in turn, and prints one table a shape.

    python benchmarks/run.py [--rounds 3] [--peer NAME ...] [--shape PART ...] [--markdown FILE]

A peer's time is the median over its rounds; the speedup is the median of the ratios to the baseline of the same round,
with the lowest and the highest round beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from peers import PEERS

BENCH = Path(__file__).parent / "bench_int8_linear.py"
BASELINE = next(iter(PEERS))
#: shape -> peer -> (milliseconds of each round, relative error)
Results = dict[str, dict[str, tuple[list[float], float]]]


def measure(peers: list[str], shapes: list[str], rounds: int) -> Results:
    """Runs each peer once a round."""
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    errors: dict[tuple[str, str], float] = {}
    jobs = [(round_, peer) for round_ in range(rounds) for peer in peers]
    for _, peer in track(jobs, "measuring", console=Console(stderr=True)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.json"
            command = [sys.executable, "-m", "pytest", str(BENCH), "-q", f"--benchmark-json={path}", f"--peer={peer}"]
            command += [f"--shape={shape}" for shape in shapes]
            done = subprocess.run(command, capture_output=True, text=True, cwd=BENCH.parent)
            if done.returncode:
                raise SystemExit(f"benchmarks: {peer} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
            for bench in json.loads(path.read_text())["benchmarks"]:
                info = bench["extra_info"]
                times[info["shape"]][peer].append(bench["stats"]["median"] * 1e3)
                errors[info["shape"], peer] = info["relative_error"]
    return {s: {p: (ms, errors[s, p]) for p, ms in row.items()} for s, row in times.items()}


def rows(row: dict[str, tuple[list[float], float]], macs: int) -> list[tuple[str, ...]]:
    """The lines of a shape's table."""
    lines: list[tuple[str, ...]] = []
    baseline = row.get(BASELINE)
    for peer, (ms, error) in row.items():
        median = statistics.median(ms)
        speedup = "-"
        if baseline is not None:
            ratios = [b / t for b, t in zip(baseline[0], ms, strict=True)]
            speedup = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        lines.append((peer, f"{median:.3f}", speedup, f"{macs / median / 1e6:.0f}", f"{error:.5f}"))
    return lines


HEADINGS = ("peer", "ms", f"speedup over {BASELINE}", "GMAC/s", "relative error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="append", choices=list(PEERS), default=[])
    parser.add_argument("--shape", action="append", default=[])
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    results = measure(options.peer or list(PEERS), options.shape, options.rounds)
    console = Console()
    markdown = []
    for shape, row in results.items():
        m, k, n = map(int, shape.rpartition("-")[2].split("x"))
        table = Table(title=f"int8_linear {shape}, M×K×N")
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == "peer" else "right")
        markdown += [f"\n### {shape}\n", f"| {' | '.join(HEADINGS)} |", "|---|---:|---:|---:|---:|"]
        for line in rows(row, m * k * n):
            table.add_row(*line)
            markdown.append(f"| {' | '.join(line)} |")
        console.print(table)
    if options.markdown:
        options.markdown.write_text("\n".join(markdown).lstrip() + "\n")


if __name__ == "__main__":
    main()
