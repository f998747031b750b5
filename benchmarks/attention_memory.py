"""Measures the memory that one call of an attention takes beyond its inputs, against the number of tokens S.

    python benchmarks/attention_memory.py [--peer NAME ...] [--h 4] [--d 64] [--s 1024 ...] [--markdown FILE]

Each call is the first of its size in a process of its own, so that no freed memory is taken again; the peak is the
kernel's (VmHWM in /proc/self/status). What is counted includes the result. A peer that writes out all scores is not run
where they would not fit: see `LIMIT`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent))
from attention import Attention
from attention_peers import ATTENTION
from peer import CannotRun
from shapes import AttentionShape

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
PEERS = ["tcompress-8", "tcompress-12", "torch-fp32", "torch-math"]
SIZES = [512, 1024, 2048, 4096, 8192, 16384]
#: Bytes of scores up to which torch-math runs; it holds about three times as many.
LIMIT = 1 << 30
MIB = 1 << 20


def extra_bytes(peer: str, s: int, h: int, d: int) -> int:
    """The peak of a call at s tokens over what was there before. To be called once in a process.

    Raises:
        CannotRun: with the reason.
    """
    for tokens in (16, s):  # first a small call, which loads libraries and starts threads
        call = ATTENTION[peer].build(*Attention().inputs(AttentionShape("memory", 1, h, h, tokens, tokens, d)))
        _reset_peak()
        before = _status("VmRSS")
        with torch.inference_mode():
            result = call()
        peak = _status("VmHWM")
        del result
    return max(0, peak - before)


def _reset_peak() -> None:
    """Sets VmHWM to VmRSS."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise CannotRun(f"this kernel does not reset the peak of a process: {error}") from error


def _status(name: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def fresh(peer: str, s: int, h: int, d: int) -> int | None:
    """`extra_bytes` in a new process; None where the scores are over the limit.

    Raises:
        CannotRun: with the reason.
    """
    if peer == "torch-math" and 4 * h * s * s > LIMIT:
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(extra_bytes, peer, s, h, d).result()


def table(found: dict[tuple[str, int], int | None], h: int, d: int) -> str:
    """Markdown: a line a size, MiB a peer, and how much more the double size takes."""
    peers, sizes = list(dict.fromkeys(p for p, _ in found)), sorted({s for _, s in found})
    lines = [
        "| S | result, MiB |" + "".join(f" {peer}, MiB | of half S |" for peer in peers),
        "|---:|---:|" + "---:|---:|" * len(peers),
    ]
    for s in sizes:
        cells = [str(s), f"{4 * h * s * d / MIB:.1f}"]
        for peer in peers:
            now, half = found.get((peer, s)), found.get((peer, s // 2))
            cells.append("-" if now is None else f"{now / MIB:.1f}")
            cells.append(f"{now / half:.2f}×" if now and half else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", choices=list(ATTENTION), help=f"default: {', '.join(PEERS)}")
    parser.add_argument("--h", type=int, default=4)
    parser.add_argument("--d", type=int, default=64)
    parser.add_argument("--s", type=int, action="append", help="instead of 512 … 16384")
    parser.add_argument("--markdown", type=Path, default=DOCS / "attention_memory.md")
    options = parser.parse_args()
    cases = [(peer, s) for peer in options.peer or PEERS for s in options.s or SIZES]
    found = {}
    for peer, s in track(cases, "measuring", console=Console(stderr=True)):
        try:
            found[peer, s] = fresh(peer, s, options.h, options.d)
        except CannotRun as reason:
            raise SystemExit(f"attention_memory: {peer}: not run: {reason}") from reason
    text = table(found, options.h, options.d)
    page = [
        "# Memory of attention",
        "",
        f"Peak memory of one call beyond its inputs, its result included; B = 1, H = {options.h}, D = {options.d}, "
        f"{torch.get_num_threads()} threads. Linear in S is 2× of half S, quadratic 4×. torch-math writes out all "
        f"scores; it is left out where they take more than {LIMIT / MIB:.0f} MiB.",
        "",
        text,
    ]
    options.markdown.parent.mkdir(parents=True, exist_ok=True)
    options.markdown.write_text("\n".join(page) + "\n")
    print(f"{text}\n{options.markdown}")


if __name__ == "__main__":
    main()
