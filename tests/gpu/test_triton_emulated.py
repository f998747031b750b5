"""The Triton kernels as compiled for 8.0 and 8.9, run in the PTX emulator: integers bit for bit, floats within bounds
that follow from the roundings on the way. The emulator's checks of memory, races and copies hold throughout."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import triton_cases

triton_cases.require_compiler()

from emulated import emulated  # noqa: E402
from tcompress.kernels.triton.attention import attention  # noqa: E402
from tcompress.kernels.triton.attention_tiles import attention_tile  # noqa: E402
from tcompress.kernels.triton.attention_varlen import attention_varlen  # noqa: E402
from tcompress.kernels.triton.linear import linear  # noqa: E402
from tcompress.kernels.triton.quantize_tokens import quantize_tokens  # noqa: E402
from tcompress.kernels.triton.tiles import TileConfig  # noqa: E402

import tcompress.ops  # noqa: E402, F401
from tcompress.ops.attention_numbers import quantize_tokens as reference_integers  # noqa: E402

# the names in the package are the functions
per_token = sys.modules["tcompress.ops.quantize_per_token"]
int8_linear = sys.modules["tcompress.ops.int8_linear"]

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
#: Half a unit in the last place, relative.
HALF_UNIT = {F16: 2.0**-11, BF16: 2.0**-8, F32: 2.0**-24}


def on_both(names: str, cases: list, quick: int = 100) -> pytest.MarkDecorator:
    """The first `quick` cases on 8.0 and the first one on 8.9; the others where there is time."""
    both = []
    for i, case in enumerate(cases):
        for architecture, until in ((80, quick), (89, 1)):
            marks = [] if i < until else pytest.mark.slow
            both.append(pytest.param(architecture, *case, marks=marks))
    return pytest.mark.parametrize(f"architecture,{names}", both)


def random(*shape, dtype=F32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.contiguous().view(torch.int32))


QUANTIZED = [  # rows, values, type, bits, symmetric
    (3, 17, F32, 8, True),
    (5, 300, BF16, 7, False),
    (1, 1, F16, 8, True),
    (3, 64, F16, 4, False),
    (4, 300, F16, 2, False),
    (2, 1000, BF16, 8, True),
]


@on_both("m,k,dtype,bits,symmetric", QUANTIZED, quick=4)
def test_quantizer_is_exact(architecture, m, k, dtype, bits, symmetric):
    x = random(m, k, dtype=dtype) * 3
    if m > 2:
        x[1], x[2, -1], x[0, 0] = 0, math.nan, 1e4
    with emulated(architecture):
        q, scale, zero = quantize_tokens(x, bits, symmetric)
    expected, expected_scale, expected_zero = per_token.reference(x, bits, symmetric)
    assert torch.equal(q[:, :k].int(), expected.int())
    assert (q[:, k:] == 0).all()
    assert same_bits(scale, expected_scale[:, 0])
    assert torch.equal(zero, expected_zero[:, 0])


def test_quantizer_of_long_rows_and_strides():
    with emulated(80):
        for x in (random(2, 9001), random(40, 6).t()[::2]):
            for bits, symmetric in ((8, True), (7, False)):
                q, scale, _ = quantize_tokens(x, bits, symmetric)
                expected, expected_scale, _ = per_token.reference(x, bits, symmetric)
                assert torch.equal(q[:, : x.shape[1]].int(), expected.int())
                assert same_bits(scale, expected_scale[:, 0])


def arguments(m, n, k, dtype=F32):
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(m))
    return random(m, k, dtype=dtype), weight, random(n).abs() * 0.01


SUMS = [  # tokens, channels, products, bits, symmetric
    (1, 33, 100, 8, True),
    (1, 40, 256, 7, False),
    (5, 40, 64, 8, True),
    (17, 31, 71, 7, False),
    (33, 70, 130, 8, True),
    (65, 64, 128, 7, False),
    (130, 257, 129, 8, True),
    (1, 70, 2100, 8, True),
    (16, 31, 257, 7, False),
]


@on_both("m,n,k,bits,symmetric", SUMS, quick=6)
def test_sums_are_exact(architecture, m, n, k, bits, symmetric):
    x, weight, scale = arguments(m, n, k)
    with emulated(architecture) as gpu:
        got = linear(x, weight, scale, None, None, bits, symmetric, "none", torch.int32)
    assert gpu.launched[-1].kernel == ("linear_narrow" if m <= 32 else "linear_wide")
    assert torch.equal(got, int8_linear.reference(x, weight, scale, None, None, bits, symmetric, "none", torch.int32))


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_parts_of_k_may_end_in_any_order(m, reverse):
    x, weight, scale = arguments(m, 40, 300)
    with emulated(80, reverse):
        got = linear(x, weight, scale, out_dtype=torch.int32, tile=TileConfig(16, 32, 64, 4, 3, 4))
    assert torch.equal(got, int8_linear.reference(x, weight, scale, None, None, 8, True, "none", torch.int32))


@pytest.mark.parametrize("tile", [TileConfig(128, 128, 64, 8, 3), TileConfig(64, 32, 128, 4, 8, group=1)])
def test_other_tiles_of_many_tokens(tile):
    x, weight, scale = arguments(70, 50, 192)
    with emulated(80):
        got = linear(x, weight, scale, out_dtype=torch.int32, tile=tile)
    assert torch.equal(got, int8_linear.reference(x, weight, scale, None, None, 8, True, "none", torch.int32))


FINISHED = [
    (1, F32, "none", True), (4, F16, "gelu", False), (40, BF16, "silu", False), (40, F32, "gelu_tanh", True),
    (33, F16, "relu", False),
]  # fmt: skip


@pytest.mark.parametrize(("m", "dtype", "activation", "symmetric"), FINISHED)
def test_epilogue(m, dtype, activation, symmetric):
    n, k = 33, 70
    x, weight, scale = arguments(m, n, k, dtype)
    bias, residual = random(n, seed=5), random(m, n, dtype=dtype, seed=6)
    bits = 8 if symmetric else 7
    with emulated(80):
        got = linear(x, weight, scale, bias, None, bits, symmetric, activation, None, residual)
    sums = int8_linear.reference(x, weight, scale, None, None, bits, symmetric, "none", torch.int32)
    token_scale = per_token.reference(x, bits, symmetric)[1]
    product = sums.double() * token_scale.double() * scale.double()
    z = product + bias.double()
    y = int8_linear.activate(z, activation) + residual.double()
    # float32: the sum becomes a float, two products, one addition, 4 roundings; no activation is steeper than 1.2, and
    # each takes at most 12 operations of 1 unit on numbers up to |z|; the residual's addition; then the output's type
    unit = 2.0**-24
    before = 4 * unit * (product.abs() + bias.abs().double())
    bound = 1.2 * before + 24 * unit * z.abs() + 2 * unit * y.abs()
    bound = bound * (1 + 2.0**-7) + HALF_UNIT[dtype] * y.abs() + 1e-30
    assert got.dtype == dtype
    assert ((got.double() - y).abs() <= bound).all()


def test_rows_that_are_not_finite():
    x, weight, scale = arguments(6, 9, 40)
    x[2, 3], x[4, 0] = math.nan, math.inf
    with emulated(80):
        for rows in (x, x[2:3]):
            out = linear(rows, weight, scale)
            assert torch.equal(out.isnan().all(1), ~rows.isfinite().all(1))
            assert out.isnan().any(1).sum() == out.isnan().all(1).sum()


def exact(q, k, v, mask, seen):
    """Output, what it is bounded by (Σ p |v|), logarithm of the denominator, in float64; p of keys not seen is 0."""
    s = (q @ k.mT).masked_fill(~seen, -math.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.double()
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse[..., None]).nan_to_num(0)
    return p @ v, p @ v.abs(), lse


ATTENTION = [  # Sq, Skv, D, Dv, heads, heads of K and V, type, causal, mask
    (70, 70, 64, 64, 1, 1, F16, "top_left", None),
    (5, 131, 40, 33, 4, 2, F16, "bottom_right", None),
    (65, 67, 32, 32, 2, 1, BF16, None, "bool"),
    (33, 64, 128, 128, 1, 1, F16, "top_left", "float"),
    (3, 130, 64, 80, 2, 1, F32, None, None),
    (129, 129, 72, 130, 1, 1, F16, "top_left", "bool"),
    (1, 300, 128, 128, 8, 1, BF16, None, None),
]


@on_both("case", [(case,) for case in ATTENTION], quick=1)
def test_attention_in_12_bits(architecture, case):
    check_attention(architecture, case, 12)


@on_both("case", [(case,) for case in ATTENTION], quick=3)
def test_attention(architecture, case):
    check_attention(architecture, case, 8)


def check_attention(architecture, case, bits):
    sq, skv, d, dv, h, kv_heads, dtype, causal, kind = case
    q = random(1, sq, h, d, dtype=dtype).transpose(1, 2)
    k, v = random(1, kv_heads, skv, d, dtype=dtype, seed=1) + 2, random(1, kv_heads, skv, dv, dtype=dtype, seed=2)
    mask = None
    if kind == "bool":
        mask = random(1, 1, sq, skv, seed=3) > -0.5
        mask[0, 0, 0] = False
    elif kind == "float":
        mask = random(1, 1, sq, skv, dtype=dtype, seed=3)
        mask[0, 0, sq // 2] = -math.inf
    mask = None if mask is None else mask.expand(1, h, sq, skv)
    bottom_right = causal == "bottom_right"
    with emulated(architecture) as gpu:
        out, lse = attention(
            q, k, v, mask, bottom_right=bottom_right, causal=causal is not None, return_lse=True, bits=bits
        )
    names = [launch.kernel for launch in gpu.launched]
    assert names == ["key_sums", "quantize_queries_and_keys", "attend"]

    # the integers: those of the op for Q; K less its mean, which is summed in another order
    scale_q, scale_k, shift = integers_are_right(gpu.launched[-1], q, k, d**-0.5, bits)
    # what float64 makes of these integers
    seen = torch.ones(sq, skv, dtype=torch.bool)
    if causal:
        seen = torch.arange(skv) <= torch.arange(sq)[:, None] + (skv - sq if bottom_right else 0)
    group = h // kv_heads
    to_v = v.to(BF16) if dtype == F32 else v
    values = to_v.double().repeat_interleave(group, 1)
    expected, magnitude, expected_lse = exact(scale_q, scale_k.repeat_interleave(group, 1), values, mask, seen)
    empty = torch.isinf(expected_lse)
    assert (out[empty] == 0).all()
    assert torch.equal(empty, torch.isinf(lse))
    # P is rounded to the type of V, in the product and in its sums; both are float32 and at most 131 long; exponents of
    # at most 2^5 are off by 2^-24 of themselves a rounding, of which there are 3
    rounded = HALF_UNIT[to_v.dtype]
    relative = 2 * rounded + 131 * 2.0**-24 + 3 * 2.0**-19
    bound = relative * magnitude + HALF_UNIT[dtype] * expected.abs() + 1e-7
    assert ((out.double() - expected).abs() <= bound)[~empty].all()
    # the plain loop rounds all logarithms of a query by the same, below a unit of the integer scores
    _, q_scale, _, k_scale, *_ = gpu.launched[-1].args
    unit = (q_scale.max() * k_scale.max()).item() * math.log(2)
    bound = unit + rounded + 2.0**-19 * (1 + expected_lse.abs())
    assert ((lse.double() - expected_lse - shift).abs() <= bound)[~empty].all()


def integers_are_right(launch, q, k, scale, bits=8):
    """Q and K as float64 from what the attention kernel was given, Q times log 2 of it, and what smoothing K takes from
    the logarithm."""
    (b, h, sq, d), (_, kv_heads, skv, _) = q.shape, k.shape
    x_q, q_scale, x_k, k_scale, *_ = launch.args
    shift = launch.args[7]
    if bits == 12:
        x_q, x_k = (32 * high.int() + low for high, low in (x.chunk(2, -1) for x in (x_q, x_k)))
    got = x_q.view(b, h, -1, x_q.shape[-1])[:, :, :sq]
    expected, expected_scale = reference_integers(q.float(), bits)
    assert torch.equal(got[..., :d].float(), expected)
    assert (got[..., d:] == 0).all()
    found = q_scale.view(b, h, -1)[:, :, :sq]
    torch.testing.assert_close(found, expected_scale * scale * math.log2(math.e), rtol=3e-7, atol=0)
    back = x_k.view(b, kv_heads, k_scale.shape[1], -1, x_k.shape[-1]).double() * k_scale.view(b, kv_heads, -1, 1, 1)
    back = back.view(b, kv_heads, -1, x_k.shape[-1])[:, :, :skv, :d]
    mean = k.double().mean(2, keepdim=True)
    # half a step, and what float32 makes of the mean: sums of at most 131 values of at most 8
    assert ((back - (k.double() - mean)).abs() <= k_scale.max() * 0.5001 + 131 * 8 * 2.0**-24).all()
    queries = got[..., :d].double() * found[..., None].double() * math.log(2)
    through = shift.view(b, h, -1)[:, :, :sq].double() * scale
    by_hand = (q.double() @ mean.mT.repeat_interleave(h // kv_heads, 1))[..., 0] * scale
    assert ((through - by_hand).abs() <= 1e-4).all()
    return queries, back, through


def test_the_order_of_blocks_changes_nothing():
    q, k, v = (random(1, 2, 130, 64, dtype=F16, seed=i) for i in range(3))
    results = []
    for reverse in (False, True):
        with emulated(80, reverse):
            results.append(attention(q, k, v, causal=True)[0])
    assert torch.equal(*results)


def test_a_query_that_is_not_finite_spoils_itself():
    q, k, v = (random(1, 1, 100, 32, seed=i) for i in range(3))
    q[0, 0, 7, 3] = math.nan
    with emulated(80):
        out, _ = attention(q, k, v, causal=True)
    assert out[0, 0].isnan().any(-1).nonzero().flatten().tolist() == [7]


def test_sequences_laid_end_to_end_as_the_dense_kernel_has_them():
    tile = attention_tile(64, 32, 4, 2, ones=True)
    lengths, tokens = [0, 5, 70, 75], [0, 33, 70, 103]
    q, k, v = random(75, 1, 32, dtype=F16), random(103, 1, 32, dtype=F16, seed=1), random(103, 1, 32, dtype=F16, seed=2)
    with emulated(80) as gpu:
        out, lse = attention_varlen(
            q, k, v, torch.tensor(lengths), torch.tensor(tokens), True, right=0, return_lse=True, tile=tile
        )
        assert [launch.kernel for launch in gpu.launched] == ["key_sums_varlen", "quantize_varlen", "attend_varlen"]
        for i in range(3):
            mine, theirs = slice(*lengths[i : i + 2]), slice(*tokens[i : i + 2])
            one = (x.transpose(0, 1)[None] for x in (q[mine], k[theirs], v[theirs]))
            expected, expected_lse = attention(*one, bottom_right=True, causal=True, return_lse=True, tile=tile)
            assert torch.equal(out[mine].transpose(0, 1), expected[0])
            assert torch.equal(lse[:, mine], expected_lse[0])


@pytest.mark.parametrize("ones", [False, True])
def test_values_in_int8(ones):
    """Within what rounding P to 127ths of a row's largest and V to those of a channel's costs; both at most half."""
    q, k, v = (random(1, 1, s, 32, dtype=F16, seed=s) for s in (40, 70, 71))
    v = v[:, :, :70]
    with emulated(80) as gpu:
        out, lse = attention(
            q, k, v, causal=False, return_lse=True, tile=attention_tile(64, 32, 4, 2, ones=ones), value_bits=8
        )
    scale_q, scale_k, shift = integers_are_right(gpu.launched[-1], q, k, 32**-0.5)
    seen = torch.ones(40, 70, dtype=torch.bool)
    expected, _, expected_lse = exact(scale_q, scale_k, v.double(), None, seen)
    s = scale_q @ scale_k.mT
    blocks = [s[..., i : i + 32] for i in range(0, 70, 32)]
    # a weight is off by at most half of a 127th of its block's largest, in the product and in the sum
    weight = sum(torch.exp(b.amax(-1) - expected_lse) * b.shape[-1] for b in blocks)[..., None] * (0.5 / 127)
    bound = 2 * weight * v.double().abs().max() + v.double().abs().amax(2, keepdim=True) * (0.5 / 127) + 2e-3
    assert ((out.double() - expected).abs() <= bound).all()
    assert ((lse.double() - expected_lse - shift).abs() <= weight[..., 0] * 1.5 + 1e-3).all()
