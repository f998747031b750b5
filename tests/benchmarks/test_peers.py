"""The shapes and the peers of the benchmarks."""

from __future__ import annotations

import pytest
import torch
from peer import CannotRun, Peer, pack_nibbles, quantize_groups, tcompress_linear
from peers import BASELINE, OPS
from shapes import LINEAR_SHAPES


def test_shapes_are_unique():
    names = [str(shape) for shape in LINEAR_SHAPES]
    assert len(set(names)) == len(names)
    sizes = {(shape.m, shape.k, shape.n) for shape in LINEAR_SHAPES}
    assert {(512, 1024, 4096), (1, 4096, 14336), (1, 4096, 32000)} <= sizes


@pytest.mark.parametrize("op", OPS)
def test_every_group_divides_every_shape(op: str):
    assert next(iter(OPS[op])) == BASELINE
    for peer in OPS[op].values():
        assert all(shape.k % (peer.group or 1) == 0 for shape in LINEAR_SHAPES)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in OPS[op] if name.startswith("torch-")])
def test_torchs_layers_compute_the_product(op: str, name: str):
    x, w, b = torch.randn(4, 128), torch.randn(64, 128) / 128**0.5, torch.randn(64)
    expected = x.double() @ w.double().t() + b
    try:
        linear = OPS[op][name].build(x, w, b)
    except CannotRun as reason:
        pytest.skip(str(reason))
    with torch.inference_mode():
        error = (linear().double() - expected).norm() / expected.norm()
    assert error < OPS[op][name].tolerance


def test_a_peer_that_cannot_run_says_why():
    tensors = torch.randn(1, 32), torch.randn(8, 32), torch.randn(8)

    def without_package(*args: object):
        import no_such_package  # noqa: F401

    with pytest.raises(CannotRun, match="no_such_package is not installed"):
        Peer(without_package, 8).build(*tensors)
    with pytest.raises(CannotRun, match="no scheme W9A9"):
        Peer(tcompress_linear("W9A9"), 8).build(*tensors)


def test_groups_and_nibbles():
    w = torch.randn(3, 64)
    q, scale = quantize_groups(w, 32)
    assert q.shape == (3, 2, 32)
    assert int(q.abs().max()) == 7
    torch.testing.assert_close((q * scale).flatten(1), w, rtol=0, atol=float(scale.max()) / 2 * 1.001)
    packed = pack_nibbles(q + 8)
    assert torch.equal(torch.stack([packed & 15, packed >> 4], -1).flatten(2).to(torch.int8) - 8, q)


def test_weight_bytes():
    assert Peer(tcompress_linear("W8A8"), 8).weight_bytes(n=10, k=64) == 10 * 64 + 10 * 4
    assert Peer(tcompress_linear("W4A8-g32"), 4, 32).weight_bytes(n=10, k=64) == 10 * 32 + 10 * 2 * 4
    assert Peer(tcompress_linear("none"), 32).weight_bytes(n=10, k=64) == 10 * 64 * 4
