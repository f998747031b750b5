"""Times our layer and torch's float32 one against the number of tokens M: 1 … 64, then 80, 96, … 512, K = N = 1024.

    python benchmarks/sweep_m.py [--scheme W8A7] [--k 1024] [--n 1024] [--seconds 0.5] [--json FILE] [--png FILE]

Both are called in turn in one process. Prints the worst ratio of our time to torch's, the largest step from an M to
M + 1 and every M where ours is slower.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import sweep
from linear_peer import tcompress_linear, torch_fp32
from peer import Call

MS = [*range(1, 65), *range(80, 513, 16)]


def layers(scheme: str, k: int, n: int) -> sweep.Sweep:
    """Over the tokens of a layer from k to n features."""
    generator = torch.Generator().manual_seed(0)
    w, b = torch.randn(n, k, generator=generator) / k**0.5, torch.randn(n, generator=generator)

    def calls(m: int) -> tuple[Call, Call]:
        x = torch.randn(m, k, generator=generator)
        return tcompress_linear(scheme)(x, w, b), torch_fp32(x, w, b)

    return sweep.Sweep("M", "tokens a call", MS, calls, {"scheme": scheme, "k": k, "n": n})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="W8A7")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--n", type=int, default=1024)
    sweep.add_options(parser, "M")
    options = parser.parse_args()
    scheme, k, n = options.scheme, options.k, options.n
    sweep.run(layers(scheme, k, n), options, f"sweep_m_{scheme}_{k}x{n}", f"{scheme}, K = {k}, N = {n}")


if __name__ == "__main__":
    main()
