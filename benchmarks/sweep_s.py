"""Times our attention and torch's float32 one against the number of tokens S: 1 … 33, then 48, 64, … 512, 12 heads.

    python benchmarks/sweep_s.py [--bits auto|8|12] [--h 12] [--d 64] [--causal] [--seconds 0.5]
                                 [--json FILE] [--png FILE]

Both are called in turn in one process. Prints the worst ratio of our time to torch's, the largest step from an S to
S + 1 and every S where ours is slower.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent))
import sweep
import torch
from attention import Attention
from attention_peer import tcompress_attention, torch_sdpa
from peer import Call
from shapes import AttentionShape

SS = [*range(1, 34), *range(48, 513, 16)]
BITS: dict[str, Literal["auto", 8, 12]] = {"auto": "auto", "8": 8, "12": 12}


def attentions(bits: Literal["auto", 8, 12], h: int, d: int, causal: bool) -> sweep.Sweep:
    """Over the tokens, as many queries as keys, of h heads of d."""

    def calls(s: int) -> tuple[Call, Call]:
        inputs = Attention().inputs(AttentionShape("sweep", 1, h, h, s, s, d, causal))
        return tcompress_attention(bits)(*inputs), torch_sdpa(torch.float32)(*inputs)

    about = {"bits": bits, "h": h, "d": d, "causal": causal}
    return sweep.Sweep("S", "tokens, queries and keys", SS, calls, about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", choices=list(BITS), default="auto")
    parser.add_argument("--h", type=int, default=12)
    parser.add_argument("--d", type=int, default=64)
    parser.add_argument("--causal", action="store_true")
    sweep.add_options(parser, "S")
    options = parser.parse_args()
    bits, h, d, causal = options.bits, options.h, options.d, options.causal
    stem = f"sweep_s_{bits}_{h}x{d}{'_causal' if causal else ''}"
    title = f"attention, {h} heads of {d}{', causal' if causal else ''}, bits = {bits}"
    sweep.run(attentions(BITS[bits], h, d, causal), options, stem, title)


if __name__ == "__main__":
    main()
