"""The sparse linear layers of the benchmarks."""

from __future__ import annotations

import pytest
import torch
from linear_peer import LinearPeer
from peer import CannotRun
from peers import OPS
from shapes import PATTERNS, SPARSE_SHAPES, LinearShape, SparseShape
from sparse import SparseLinear, in_blocks, kept_blocks, prune
from sparse_peer import SparsePeer, ours_float, ours_int8

PEERS = OPS["sparse_linear"].peers
#: Those of other packages take long to import, or to install.
CASES = [
    pytest.param(name, marks=[] if name.startswith(("torch-", "tcompress-", "scipy-")) else pytest.mark.slow)
    for name in PEERS
]
TINY = [SparseShape("tiny", 5, 256, 64, pattern, percents[0]) for pattern, percents in PATTERNS.items()]


def test_shapes():
    sizes = {(s.m, s.k, s.n) for s in SPARSE_SHAPES}
    assert sizes == {(128, 768, 768), (128, 768, 3072), (128, 4096, 4096), (1, 4096, 4096)}
    for size in sizes:
        found = [(s.pattern, s.percent) for s in SPARSE_SHAPES if (s.m, s.k, s.n) == size]
        assert found == [(p, percent) for p in PATTERNS for percent in PATTERNS[p]]
    assert str(TINY[1]) == "tiny-5x256x64-2:4-50%"
    assert TINY[0].macs == 5 * 256 * 64, "of a dense layer"


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(
    ("pattern", "r", "c"), [("unstructured", 1, 1), ("1x4", 1, 4), ("8x4", 8, 4), ("16x16", 16, 16)]
)
def test_the_smallest_blocks_are_pruned(pattern: str, r: int, c: int, sparsity: float):
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    pruned = prune(w, pattern, sparsity)
    blocks = w.shape[0] * w.shape[1] // (r * c)
    assert kept_blocks(pruned, r, c) * blocks == pytest.approx(blocks - round(sparsity * blocks))
    assert in_blocks(pruned, r, c)
    norms = w.view(32 // r, r, 64 // c, c).square().sum((1, 3))
    kept = pruned.view(32 // r, r, 64 // c, c).square().sum((1, 3)) > 0
    assert torch.equal(pruned[pruned != 0], w[pruned != 0])
    if sparsity:
        assert norms[kept].min() > norms[~kept].max()


def test_two_of_four_stay():
    pruned = prune(torch.tensor([[1.0, -3.0, 2.0, 0.5, 4.0, 0.0, 0.0, 5.0]]), "2:4", 0.5)
    assert pruned.tolist() == [[0.0, -3.0, 2.0, 0.0, 4.0, 0.0, 0.0, 5.0]]


def test_bytes_count_what_is_kept():
    assert SparsePeer(ours_float("8x4"), 32).read_bytes(SparseShape("a", 1, 64, 10, "8x4", 75)) == 64 * 10 // 4 * 4
    assert LinearPeer(ours_float("8x4"), 32).read_bytes(LinearShape("a", 1, 64, 10)) == 64 * 10 * 4


@pytest.mark.parametrize("name", CASES)
def test_a_peer_is_within_its_tolerance(name: str):
    problem, reasons = SparseLinear(), []
    for shape in TINY:
        inputs = problem.inputs(shape)
        try:
            call = PEERS[name].build(*inputs)
        except CannotRun as reason:
            reasons.append(str(reason))
            continue
        with torch.inference_mode():
            got = call()
        assert got.shape == (shape.m, shape.n)
        assert problem.errors(got, problem.expected(*inputs))["relative_error"] < PEERS[name].tolerance
    if len(reasons) == len(TINY):
        pytest.skip("; ".join(dict.fromkeys(reasons)))


def test_layouts_that_would_keep_the_zeros_say_so():
    x, w, b = SparseLinear().inputs(SparseShape("tiny", 2, 64, 64, "unstructured", 80))
    with pytest.raises(CannotRun, match="not in blocks of 8x4"):
        ours_int8("8x4")(x, w, b)
    with pytest.raises(CannotRun, match="more than two of four"):
        ours_int8("2:4")(x, w, b)
    with pytest.raises(CannotRun, match="not in such of 16 or 4"):
        PEERS["torch-bsr"].build(x, w, b)


def test_an_op_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    from tcompress import ops

    monkeypatch.delattr(ops, "sparse_linear", raising=False)
    x, w, b = SparseLinear().inputs(SparseShape("tiny", 2, 64, 64, "unstructured", 80))
    with pytest.raises(CannotRun, match="no sparse_linear"):
        ours_float("unstructured")(x, w, b)
