"""What a run of the benchmarks found: its file, and the lines of its table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peers import BASELINE, OPS


@dataclass
class Result:
    """One peer at one shape. Lists have one entry a round.

    Attributes:
        milliseconds: the median call of a round. noisy: whether others used the processors in that round.
        speedups: baseline's time over this peer's, of the same round.
        macs: multiply-adds of a call. relative_error: against float64. cosine: of both results, where the op has it.
        ghz, macs_per_cycle (a core), read_gb_s: medians over the rounds.
        not_run: the reason, where there is no time.
    """

    shape: str
    peer: str
    milliseconds: list[float] = field(default_factory=list)
    noisy: list[bool] = field(default_factory=list)
    speedups: list[float] = field(default_factory=list)
    macs: int = 0
    relative_error: float | None = None
    cosine: float | None = None
    ghz: float | None = None
    macs_per_cycle: float | None = None
    read_gb_s: float | None = None
    not_run: str | None = None

    @property
    def speedup(self) -> float | None:
        return statistics.median(self.speedups) if self.speedups else None


@dataclass
class Run:
    """The results of one op on one machine; `machine` says which processor, threads, path, versions, bandwidth."""

    op: str
    machine: dict[str, Any]
    results: list[Result]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Run:
        data = json.loads(path.read_text())
        return cls(data["op"], data["machine"], [Result(**result) for result in data["results"]])


def add_speedups(results: Iterable[Result]) -> None:
    """Fills in the speedups of complete results: of every round, over the baseline in that round."""
    results = list(results)
    baselines = {r.shape: r.milliseconds for r in results if r.peer == BASELINE}
    for r in results:
        pairs = zip(baselines.get(r.shape, []), r.milliseconds, strict=False)
        r.speedups = [base / mine for base, mine in pairs]


def headings(op: str) -> list[tuple[str, bool]]:
    """The columns of an op's table, and which of them are text, for the left."""
    about = OPS[op]
    return [
        (f"shape ({about.sizes})", True),
        ("peer", True),
        ("ms", False),
        (f"speedup over {BASELINE}", False),
        ("GMAC/s", False),
        ("MAC/cycle/core", False),
        ("GB/s read", False),
        (about.error, False),
        *([("cosine", False)] if about.cosine else []),
        ("GHz", False),
        ("notes", True),
    ]


def row(op: str, result: Result) -> tuple[str, ...]:
    """The line of a result: the median of its rounds, the lowest and the highest speedup in brackets."""
    if result.not_run is not None:
        return _absent(op, result.shape, result.peer, result.not_run)
    median = statistics.median(result.milliseconds)
    s = result.speedups
    return (
        result.shape,
        result.peer,
        f"{median:.3f}",
        f"{result.speedup:.2f} ({min(s):.2f}–{max(s):.2f})" if s else "-",
        f"{result.macs / median / 1e6:.0f}",
        _number(result.macs_per_cycle, 0),
        _number(result.read_gb_s, 1),
        _number(result.relative_error, 5),
        *([_number(result.cosine, 6)] if OPS[op].cosine else []),
        _number(result.ghz, 2),
        f"noisy {sum(result.noisy)}/{len(result.noisy)}" if any(result.noisy) else "",
    )


def rows(run: Run) -> list[tuple[str, ...]]:
    """All lines, those of a shape together; a peer that ran at no shape gets a single one."""
    results = run.results
    peers = dict.fromkeys(r.peer for r in results)
    nowhere = {p for p in peers if all(r.not_run for r in results if r.peer == p)}
    shapes = dict.fromkeys(r.shape for r in results)
    lines = [row(run.op, r) for shape in shapes for r in results if r.shape == shape and r.peer not in nowhere]
    for peer in peers:
        if peer in nowhere:
            reasons = "; ".join(dict.fromkeys(str(r.not_run) for r in results if r.peer == peer))
            lines.append(_absent(run.op, "all", peer, reasons))
    return lines


def _absent(op: str, shape: str, peer: str, reason: str) -> tuple[str, ...]:
    return (shape, peer, *["-"] * (len(headings(op)) - 3), f"not run: {reason}")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
