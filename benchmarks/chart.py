"""Turns the JSON of one or more runs of an op on one machine into one Markdown page with a table, and one picture.

    python benchmarks/chart.py FILE.json ... [--markdown FILE] [--png FILE]

The default outputs are docs/benchmarks/<op>.md and .png, or <op>_avx2.* of runs held to it. Rounds of several files
are pooled.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))
from peers import BASELINE, OPS
from results import Result, Run, headings, rows

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
COLUMNS = 3
DPI = 100
WIDTH = 1200  # pixels
BAR = "\\|"  # within a cell of a table
COLORS = {
    "tcompress": "#d1495b",
    "torch": "#8d99ae",
    "torchao": "#5c677d",
    "onnxruntime": "#3d7ea6",
    "openvino": "#6a4c93",
    "deepsparse": "#2a9d8f",
    "scipy": "#e9c46a",
}


def merge(runs: list[Run]) -> Run:
    """One run with the rounds of all.

    Raises:
        ValueError: they are of different ops or machines.
    """
    first = runs[0]
    results: dict[tuple[str, str], Result] = {}
    for run in runs:
        for name, got, expected in (("op", run.op, first.op), ("machine", _comparable(run), _comparable(first))):
            if got != expected:
                raise ValueError(f"chart: {name}: got {got}, expected {expected} as in the first file")
        for result in run.results:
            known = results.setdefault((result.shape, result.peer), result)
            if known is not result and known.not_run is not None:
                results[result.shape, result.peer] = result
            elif known is not result and result.not_run is None:
                known.milliseconds += result.milliseconds
                known.noisy += result.noisy
                known.speedups += result.speedups
    return Run(first.op, first.machine, list(results.values()))


def _comparable(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.machine.items() if key != "read_gb_s"}


def markdown(run: Run, picture: str) -> str:
    """The page: what was measured on, the picture, and the table."""
    about = run.machine
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    columns, remark = headings(run.op), OPS[run.op].remark
    lines = [
        f"# {run.op}",
        "",
        f"{about['cpu']}, {about['threads']} threads of {about['logical_cpus']} logical processors, our path: "
        f"{about['path']}{_held(run)}; "
        f"memory is read at {about['read_gb_s']} GB/s. {versions}; Python {about['python']}.",
        "",
        "Each library in a process of its own, all in turn; times are medians over the rounds, speedups medians of the "
        f"ratios to {BASELINE} in the same round, with the lowest and the highest. GB/s counts {OPS[run.op].reads} "
        "once a call. The error is against float64; GHz is the clock after the timing. Calls follow each "
        "other: what the last-level cache holds is read from there." + (f" {remark}" if remark else ""),
        "",
        f"![Speedups over {BASELINE}]({picture})",
        "",
        _line(heading for heading, _ in columns),
        f"|{'|'.join('---' if left else '---:' for _, left in columns)}|",
        *map(_line, rows(run)),
    ]
    return "\n".join(lines) + "\n"


def _held(run: Run) -> str:
    return f", all libraries held to {run.machine['held_to']}" if "held_to" in run.machine else ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |"


def chart(run: Run) -> Figure:
    """A panel a shape, a bar a peer; its length is the speedup over the baseline."""
    shapes = list(dict.fromkeys(r.shape for r in run.results))
    peers = [p for p in dict.fromkeys(r.peer for r in run.results) if p != BASELINE]
    found = {(r.shape, r.peer): r for r in run.results}
    columns = min(COLUMNS, len(shapes))
    panel_rows = -(-len(shapes) // columns)
    panel, gap, top = 17 * len(peers) + 12, 46, 30  # pixels
    height = top + panel_rows * (panel + gap)
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI)
    labels, space = 185, 22  # pixels left of the first column, and between columns
    width = (WIDTH - labels - columns * space) / columns
    for i, shape in enumerate(shapes):
        line, column = divmod(i, columns)
        left, bottom = labels + column * (width + space), height - top - line * (panel + gap) - gap / 2 - panel
        axes = figure.add_axes((left / WIDTH, bottom / height, width / WIDTH, panel / height))
        _panel(axes, shape, [(peer, found.get((shape, peer))) for peer in peers], labelled=column == 0)
    about = run.machine
    title = (
        f"{run.op}: speedup over {BASELINE} (1×, dashed), {about['cpu']}, {about['threads']} threads, {about['path']}"
    )
    title += _held(run)
    figure.text(0.5, 1 - 18 / height, title, ha="center", va="center", fontsize=11.5, weight="bold")
    return figure


def _panel(axes: Any, shape: str, results: list[tuple[str, Result | None]], labelled: bool) -> None:
    values = [r.speedup or 0.0 if r is not None else 0.0 for _, r in results]
    limit = max([1.0, *values]) * 1.2
    places = range(len(results))
    colors = [COLORS.get(peer.partition("-")[0], "#8d99ae") for peer, _ in results]
    axes.barh(places, values, color=colors, height=0.74)
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    for place, value in zip(places, values, strict=True):
        text, color = (f"{value:.2f}×", "black") if value else ("not run", "#999999")
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # over the dashed line
        axes.text(value + limit * 0.012, place, text, va="center", fontsize=7.5, color=color, bbox=box)
    axes.set_xlim(0, limit)
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_yticks(list(places), [peer for peer, _ in results] if labelled else [""] * len(results), fontsize=8)
    axes.tick_params(axis="x", labelsize=7, pad=1, length=2)
    axes.tick_params(axis="y", length=0)
    axes.set_title(shape, fontsize=9, pad=4)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    run = merge([Run.load(path) for path in options.files])
    stem = "_".join(filter(None, (run.op, run.machine.get("held_to"))))
    page, picture = options.markdown or DOCS / f"{stem}.md", options.png or DOCS / f"{stem}.png"
    for path in (page, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(markdown(run, Path(os.path.relpath(picture, page.parent)).as_posix()))
    chart(run).savefig(picture)
    print(f"{page}\n{picture}")


if __name__ == "__main__":
    main()
