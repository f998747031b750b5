"""The linear layers of the benchmarks, and what all peers share."""

from __future__ import annotations

import pytest
import torch
from linear_peer import LinearPeer, pack_nibbles, quantize_groups, tcompress_linear
from peer import CannotRun
from peers import BASELINE, OPS
from shapes import LINEAR_SHAPES, LinearShape

LINEAR = [op for op in OPS if op.endswith("_linear")]


@pytest.mark.parametrize("op", OPS)
def test_shapes_are_unique_and_the_baseline_is_the_first(op: str):
    names = [str(shape) for shape in OPS[op].shapes]
    assert len(set(names)) == len(names)
    assert next(iter(OPS[op].peers)) == BASELINE


def test_linear_shapes():
    sizes = {(shape.m, shape.k, shape.n) for shape in LINEAR_SHAPES}
    assert {(512, 1024, 4096), (1, 4096, 14336), (1, 4096, 32000)} <= sizes


@pytest.mark.parametrize("op", LINEAR)
def test_every_group_divides_every_shape(op: str):
    for peer in OPS[op].peers.values():
        assert isinstance(peer, LinearPeer)
        assert all(shape.k % (peer.group or 1) == 0 for shape in LINEAR_SHAPES)


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in LINEAR for name in OPS[op].peers if name.startswith("torch-")]
)
def test_torchs_layers_compute_the_product(op: str, name: str):
    x, w, b = torch.randn(4, 128), torch.randn(64, 128) / 128**0.5, torch.randn(64)
    expected = x.double() @ w.double().t() + b
    try:
        linear = OPS[op].peers[name].build(x, w, b)
    except CannotRun as reason:
        pytest.skip(str(reason))
    with torch.inference_mode():
        error = (linear().double() - expected).norm() / expected.norm()
    assert error < OPS[op].peers[name].tolerance


def test_a_peer_that_cannot_run_says_why():
    tensors = torch.randn(1, 32), torch.randn(8, 32), torch.randn(8)

    def without_package(*args: object):
        import no_such_package  # noqa: F401

    with pytest.raises(CannotRun, match="no_such_package is not installed"):
        LinearPeer(without_package, 8).build(*tensors)
    with pytest.raises(CannotRun, match="no scheme W9A9"):
        LinearPeer(tcompress_linear("W9A9"), 8).build(*tensors)


def test_groups_and_nibbles():
    w = torch.randn(3, 64)
    q, scale = quantize_groups(w, 32)
    assert q.shape == (3, 2, 32)
    assert int(q.abs().max()) == 7
    torch.testing.assert_close((q * scale).flatten(1), w, rtol=0, atol=float(scale.max()) / 2 * 1.001)
    packed = pack_nibbles(q + 8)
    assert torch.equal(torch.stack([packed & 15, packed >> 4], -1).flatten(2).to(torch.int8) - 8, q)


def test_bytes_of_a_weight():
    shape = LinearShape("tiny", m=1, k=64, n=10)
    assert LinearPeer(tcompress_linear("W8A8"), 8).read_bytes(shape) == 10 * 64 + 10 * 4
    assert LinearPeer(tcompress_linear("W4A8-g32"), 4, group=32).read_bytes(shape) == 10 * 32 + 10 * 2 * 4
    assert LinearPeer(tcompress_linear("none"), 32).read_bytes(shape) == 10 * 64 * 4
