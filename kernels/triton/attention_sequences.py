"""Sequences of different lengths laid end to end, cut into blocks without anyone waiting for their lengths.

Sequence n has the tokens offsets[n] to offsets[n + 1] - 1. Its blocks of BLOCK tokens have the numbers from

    start(n) = offsets[n] // BLOCK + n

on. That leaves room for all of them, start(n + 1) - start(n) >= ceil(length / BLOCK), and needs T // BLOCK + N numbers
in all, which the host knows; some stay unused. A program finds its sequence by bisection.

Behind the last offset there is one more sequence, to the end of the tensor: a buffer may be longer than what it holds.
Offsets are held to [0, T], so that wrong ones cannot lead out of the tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def offset_of(OFFSETS, n, sequences, tokens):
    """Where sequence n begins, 0 <= n <= sequences + 1."""
    at = tl.load(OFFSETS + tl.minimum(n, sequences))
    at = tl.minimum(tl.maximum(at, 0), tokens).to(tl.int32)
    return tl.where(n == 0, 0, tl.where(n > sequences, tokens, at))


@triton.jit
def start_block(OFFSETS, n, sequences, tokens, BLOCK: tl.constexpr):
    return offset_of(OFFSETS, n, sequences, tokens) // BLOCK + n


@triton.jit
def sequence_of(OFFSETS, block, sequences, tokens, BLOCK: tl.constexpr):
    """The last sequence n <= sequences that starts at a block <= `block`."""
    low, high = 0, sequences
    while low < high:
        middle = (low + high + 1) // 2
        before = start_block(OFFSETS, middle, sequences, tokens, BLOCK) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    return low


@triton.jit
def length_of(OFFSETS, n, sequences, tokens):
    first = offset_of(OFFSETS, n, sequences, tokens)
    return tl.maximum(offset_of(OFFSETS, n + 1, sequences, tokens) - first, 0)


def blocks(tokens: int, sequences: int, block: int) -> int:
    """Numbers that `sequences` + 1 sequences take."""
    return tokens // block + sequences + 1
