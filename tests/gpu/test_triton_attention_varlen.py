"""Attention over sequences laid end to end, in Triton's interpreter: each sequence is what the dense kernel makes of it
alone, bit for bit, and close to float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import triton_cases

triton_cases.require()

from guarded import guarded, outcome  # noqa: E402
from tcompress.kernels.triton.attention import attention  # noqa: E402
from tcompress.kernels.triton.attention_sequences import blocks  # noqa: E402
from tcompress.kernels.triton.attention_tiles import attention_tile  # noqa: E402
from tcompress.kernels.triton.attention_varlen import attention_varlen  # noqa: E402

from tcompress import quantized_attention_varlen, use_backend  # noqa: E402

TILE = attention_tile(32, 32, 4, 2)
LENGTHS = [  # of queries, of keys
    ([5], [7]),
    ([1, 1, 1], [1, 1, 1]),
    ([0, 3, 0], [4, 0, 0]),
    ([1, 32, 7, 0, 33], [1, 64, 70, 5, 29]),
    ([13, 13], [130, 1]),
]
OPTIONS = [
    {},
    {"right": 0},
    {"right": 0, "left": 8, "bottom_right": True},
    {"softcap": 3.0, "scale": -0.2},
    {"left": 20, "right": 3},
]


def random(*shape, dtype=torch.float16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def packed(lengths, heads=2, kv_heads=1, d=18, dv=5, dtype=torch.float16):
    rows, tokens = (sum(x) for x in lengths)
    q, k = random(rows, heads, d, dtype=dtype), random(tokens, kv_heads, d, dtype=dtype, seed=1) + 1
    v = random(tokens, kv_heads, dv, dtype=dtype, seed=2)
    return q, k, v, offsets(lengths[0]), offsets(lengths[1])


def alone(q, k, v, rows, tokens, **options):
    """The dense kernel's output and logarithm of each sequence, laid end to end."""
    out, lse = torch.zeros(len(q), q.shape[1], v.shape[2], dtype=q.dtype), torch.zeros(q.shape[1], len(q))
    for mine, theirs in zip(pairwise(rows.tolist()), pairwise(tokens.tolist()), strict=True):
        mine, theirs = slice(*mine), slice(*theirs)
        one = (x.transpose(0, 1)[None] for x in (q[mine], k[theirs], v[theirs]))
        part, part_lse = attention(*one, return_lse=True, **options)
        out[mine], lse[:, mine] = part[0].transpose(0, 1), part_lse[0]
    return out, lse


#: Each of the lengths and of the options once; the others where there is time.
PAIRS = [
    pytest.param(lengths, options, id=f"{lengths} {options}", marks=[] if i == j else pytest.mark.slow)
    for i, lengths in enumerate(LENGTHS)
    for j, options in enumerate(OPTIONS)
]


@pytest.mark.parametrize(("lengths", "options"), PAIRS)
def test_each_sequence_by_itself(lengths, options):
    dtype = (torch.float16, torch.bfloat16, torch.float32)[OPTIONS.index(options) % 3]
    arguments = packed(lengths, dtype=dtype)
    out, lse = attention_varlen(*arguments, return_lse=True, tile=TILE, **options)
    expected, expected_lse = alone(*arguments, tile=TILE, **options)
    assert out.is_contiguous()
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_several_pieces_of_a_mean_and_the_default_tile():
    arguments = packed(([40, 150], [600, 270]), d=64, dv=64)
    out, _ = attention_varlen(*arguments, right=0, bottom_right=True)
    expected, _ = alone(*arguments, right=0, bottom_right=True, tile=attention_tile(64, 64, 4, 2, ones=True))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("causal", [False, True, "bottom_right"])
def test_the_op_against_float64(causal):
    """32-bit offsets, through `quantized_attention_varlen`."""
    lengths = [70, 1, 64, 0, 130]
    q, k, v, rows, _ = packed((lengths, lengths), d=64, dv=64)
    options = {"is_causal": causal, "enable_gqa": True, "return_lse": True}
    with use_backend("triton"):
        out, lse = quantized_attention_varlen(q, k, v, rows.int(), rows.int(), bits=8, **options)
    error = size = 0.0
    for first, end in pairwise(rows.tolist()):
        one = [x[first:end].transpose(0, 1).double() for x in (q, k, v)]
        s = one[0] @ one[1].repeat_interleave(2, 0).mT / 8
        if causal:
            s = s.masked_fill(torch.ones(s.shape[1:]).triu(1).bool(), -math.inf)
        expected = torch.softmax(s, -1) @ one[2].repeat_interleave(2, 0)
        error += (out[first:end].transpose(0, 1) - expected).abs().sum().item()
        size += expected.abs().sum().item()
        if end > first:
            assert (lse[:, first:end] - torch.logsumexp(s, -1)).abs().max() < 0.06
    assert error <= 0.021 * size


@pytest.mark.parametrize("lengths", LENGTHS[2:4], ids=str)
def test_each_sequence_in_12_bits(lengths):
    """Through the op, whose tile is that of the dense kernel for so few queries."""
    arguments = packed(lengths)
    with use_backend("triton"):
        options = {"is_causal": "bottom_right", "enable_gqa": True, "return_lse": True}
        out, lse = quantized_attention_varlen(*arguments, bits=12, **options)
    expected, expected_lse = alone(*arguments, right=0, bottom_right=True, bits=12)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_what_is_not_finite_stays_in_its_sequence():
    q, k, v, rows, tokens = packed(([33, 20, 40], [33, 20, 40]), heads=4, kv_heads=2, dtype=torch.float32)
    k[40, 0, 3] = math.inf
    v[20, 1, 2] = math.nan
    out, _ = attention_varlen(q, k, v, rows, tokens, tile=TILE)
    bad = out.isnan().any(-1)
    assert bad[33:53, :2].all()  # the heads that share the first of k
    assert not bad[33:53, 2:].any()
    assert bad[:33, 2:].all()
    assert not bad[:33, :2].any()
    assert not bad[53:].any()


def test_a_buffer_that_is_not_full():
    """Behind the last offset: zeros. Nothing of what lies there reaches a sequence."""
    lengths = ([9, 30], [40, 31])
    q, k, v, rows, tokens = packed(lengths)
    room = [torch.cat([x, torch.full_like(x[:30], math.nan)]) for x in (q, k, v)]
    out, lse = attention_varlen(*room, rows, tokens, return_lse=True, tile=TILE)
    expected, expected_lse = alone(q, k, v, rows, tokens, tile=TILE)
    assert torch.equal(out[:39], expected)
    assert torch.equal(lse[:, :39], expected_lse)
    assert (out[39:] == 0).all()
    assert (lse[:, 39:] == -math.inf).all()


def test_strides_and_no_keys():
    q, k, v, rows, tokens = packed(([9, 30], [40, 31]))
    strided = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (q, k, v)]
    out, _ = attention_varlen(*strided, rows, tokens, tile=TILE)
    assert torch.equal(out, attention_varlen(q, k, v, rows, tokens, tile=TILE)[0])
    out, lse = attention_varlen(q, k[:0], v[:0], rows, tokens * 0, return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    out, lse = attention_varlen(q[:0], k, v, rows * 0, tokens, return_lse=True)
    assert out.shape == (0, 2, 5)
    assert lse.shape == (2, 0)


@pytest.mark.parametrize("at_start", [False, True])
def test_nothing_is_read_out_of_bounds(at_start):
    """Whatever the offsets on a GPU hold: there nobody looks at them."""
    q, k, v, rows, tokens = packed(([9, 30], [40, 31]))

    def run():
        x = [guarded(t, at_start) for t in (q, k, v)]
        for mine, theirs in (
            (rows, tokens),
            (rows * 0, tokens * 0),
            (torch.tensor([-5, 1000, 3]), torch.tensor([70, 2, 2**40])),
            (torch.tensor([39, 0, 39]), torch.tensor([0, 71, 71])),
        ):
            attention_varlen(*x, guarded(mine, at_start), guarded(theirs, at_start), right=0, tile=TILE)

    assert outcome(run) == "ok"


@pytest.mark.parametrize("block", [1, 32, 64])
def test_blocks_of_sequences_do_not_overlap(block):
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 40):
        lengths = torch.randint(0, 130, (count,), generator=generator) * (torch.rand(count) > 0.3)
        at = offsets(lengths.tolist()).tolist()
        starts = [o // block + n for n, o in enumerate(at)]
        for n, length in enumerate(lengths.tolist()):
            assert starts[n] + -(-length // block) <= starts[n + 1]
        room = at[-1] + 50  # of a buffer that is not full
        assert starts[-1] + -(-(room - at[-1]) // block) <= blocks(room, count, block)


def test_lengths_change_nothing_about_the_launches(monkeypatch):
    """So that a CUDA graph may be replayed with others."""
    from triton.runtime.interpreter import InterpretedFunction

    seen = []
    monkeypatch.setattr(
        InterpretedFunction,
        "run",
        lambda self, *args, grid, **options: seen.append(
            (self.fn.__name__, grid, [x.shape if isinstance(x, torch.Tensor) else x for x in args], str(options))
        ),
    )
    q, k, v, rows, tokens = packed(([9, 30], [40, 31]))
    attention_varlen(q, k, v, rows, tokens, right=0)
    first, seen[:] = seen[:], []
    attention_varlen(q, k, v, offsets([39, 0]), offsets([1, 70]), right=0)
    assert len(first) == 3
    assert seen == first
