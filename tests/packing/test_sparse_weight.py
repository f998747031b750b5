"""Round trips of every pattern and type, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_samples import FLOATS, PATTERNS, scales, sparse

from tcompress.packing import SparseWeight, pack_sparse

SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (1, 2), (1, 37), (37, 1), (8, 4), (9, 5), (31, 33), (64, 128), (67, 131)]


def bits_of(dense):
    return dense.view({4: torch.int32, 2: torch.int16, 1: torch.int8}[dense.element_size()])


def same_bits(a, b):
    """NaN equals itself, -0.0 does not equal 0.0."""
    return a.dtype == b.dtype and torch.equal(bits_of(a), bits_of(b))


def check(dense, pattern, **arguments):
    stored = pack_sparse(dense, pattern, **arguments)
    back = stored.integers() if stored.bits <= 8 else stored.floats()
    assert back.dtype == dense.dtype
    assert torch.equal(bits_of(back), bits_of(dense).masked_fill(dense == 0, 0))
    assert back.is_contiguous()
    assert (stored.shape, stored.pattern) == (tuple(dense.shape), pattern)
    assert stored.values.dim() == stored.index.dim() == 1
    assert stored.index.dtype == torch.uint8
    scale_bytes = 0 if stored.scale is None else stored.scale.nbytes
    assert stored.nbytes == stored.values.nbytes + stored.index.nbytes + scale_bytes
    return stored


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape, pattern):
    for kept in (0, 0.03, 0.5, 1):
        for dtype in FLOATS:
            stored = check(sparse(*shape, pattern, kept, dtype), pattern)
            assert (stored.values.dtype, stored.bits) == (dtype, 32 if dtype == torch.float32 else 16)
        stored = check(sparse(*shape, pattern, kept, torch.int8), pattern, scale=scales(*shape, 8))
        assert (stored.values.dtype, stored.bits) == (torch.int8, 8)
        for size in (1, 7, 32, 4096):
            dense = sparse(*shape, pattern, kept, torch.int8, bits=4)
            scale = scales(*shape, 4, size, torch.float16)
            four = check(dense, pattern, scale=scale, bits=4, group_size=size)
            assert (four.values.dtype, four.bits, four.group_size) == (torch.uint8, 4, size)
            assert torch.equal(four.index, check(dense, pattern, scale=scales(*shape, 8)).index)


@given(
    shape=st.tuples(st.integers(0, 40), st.integers(0, 80)),
    pattern=st.sampled_from(PATTERNS),
    kept=st.floats(0, 1),
    dtype=st.sampled_from(FLOATS),
    special=st.sampled_from([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40]),
    seed=st.integers(0, 2**31),
)
def test_any_floats(shape, pattern, kept, dtype, special, seed):
    dense = sparse(*shape, pattern, kept, dtype, seed)
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    # Anywhere if it is a zero, else where the pattern has a value.
    dense = torch.where(chosen & ((dense != 0) | (special == 0)), torch.tensor(special, dtype=dtype), dense)
    check(dense, pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_survives(pattern, dtype):
    """Each NaN too, in all its bits."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    # Alone in groups of 64, so that any pattern holds.
    dense = torch.zeros(2**10, 2**12, dtype=torch.int16)
    dense[:, ::64] = every.view(torch.int16).view(2**10, 64)
    check(dense.view(dtype), pattern)


def test_special_values():
    nan = torch.tensor([0x7FA12345, -0x3FFFFF], dtype=torch.int32).view(torch.float32)  # with payloads, one signalling
    dense = torch.tensor([[0.0, -0.0, float("inf"), 0.0], [-float("inf"), 0.0, 1e-45, -0.0]])
    dense[0, 3], dense[1, 1] = nan[0], nan[1]
    dense[1, 2] = 0.0
    for pattern in ("unstructured", "2:4", "1x4", "8x4"):
        stored = check(dense, pattern)
        assert same_bits(stored.dequantize(), stored.floats())
    assert pack_sparse(dense, "unstructured").values.numel() == 4
    assert pack_sparse(torch.full((9, 5), -0.0), "8x4").values.numel() == 0


@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "8x4", "16x16"])
def test_empty_rows_and_long_gaps(pattern):
    dense = torch.zeros(300, 256)
    dense[17, 3] = 1.0
    dense[130, 255] = 2.0
    dense[131, 0] = 3.0
    dense[200] = 4.0
    assert check(dense, pattern).index_kind == "delta"
    assert check(dense.bool().logical_not().float(), pattern).index_kind == "bitmap"


def test_any_strides():
    dense = sparse(40, 24, "unstructured", 0.2)
    for pattern in ("unstructured", "8x4", "3x5"):
        for view in (dense.t(), dense[::2, 1::3], dense[:1].expand(9, 24), dense[:, :1].expand(40, 7)):
            stored, again = check(view, pattern), pack_sparse(view.clone(), pattern)
            assert torch.equal(stored.values, again.values)
            assert torch.equal(stored.index, again.index)
    half = sparse(40, 24, "2:4", 1)
    check(half.t().contiguous().t(), "2:4")
    assert not pack_sparse(torch.nn.Parameter(dense), "unstructured").values.requires_grad


def test_packing_keeps_what_it_stores():
    dense = torch.ones(8, 4)
    stored = pack_sparse(dense, "8x4")
    dense.zero_()
    assert stored.floats().sum() == 32


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "8x4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dequantize_computes_in_float32_and_rounds_once(pattern, dtype):
    n, k = 19, 70
    dense = sparse(n, k, pattern, 0.3, torch.int8)
    scale = scales(n, k, 8)
    exact = dense.numpy().astype(np.float32) * scale.numpy()[:, None]
    assert torch.equal(pack_sparse(dense, pattern, scale=scale).dequantize(dtype), torch.from_numpy(exact).to(dtype))
    dense = sparse(n, k, pattern, 0.3, torch.int8, bits=4)
    for size in (1, 32, 70, 4096):
        for scale_dtype in (torch.float32, torch.float16):
            scale = scales(n, k, 4, size, scale_dtype)
            exact = dense.numpy().astype(np.float32) * scale.float().numpy()[:, np.arange(k) // size]
            four = pack_sparse(dense, pattern, scale=scale, bits=4, group_size=size)
            assert torch.equal(four.dequantize(dtype), torch.from_numpy(exact).to(dtype))


def test_dequantize_of_floats_is_a_conversion():
    dense = sparse(8, 8, "unstructured", 0.5, torch.bfloat16)
    assert torch.equal(pack_sparse(dense, "unstructured").dequantize(), dense.float())


def test_the_other_kind_of_values():
    floats = pack_sparse(torch.ones(2, 4), "unstructured")
    integers = pack_sparse(torch.ones(2, 4, dtype=torch.int8), "unstructured", scale=torch.ones(2))
    with pytest.raises(TypeError, match="SparseWeight.integers: values: got torch.float32, expected integers"):
        floats.integers()
    with pytest.raises(TypeError, match="SparseWeight.floats: values: got 8-bit integers, expected floats"):
        integers.floats()
    with pytest.raises(dataclasses.FrozenInstanceError):
        floats.bits = 8


INT8 = torch.zeros(2, 5, dtype=torch.int8)


@pytest.mark.parametrize(
    ("dense", "arguments", "error", "text"),
    [
        (torch.zeros(2, 5).double(), {}, TypeError, "pack_sparse: dense: got torch.float64, expected float32,"),
        (torch.zeros(2, 5, dtype=torch.uint8), {}, TypeError, "pack_sparse: dense: got torch.uint8"),
        (torch.zeros(5), {}, ValueError, "pack_sparse: dense: got [5], expected [N, K]"),
        (torch.zeros(2, 5), {"bits": 8}, ValueError, "pack_sparse: bits: got 8, expected 32 for torch.float32"),
        (torch.zeros(2, 5), {"bits": 4}, ValueError, "pack_sparse: bits: got 4, expected 32 for torch.float32"),
        (INT8, {"bits": 7}, ValueError, "pack_sparse: bits: got 7, expected 8 or 4 for torch.int8"),
        (torch.zeros(2, 5), {"scale": torch.ones(2)}, ValueError, "SparseWeight: scale: got [2], expected None"),
        (INT8, {}, ValueError, "SparseWeight: scale: got None, expected [2] for 8 bits"),
        (INT8, {"scale": torch.ones(2, 1)}, ValueError, "SparseWeight: scale: got [2, 1], expected [2] for 8"),
        (INT8, {"scale": torch.ones(2).half()}, TypeError, "SparseWeight: scale: got torch.float16, expected float32"),
        (INT8, {"scale": torch.ones(2), "group_size": 4}, ValueError, "SparseWeight: group_size: got 4, expected 0"),
        (INT8, {"scale": torch.ones(2, 1), "bits": 4}, ValueError, "SparseWeight: group_size: got 0, expected at"),
        (INT8, {"scale": torch.ones(2, 1), "bits": 4, "group_size": 4}, ValueError, "SparseWeight: scale: got [2, 1]"),
        (
            INT8,
            {"scale": torch.ones(2, 2).double(), "bits": 4, "group_size": 4},
            TypeError,
            "SparseWeight: scale: got torch.float64, expected float16 or float32",
        ),
        (
            INT8 + 8,
            {"scale": torch.ones(2, 2), "bits": 4, "group_size": 4},
            ValueError,
            "pack_sparse: dense: got integers from 8 to 8, expected -8 to 7",
        ),
    ],
)
def test_errors_of_packing(dense, arguments, error, text):
    with pytest.raises(error) as raised:
        pack_sparse(dense, "unstructured", **arguments)
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"pattern": "4"}, ValueError, "Pattern: pattern: got '4'"),
        ({"shape": (3,)}, ValueError, "SparseWeight: shape: got (3,), expected (N, K)"),
        ({"shape": (-1, -4)}, ValueError, "SparseWeight: shape: got (-1, -4)"),
        ({"index_kind": "positions"}, ValueError, "SparseWeight: index_kind: got 'positions', expected \"bitmap\""),
        ({"pattern": "2:4"}, ValueError, "SparseWeight: index_kind: got 'bitmap', expected \"positions\" for 2:4"),
        ({"values": torch.ones(2, 2)}, ValueError, "SparseWeight: values: got [2, 2], expected one dimension"),
        ({"index": torch.ones(1, 1, dtype=torch.uint8)}, ValueError, "SparseWeight: index: got [1, 1]"),
        ({"bits": 16}, TypeError, "SparseWeight: values: got torch.float32 for 16 bits"),
        ({"values": torch.ones(4).double()}, TypeError, "SparseWeight: values: got torch.float64 for 32 bits"),
        ({"group_size": 1}, ValueError, "SparseWeight: group_size: got 1, expected 0 for 32 bits"),
    ],
)
def test_errors_of_construction(changes, error, text):
    good = pack_sparse(torch.ones(2, 2), "unstructured")
    with pytest.raises(error) as raised:
        dataclasses.replace(good, **changes)
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "8x4"])
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_damage_is_noticed(pattern, bits):
    arguments = {} if bits == 32 else {"bits": bits, "scale": scales(16, 64, bits, 32), "group_size": 32 * (bits == 4)}
    dense = sparse(16, 64, pattern, 0.5, torch.float32 if bits == 32 else torch.int8, bits=bits)
    good = pack_sparse(dense, pattern, **arguments)
    for damaged in (
        dataclasses.replace(good, values=good.values[:-1]),
        dataclasses.replace(good, values=torch.cat([good.values, good.values[:1]])),
        dataclasses.replace(good, index=good.index[:-1]),
        dataclasses.replace(good, index=torch.cat([good.index, good.index[:1]])),
        dataclasses.replace(good, index=~good.index),
        dataclasses.replace(good, index=torch.zeros_like(good.index)),
        dataclasses.replace(good, shape=(16, 66), scale=None if bits == 32 else scales(16, 66, bits, 32)),
    ):
        with pytest.raises(ValueError, match="got"):
            damaged.dequantize()
    with pytest.raises(TypeError, match="decode_index: index: got torch.int8, expected uint8"):
        dataclasses.replace(good, index=good.index.view(torch.int8)).dequantize()


def test_fields_alone_make_the_weight():
    good = pack_sparse(sparse(16, 64, "8x4", 0.5), "8x4")
    again = SparseWeight(good.values, good.index, good.index_kind, good.shape, good.pattern, good.bits)
    assert torch.equal(again.floats(), good.floats())
