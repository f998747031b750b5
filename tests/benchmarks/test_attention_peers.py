"""The attentions of the benchmarks."""

from __future__ import annotations

import pytest
import torch
from attention import Attention
from attention_peer import AttentionPeer, torch_sdpa
from peer import CannotRun
from peers import OPS
from problem import Problem
from shapes import ATTENTION_SHAPES, DECODE_SHAPES, AttentionShape

SHAPES = {
    "attention": [
        AttentionShape("tiny", 1, 4, 4, 20, 20, 16),
        AttentionShape("tiny", 1, 4, 2, 20, 20, 16, causal=True),
    ],
    "decode_attention": [AttentionShape("tiny", 1, 4, 2, 1, 70, 16)],
}
#: Those of other packages take long to import.
CASES = [
    pytest.param(op, name, marks=[] if name.startswith(("torch-", "tcompress-")) else pytest.mark.slow)
    for op in SHAPES
    for name in OPS[op].peers
]


def test_shapes():
    assert {(1, 12, 512, 64), (1, 12, 2048, 64), (1, 32, 2048, 128)} <= {
        (s.b, s.h, s.sq, s.d) for s in ATTENTION_SHAPES
    }
    assert all(s.h % s.h_kv == 0 for s in [*ATTENTION_SHAPES, *DECODE_SHAPES])
    assert all(s.sq == s.skv for s in ATTENTION_SHAPES), "so that both conventions of a causal mask agree"
    assert all(s.sq == 1 and not s.causal for s in DECODE_SHAPES)


def test_multiply_adds_count_visible_pairs():
    assert AttentionShape("a", 2, 3, 3, 5, 7, 11).macs == 2 * 2 * 3 * 5 * 7 * 11
    assert AttentionShape("a", 1, 1, 1, 4, 4, 1, causal=True).macs == 2 * (1 + 2 + 3 + 4)
    assert AttentionShape("a", 1, 1, 1, 2, 4, 1, causal=True).macs == 2 * (3 + 4)
    assert str(AttentionShape("a", 1, 4, 2, 5, 5, 16, causal=True)) == "a-1x4:2x5x5x16-causal"


def test_bytes_of_keys_and_values():
    shape = AttentionShape("a", 1, 4, 2, 1, 100, 64)
    assert AttentionPeer(torch_sdpa(torch.float32), 32).read_bytes(shape) == 2 * 2 * 100 * 64 * 4
    assert AttentionPeer(torch_sdpa(torch.float32), 8, row_bits=32).read_bytes(shape) == 2 * 2 * 100 * (64 + 4)


@pytest.mark.parametrize("shape", SHAPES["attention"], ids=str)
def test_expected_is_torchs_attention(shape: AttentionShape):
    problem = Attention()
    inputs = q, k, v, causal = problem.inputs(shape)
    wide = [x.double() for x in (q, k, v)]
    grouped = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(problem.expected(*inputs), grouped)


def test_errors():
    expected = torch.tensor([1.0, -3.0], dtype=torch.float64)
    errors = Attention().errors(torch.tensor([1.5, -3.5]), expected)
    assert errors["relative_error"] == pytest.approx(0.25)
    assert errors["cosine"] == pytest.approx(12 / (14.5 * 10) ** 0.5)


@pytest.mark.parametrize(("op", "name"), CASES)
def test_a_peer_is_within_its_tolerance(op: str, name: str):
    problem: Problem = OPS[op].problem
    reasons = []
    for shape in SHAPES[op]:
        inputs = problem.inputs(shape)
        try:
            call = OPS[op].peers[name].build(*inputs)
        except CannotRun as reason:
            reasons.append(str(reason))
            continue
        with torch.inference_mode():
            for _ in range(3):  # over a cache, the calls write into it or append to it
                got = call()
        assert got.shape == inputs[0].shape
        assert problem.errors(got, problem.expected(*inputs))["relative_error"] < OPS[op].peers[name].tolerance
    if len(reasons) == len(SHAPES[op]):
        pytest.skip("; ".join(dict.fromkeys(reasons)))
