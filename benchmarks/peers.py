"""The ops that are compared, with the shapes and the peers of each.

A peer runs in a process of its own (`run.py` starts one each): idle worker threads of another library spin and slow
whoever is timed beside them. All peers get the same float32 inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import attention_peers
import int4_peers
import int8_peers
import sparse_peers
from attention import Attention
from deepsparse_linear import VERSION
from linear import Linear
from peer import Peer
from problem import Problem, Shape
from shapes import ATTENTION_SHAPES, DECODE_SHAPES, LINEAR_SHAPES, SPARSE_SHAPES
from sparse import SparseLinear


@dataclass(frozen=True)
class Op:
    """A table.

    Attributes:
        peers: by name, in the order of the table; the first is the baseline.
        sizes: what the numbers in a shape's name are. reads: what the GB/s count.
        error: the column of relative_error. cosine: whether there is a column of it.
        remark: what else the reader of the page should know.
    """

    problem: Problem[Any]
    shapes: Sequence[Shape]
    peers: Mapping[str, Peer]
    sizes: str
    reads: str
    error: str = "relative error"
    cosine: bool = False
    remark: str = ""


def _linear(peers: Mapping[str, Peer]) -> Op:
    return Op(Linear(), LINEAR_SHAPES, peers, "M×K×N", "the packed weight with its scales")


def _sparse() -> Op:
    sizes, reads = "M×K×N-pattern-zeros", "the weights that are not zero, or all of a dense layer,"
    remark = (
        "GMAC/s counts the zeros too: what a dense layer would have to do. The error is against the pruned weight. "
        f"DeepSparse {VERSION} times itself, in its own process."
    )
    return Op(SparseLinear(), SPARSE_SHAPES, sparse_peers.PEERS, sizes, reads, remark=remark)


def _attention(shapes: Sequence[Shape], peers: Mapping[str, Peer]) -> Op:
    sizes, reads = "B×H[:Hkv]×Sq×Skv×D", "K and V with their scales"
    return Op(Attention(), shapes, peers, sizes, reads, "Σ|Δ| / Σ|O|", cosine=True)


OPS: dict[str, Op] = {
    "int8_linear": _linear(int8_peers.PEERS),
    "int4_linear": _linear(int4_peers.PEERS),
    "sparse_linear": _sparse(),
    "attention": _attention(ATTENTION_SHAPES, attention_peers.ATTENTION),
    "decode_attention": _attention(DECODE_SHAPES, attention_peers.DECODE),
}
BASELINE = "torch-fp32"
