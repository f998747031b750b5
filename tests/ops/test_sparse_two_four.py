"""The layout "2:4" of the sparse ops: drawn by index, unpacked, and multiplied bit for bit as by `int8_linear`."""

from functools import cache

import cases
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP, DENSE, PREPACK, UNPACK = (
    OPS[name] for name in ("int8_sparse_linear", "int8_linear", "sparse_prepack", "sparse_unpack")
)
SCHEMES = (cases.W8A8, cases.W8A7)
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
# K in quads and in chunks of 64, outputs in panels of 16 and groups of 48.
SIZES = ((0, 0), (0, 8), (16, 0), (1, 1), (1, 3), (7, 4), (8, 5), (17, 63), (47, 64), (48, 65), (49, 127), (97, 300))
# A vector has 16 tokens, a tile 64.
TOKENS = (0, 1, 2, 7, 15, 16, 17, 32, 33, 48, 49, 63, 64, 65, 128, 131)


def pruned(weight):
    """Two of each four along K are kept, which ones is left to chance."""
    n, k = weight.shape
    chance = torch.rand(n, -(-k // 4), 4, generator=cases.generator((n, k)))
    return weight.masked_fill(chance.argsort(-1).argsort(-1).flatten(1)[:, :k] >= 2, 0)


WEIGHTS = {
    **{name: lambda n, k, make=make: pruned(make(n, k)) for name, make in cases.WEIGHTS.items()},
    "of 7 bits": lambda n, k: pruned(cases.random_weight(n, k) // 2),
    "first two": lambda n, k: cases.random_weight(n, k).masked_fill(torch.arange(k) % 4 >= 2, 0),
    "last one": lambda n, k: cases.random_weight(n, k).masked_fill(torch.arange(k) % 4 != 3, 0),
    "by outputs": lambda n, k: pruned(cases.random_weight(n, k) // (torch.arange(n) % 5 * 4 + 1)[:, None]).to(
        torch.int8
    ),
}


def prepack(weight, path=cases.CPU_PATHS[-1]):
    with use_backend("cpu"), use_cpu_path(path):
        return ops.sparse_prepack(weight, "2:4")


def run(path, x, packed, scale, bias=None, scheme=cases.W8A7, activation="none", dtype=None, res=None):
    with use_backend("cpu"), use_cpu_path(path):
        return ops.int8_sparse_linear(x, packed, scale, bias, "2:4", *scheme, activation, dtype, res)


def dense(x, weight, scale, bias=None, scheme=cases.W8A7, activation="none", dtype=None, res=None):
    """The reference of `int8_linear`, which test_int8_linear.py holds against int64 and float64."""
    return DENSE.reference(x, weight, scale, bias, None, *scheme, activation, dtype, res)


@cache
def operands(m, n, k, name="random", dtype=torch.float32):
    """x, weight, packed weight, weight_scale, bias."""
    x, _, scale, bias = cases.linear_operands(cases.Shape(name, m, n, k), dtype)
    weight = WEIGHTS[name](n, k)
    return x, weight, prepack(weight), scale, bias


# ---- the layout -----------------------------------------------------------------------------------------------------


def by_index(weight):
    """The layout drawn in csrc/cpu/two_four_layout.h, chunk by chunk."""
    n, k = weight.shape
    chunks = -(-k // 64)
    w = np.zeros((n, chunks * 64), np.int64)
    w[:, :k] = weight.numpy()
    packed = b""
    for first in range(0, n, 48):
        for c in range(chunks):
            for row in w[first : first + 48, c * 64 : c * 64 + 64]:
                packed += chunk_of(row.reshape(16, 4))
    sums = np.zeros(-(-n // 16) * 16, np.int32)
    sums[:n] = w.sum(1)
    return torch.from_numpy(np.frombuffer(packed + sums.tobytes(), np.int8).copy())


def chunk_of(quads):
    pairs = [next(i for i, p in enumerate(PAIRS) if not np.delete(quad, p).any()) for quad in quads]
    kept = np.array([quad[list(PAIRS[pair])] for quad, pair in zip(quads, pairs, strict=True)])
    run = next(run for run in (8, 4, 2) if fits(kept, run))
    starts = np.zeros(8, np.int16)
    starts[: 16 // run] = -63 * kept.reshape(16 // run, -1).sum(1)
    weights = np.concatenate([kept, kept], 1).astype(np.int8)
    rows = np.array([6 * q + pair for q, pair in enumerate(pairs)], np.uint8)
    return weights.tobytes() + starts.tobytes() + rows.tobytes() + bytes([run, 0, 0, 0, 0, 0, 0, 0])


def fits(kept, run):
    """Whether each run's sum of (a - 63) w stays in 16 bits for any a in 0 … 127."""
    parts = kept.reshape(16 // run, -1)
    largest = np.where(parts > 0, 64 * parts, -63 * parts).sum(1)
    smallest = np.where(parts > 0, -63 * parts, 64 * parts).sum(1)
    return largest.max() <= 32767 and smallest.min() >= -32768


@pytest.mark.parametrize("name", WEIGHTS)
def test_layout(name):
    for n, k in SIZES:
        weight = WEIGHTS[name](n, k)
        drawn = by_index(weight)
        assert torch.equal(PREPACK.reference(weight, "2:4"), drawn), (n, k)
        assert PREPACK.fake(weight, "2:4").shape == drawn.shape
        for path in cases.CPU_PATHS:
            assert torch.equal(prepack(weight, path), drawn), (path, n, k)


@pytest.mark.parametrize("name", WEIGHTS)
def test_unpack(name):
    for n, k in SIZES:
        weight = WEIGHTS[name](n, k)
        packed = prepack(weight)
        assert torch.equal(UNPACK.reference(packed, n, k, torch.int8, "2:4"), weight)
        for path in cases.CPU_PATHS:
            with use_backend("cpu"), use_cpu_path(path):
                assert torch.equal(ops.sparse_unpack(packed, n, k, torch.int8, "2:4"), weight), (path, n, k)


def test_every_length_of_run_occurs():
    def run_lengths(weight):
        return set(prepack(weight)[: weight.shape[0] * 104].view(-1, 104)[:, 96].tolist())

    assert run_lengths(torch.tensor([[16, 16, 0, 0] * 16], dtype=torch.int8)) == {8}  # 64 · 256 <= 32767
    assert run_lengths(torch.tensor([[32, 32, 0, 0] * 16], dtype=torch.int8)) == {4}
    assert run_lengths(torch.tensor([[-32, -32, 0, 0] * 16], dtype=torch.int8)) == {8}  # -64 · 512 = -32768
    assert run_lengths(torch.tensor([[127, 127, 0, 0] * 16], dtype=torch.int8)) == {2}
    assert run_lengths(torch.tensor([[-128, -128, 0, 0] * 16], dtype=torch.int8)) == {2}


def test_weights_of_other_strides():
    weight = pruned(cases.random_weight(70, 18))
    for view in (weight.t().contiguous().t(), torch.stack([weight, weight], -1)[..., 0]):
        assert torch.equal(prepack(view), prepack(weight))


def test_errors():
    weight = torch.tensor([[1, 2, 0, 0, 0, 3, 4, 5]], dtype=torch.int8)
    with pytest.raises(ValueError, match="more than two of four"):
        ops.sparse_prepack(weight, "2:4")
    with pytest.raises(RuntimeError, match="at most two of four"):
        torch.ops.tcompress.sparse_prepack(weight, "2:4")
    with pytest.raises(ValueError, match="layout"):
        ops.sparse_prepack(weight.float(), "2:4")
    packed = prepack(weight[:, :4])
    for n, k in ((2, 4), (1, 65), (-1, 4), (1, -4)):
        with pytest.raises(ValueError, match="kernel_weight"):
            ops.sparse_unpack(packed, n, k, torch.int8, "2:4")
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.tcompress.sparse_unpack(packed, n, k, torch.int8, "2:4")
    with pytest.raises(ValueError, match="kernel_weight"):
        ops.int8_sparse_linear(torch.zeros(1, 65), packed, torch.ones(1), layout="2:4")
    with pytest.raises(RuntimeError, match="kernel_weight"):
        torch.ops.tcompress.int8_sparse_linear(
            torch.zeros(1, 65), packed, torch.ones(1), None, "2:4", 7, False, "none", None
        )


# ---- the numbers ----------------------------------------------------------------------------------------------------


def test_reference():
    for n, k in SIZES:
        x, weight, packed, scale, bias = operands(3, n, k)
        for scheme in SCHEMES:
            got = OP.reference(x, packed, scale, bias, "2:4", *scheme, "silu", None)
            assert oracle.same_bits(got, dense(x, weight, scale, bias, scheme, "silu"))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("m", TOKENS)
def test_every_number_of_tokens(path, m):
    for n, k in ((1, 1), (49, 130), (17, 300)):
        x, weight, packed, scale, bias = operands(m, n, k, "of 7 bits")
        for scheme in SCHEMES:
            for dtype in (torch.int32, None):
                got = run(path, x, packed, scale, bias, scheme, dtype=dtype)
                assert oracle.same_bits(got, dense(x, weight, scale, bias, scheme, dtype=dtype)), (n, k, scheme, dtype)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight(path, name):
    for n, k in SIZES:
        for m in (1, 18, 70):
            x, weight, packed, scale, bias = operands(m, n, k, name)
            for scheme in SCHEMES:
                got = run(path, x, packed, scale, bias, scheme, dtype=torch.int32)
                expected = dense(x, weight, scale, bias, scheme, dtype=torch.int32)
                assert oracle.same_bits(got, expected), (m, n, k, scheme)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_every_scheme_type_and_argument(path, dtype):
    x, weight, packed, scale, bias = operands(19, 50, 270, "random", dtype)
    for scheme in cases.LINEAR_SCHEMES:
        assert oracle.same_bits(run(path, x, packed, scale, bias, scheme), dense(x, weight, scale, bias, scheme))
    for out_dtype in (*cases.DTYPES, None):
        residual = torch.randn(19, 50, generator=cases.generator("residual")).to(out_dtype or dtype)
        for activation in (*cases.ACTIVATIONS, "none"):
            with use_backend("cpu"), use_cpu_path(path):
                expected = ops.int8_linear(x, weight, scale, bias, None, 7, False, activation, out_dtype, residual)
            got = run(path, x, packed, scale, bias, cases.W8A7, activation, out_dtype, residual)
            assert oracle.same_bits(got, expected), (activation, out_dtype)
    assert oracle.same_bits(run(path, x, packed, scale), dense(x, weight, scale))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("name", cases.INPUTS)
def test_hostile_inputs(path, name):
    for m, n, k in ((1, 1, 1), (7, 35, 37), (33, 9, 300)):
        scale = torch.rand(n, generator=cases.generator(name)) + 0.01
        for weight_name, make in WEIGHTS.items():
            weight = make(n, k)
            packed = prepack(weight)
            for dtype in cases.DTYPES:
                x = cases.INPUTS[name](m, k, dtype)
                for scheme in (*SCHEMES, (2, False)):
                    for out_dtype in (torch.int32, None):
                        got = run(path, x, packed, scale, None, scheme, "none", out_dtype)
                        expected = dense(x, weight, scale, None, scheme, "none", out_dtype)
                        assert oracle.same_bits(got, expected), (weight_name, dtype, scheme, out_dtype)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_every_layout_of_x(path, layout):
    _, weight, packed, scale, bias = operands(6, 19, 21)
    for dtype in cases.DTYPES:
        x = cases.LAYOUTS[layout](cases.INPUTS["normal"](6, 21, dtype))
        got = run(path, x, packed, scale, bias)
        assert got.shape == (*x.shape[:-1], 19)
        assert oracle.same_bits(got, dense(x.resolve_neg().contiguous().clone(), weight, scale, bias))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
def test_longest_sum_at_its_bounds(path):
    k = 65536
    signs = (-1.0) ** torch.arange(k)
    x = torch.stack([torch.ones(k), -torch.ones(k), signs, -signs])
    for name in ("all -128", "all 127", "-128 and 127"):
        weight = WEIGHTS[name](3, k)
        for scheme in SCHEMES:
            got = run(path, x, prepack(weight), torch.ones(3), None, scheme, dtype=torch.int32)
            assert oracle.same_bits(got, dense(x, weight, torch.ones(3), None, scheme, dtype=torch.int32)), name


def test_threads():
    threads = torch.get_num_threads()
    x, weight, packed, scale, bias = operands(150, 300, 515, "of 7 bits")
    expected = dense(x, weight, scale, bias)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for path in cases.CPU_PATHS:
                for rows in (150, 20):
                    assert oracle.same_bits(run(path, x[:rows], packed, scale, bias), expected[:rows]), (path, count)
    finally:
        torch.set_num_threads(threads)


# ---- the proof that 16 bits are enough, attacked --------------------------------------------------------------------


def assert_exact(weight, bits):
    """bits [M, K] of zeros and ones become activations 0 and 127."""
    x = torch.from_numpy(bits.astype(np.float32))
    a, _, zero_point = ops.quantize_per_token(x, 7, False)
    assert zero_point.eq(0).all()
    assert a.max() in (0, 127)
    expected = a.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    packed, scale = prepack(weight), torch.ones(weight.shape[0])
    for path in cases.CPU_PATHS:
        got = run(path, x, packed, scale, None, (7, False), dtype=torch.int32)
        assert np.array_equal(got.numpy(), expected), path


@pytest.mark.parametrize("limit", [3, 16, 31, 32, 33, 63, 64, 65, 127])
def test_activations_chosen_against_each_output(limit):
    """Row m turns on exactly the activations whose weight in output m is positive (then negative): the largest sums
    that there are."""
    g = np.random.default_rng(limit)
    for low in (-limit - 1, limit):
        weight = pruned(torch.from_numpy(g.integers(low, limit + 1, (50, 1021)).astype(np.int8)))
        assert_exact(weight, np.concatenate([weight.numpy() > 0, weight.numpy() < 0]))
        assert_exact(-weight.clamp_min(-127), np.concatenate([weight.numpy() > 0, weight.numpy() < 0]))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), k=st.integers(1, 400), n=st.sampled_from([1, 7, 49]))
def test_any_weights(data, k, n):
    levels = st.sampled_from([-128, -127, -64, -33, -32, -1, 0, 1, 31, 32, 63, 64, 127])
    period = data.draw(st.lists(levels, min_size=1, max_size=24))
    shift = data.draw(st.integers(0, 5))
    weight = np.array(period, np.int8)[(np.arange(k) + np.arange(n)[:, None] * shift) % len(period)]
    weight = pruned(torch.from_numpy(weight))
    w = weight.numpy()
    assert_exact(weight, np.concatenate([w[:3] > 0, w[:3] < 0, np.ones((1, k)), np.zeros((1, k))]))


# ---- torch's own checks ---------------------------------------------------------------------------------------------


def test_opcheck():
    for n, k in ((17, 70), (0, 8), (16, 0), (1, 1)):
        x, weight, packed, scale, bias = operands(5, n, k)
        torch.library.opcheck(torch.ops.tcompress.sparse_prepack, (weight, "2:4"))
        torch.library.opcheck(torch.ops.tcompress.sparse_unpack, (packed, n, k, torch.int8, "2:4"))
        arguments = (x, packed, scale, bias, "2:4", 7, False, "gelu", None)
        torch.library.opcheck(torch.ops.tcompress.int8_sparse_linear, arguments)
