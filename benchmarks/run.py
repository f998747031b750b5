"""Runs the benchmarks of an op, each peer in a process of its own and all of them in turn, and prints a table.

    python benchmarks/run.py --op int8_linear|int4_linear|sparse_linear|attention|decode_attention [--rounds 3]
                             [--peer NAME ...] [--shape PART ...] [--json FILE] [--patience 30] [--avx2]

A peer's time is the median over its rounds; the speedup is the median of the ratios to the baseline of the same round,
with the lowest and the highest round beside it. A round is noisy where others used more than a tenth of the processors
just before it (after waiting for them) or during it. `chart.py` makes a page and a picture of the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import held
import idle
from bandwidth import read_bandwidth
from peers import BASELINE, OPS
from results import Result, Run, add_speedups, headings, rows

FOLDER = Path(__file__).parent
LIBRARIES = ("torch", "torchao", "onnxruntime", "openvino", "scipy")


class Measurement:
    """Collects the rounds of all peers, shape by shape."""

    def __init__(self, op: str, patience: float) -> None:
        self.op, self.patience = op, patience
        self.path = "reference"
        self.failures: list[str] = []
        self._results: dict[tuple[str, str], Result] = {}
        self._figures: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def round(self, peer: str, shapes: list[str]) -> None:
        """Runs `peer` once, in a process of its own."""
        noisy = not idle.wait(self.patience)
        with tempfile.TemporaryDirectory() as folder:
            times, report = Path(folder) / "times.json", Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", f"bench_{self.op}.py", "-q", f"--peer={peer}"]
            command += [f"--benchmark-json={times}", f"--junitxml={report}", *[f"--shape={s}" for s in shapes]]
            before, own = idle.now(), idle.own_seconds()
            done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER)
            noisy |= idle.others(before, idle.now(), idle.own_seconds() - own) > idle.LIMIT
            if done.returncode not in (0, 1):  # 1: a case failed, which the report holds
                raise SystemExit(f"benchmarks: {peer} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
            self._read_report(ElementTree.parse(report), peer)
            if times.exists() and times.stat().st_size:  # not where all cases were skipped
                for bench in json.loads(times.read_text())["benchmarks"]:
                    if bench["extra_info"]:  # else the case failed after its timing, as the report says
                        self._read_times(bench, noisy)

    def _read_report(self, report: Any, peer: str) -> None:
        """Takes the reasons of the cases without times."""
        for case in report.iter("testcase"):
            for kind in ("skipped", "failure", "error"):
                for problem in case.findall(kind):
                    shape = case.get("name").partition("[")[2].partition("-float32-")[0]
                    reason = (problem.get("message") or problem.text).splitlines()[0].removeprefix("Skipped: ")
                    if kind != "skipped":
                        self.failures.append(f"{peer} at {shape}: {problem.text}")
                        reason = f"FAILED: {reason}"
                    self._results[shape, peer] = Result(shape, peer, not_run=reason)

    def _read_times(self, bench: Any, noisy: bool) -> None:
        info = bench["extra_info"]
        key = info["shape"], info["peer"]
        result = self._results.setdefault(key, Result(*key))
        result.milliseconds.append(info["seconds"] * 1e3)
        result.noisy.append(noisy)
        result.macs, result.relative_error, result.cosine = info["macs"], info["relative_error"], info["cosine"]
        self.path = info["path"]
        for name in ("ghz", "macs_per_cycle", "read_gb_s"):
            if info[name] is not None:
                self._figures[key][name].append(info[name])
                setattr(result, name, statistics.median(self._figures[key][name]))

    def results(self) -> list[Result]:
        """In the order of the shapes and of the peers."""
        keys = [(str(shape), peer) for shape in OPS[self.op].shapes for peer in OPS[self.op].peers]
        found = [self._results[key] for key in keys if key in self._results]
        add_speedups(found)
        return found


def machine(path: str) -> dict[str, Any]:
    """What was measured on, without its name."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = "not installed"
    return {
        "cpu": _processor(),
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "path": path,
        **({"held_to": held.isa()} if held.isa() else {}),
        "read_gb_s": round(read_bandwidth(), 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=list(OPS), default="int8_linear")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="append", default=[], help=f"a name; {BASELINE} is always among them")
    parser.add_argument("--shape", action="append", default=[], help="part of a shape's name")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds to wait for an idle machine, each time")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    held.add_option(parser)
    options = parser.parse_args()
    held.apply(options.avx2)
    unknown = set(options.peer) - set(OPS[options.op].peers)
    if unknown:
        parser.error(f"--peer: got {sorted(unknown)}, expected some of {list(OPS[options.op].peers)}")
    peers = [p for p in OPS[options.op].peers if not options.peer or p in options.peer or p == BASELINE]
    measurement = Measurement(options.op, options.patience)
    jobs = [peer for _ in range(options.rounds) for peer in peers]
    for peer in track(jobs, "measuring", console=Console(stderr=True)):
        measurement.round(peer, options.shape)
    run = Run(options.op, machine(measurement.path), measurement.results())
    if options.json:
        run.save(options.json)
    table = Table(title=f"{run.op}: {run.machine['cpu']}, {run.machine['threads']} threads, {run.machine['path']}")
    for heading, left in headings(run.op):
        table.add_column(heading, justify="left" if left else "right")
    for line in rows(run):
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    if measurement.failures:
        raise SystemExit("benchmarks: failed:\n" + "\n".join(measurement.failures))


if __name__ == "__main__":
    main()
