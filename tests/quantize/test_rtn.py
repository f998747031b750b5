"""Round to nearest, against numpy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcompress.packing import unpack_int4
from tcompress.quantize import PerGroup, QuantArgs, round_to_nearest

#: Quotients are float32: near an integer and a half, one of at most 127 is off by half a unit in its last place.
QUOTIENT_ERROR = 127 * 2.0**-24


def gaussian(n, k, seed=0, dtype=torch.float32):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(packed):
    """The signed integers of a symmetric weight, from either layout."""
    if packed.layout == "dense":
        return packed.qdata
    return (unpack_int4(packed.qdata, packed.shape[1]).int() - 8).to(torch.int8)


def oracle(weight, bits):
    """The formula of the docstring in float64: the exact scales, and the exact quotients before rounding."""
    w = weight.double().numpy()
    q_max = 2 ** (bits - 1) - 1
    scale = np.abs(w).max(1) / q_max
    return scale, w / scale[:, None]


def sqnr_db(weight, packed):
    w = weight.double().numpy()
    approximation = packed.qdata.double().numpy() * packed.scale.double().numpy()[:, None]
    return 10 * np.log10((w**2).sum() / ((w - approximation) ** 2).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (8, 64), (19, 129)])
def test_against_float64(shape, bits, dtype):
    weight = gaussian(*shape, dtype=dtype)
    packed = round_to_nearest(weight, QuantArgs(bits=bits))
    scale, quotient = oracle(weight.float(), bits)
    assert packed.scale.dtype == torch.float32
    assert (packed.shape, packed.layout) == (shape, "dense" if bits > 4 else "int4")
    assert packed.qdata.dtype == (torch.int8 if bits > 4 else torch.uint8)
    assert packed.qdata.shape == (shape if bits > 4 else (shape[0], (shape[1] + 1) // 2))
    assert packed.scale.shape == (shape[:1] if bits > 4 else (shape[0], 1))
    np.testing.assert_allclose(packed.scale.double().numpy().reshape(-1), scale, rtol=2.0**-24)
    q = integers(packed).double().numpy()
    # The nearest integer; either one where float32 cannot tell which is nearer.
    assert (np.abs(q - quotient) <= 0.5 + 2 * QUOTIENT_ERROR).all()
    assert (q == np.rint(quotient)).mean() > 0.999


@pytest.mark.parametrize(("bits", "q_max"), [(8, 127), (7, 63), (4, 7), (2, 1)])
def test_range(bits, q_max):
    packed = round_to_nearest(gaussian(50, 200), QuantArgs(bits=bits))
    q = integers(packed)
    assert q.abs().amax(1).eq(q_max).all()
    assert q.min() == -q_max
    assert q.max() == q_max


def test_half_to_even():
    halves = [-63.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 62.5, 127.0]
    packed = round_to_nearest(torch.tensor([halves]), QuantArgs(bits=8))
    assert packed.scale.tolist() == [1.0]
    assert packed.qdata.tolist() == [[-64, -2, -2, 0, 0, 2, 2, 4, 62, 127]]


def test_one_scale_for_each_channel():
    packed = round_to_nearest(torch.tensor([[127.0, 1.0], [-254.0, 4.0]]), QuantArgs(bits=8))
    assert packed.scale.tolist() == [1.0, 2.0]
    assert packed.qdata.tolist() == [[127, 1], [-127, 2]]


def test_zero_channels():
    weight = gaussian(4, 16)
    weight[1] = 0
    weight[3] = -0.0
    packed = round_to_nearest(weight, QuantArgs(bits=8))
    assert torch.isfinite(packed.scale).all()
    assert (packed.scale > 0).all()
    assert packed.dequantize()[[1, 3]].eq(0).all()
    assert packed.qdata[[0, 2]].abs().amax(1).eq(127).all()


@pytest.mark.parametrize("value", [3.0, -3.0, 2.0**-30])
def test_single_element(value):
    packed = round_to_nearest(torch.tensor([[value]]), QuantArgs(bits=8))
    assert packed.qdata.tolist() == [[127 if value > 0 else -127]]
    torch.testing.assert_close(packed.dequantize(), torch.tensor([[value]]), rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("tiny", [2.0**-149, 2.0**-120, -(2.0**-101)])
def test_values_below_the_smallest_scale_keep_the_error_bound(tiny):
    packed = round_to_nearest(torch.tensor([[tiny, 0.0]]), QuantArgs(bits=8))
    error = (packed.dequantize().double() - torch.tensor([[tiny, 0.0]], dtype=torch.float64)).abs()
    assert (error <= packed.scale.double() / 2).all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(shape):
    packed = round_to_nearest(torch.zeros(shape), QuantArgs(bits=8))
    assert packed.qdata.shape == shape
    assert packed.scale.shape == shape[:1]
    assert torch.isfinite(packed.scale).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity(bad, dtype):
    weight = gaussian(3, 4, dtype=dtype)
    weight[1, 2] = bad
    weight[2, 0] = bad
    expected = r"round_to_nearest: weight: got 2 values NaN or infinite, expected finite; .*repair"
    with pytest.raises(ValueError, match=expected):
        round_to_nearest(weight, QuantArgs(bits=8))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), ()])
def test_wrong_rank(shape):
    with pytest.raises(ValueError, match=r"round_to_nearest: weight: got \[.*\], expected \[N, K\]"):
        round_to_nearest(torch.zeros(shape), QuantArgs(bits=8))


def test_strides_do_not_matter():
    weight = gaussian(12, 20)
    expected = round_to_nearest(weight, QuantArgs(bits=8))
    for view in (weight.t().contiguous().t(), torch.stack([weight, -weight], -1)[..., 0]):
        assert not view.is_contiguous()
        packed = round_to_nearest(view, QuantArgs(bits=8))
        assert torch.equal(packed.qdata, expected.qdata)
        assert torch.equal(packed.scale, expected.scale)


def test_the_weight_is_left_alone_and_without_gradient():
    weight = gaussian(3, 4).requires_grad_()
    before = weight.detach().clone()
    packed = round_to_nearest(weight, QuantArgs(bits=8))
    assert torch.equal(weight.detach(), before)
    assert not packed.scale.requires_grad
    assert packed.scale.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize(("bits", "floor"), [(8, 40), (7, 34), (6, 28)])
def test_sqnr_of_gaussian_weights(bits, floor):
    weight = gaussian(256, 768)
    packed = round_to_nearest(weight, QuantArgs(bits=bits))
    assert sqnr_db(weight, packed) > floor


def test_an_outlier_costs_its_own_channel_only():
    weight = gaussian(64, 256)
    before = round_to_nearest(weight, QuantArgs(bits=8))
    weight[5, 7] = 1e4
    after = round_to_nearest(weight, QuantArgs(bits=8))
    others = torch.arange(64) != 5
    assert torch.equal(after.qdata[others], before.qdata[others])
    assert torch.equal(after.scale[others], before.scale[others])


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_error_is_at_most_half_a_step(data):
    n, k, bits = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12)), data.draw(st.integers(2, 8))
    numbers = st.floats(-(2.0**100), 2.0**100, width=32)
    rows = data.draw(st.lists(st.lists(numbers, min_size=k, max_size=k), min_size=n, max_size=n))
    weight = torch.tensor(rows, dtype=torch.float32)
    packed = round_to_nearest(weight, QuantArgs(bits=bits))
    scale = packed.scale.double().view(n, 1)
    q = integers(packed)
    error = (q.double() * scale - weight.double()).abs()
    assert (error <= scale * (0.5 + 2 * QUOTIENT_ERROR)).all()
    assert q.abs().max() <= 2 ** (bits - 1) - 1


# ---- groups, zero points, float16 scales: layout "int4" -------------------------------------------------------------


def grouped_oracle(weight, args):
    """The formula of the docstring, group by group, in float64, with the scales that were stored."""
    w, k = weight.double(), weight.shape[1]
    size = args.group_size or k
    q_max = 7 if args.symmetric else 15
    for g in range(0, k, size):
        part = w[:, g : g + size]
        lo, hi = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
        yield slice(g, g + size), lo, (torch.maximum(-lo, hi) if args.symmetric else hi - lo) / q_max


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, 64, 128, None])
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (7, 33), (3, 200), (16, 256)])
def test_groups_against_float64(shape, size, symmetric, scale_dtype):
    granularity = {"granularity": PerGroup(size=size)} if size else {}
    args = QuantArgs(bits=4, symmetric=symmetric, scale_dtype=scale_dtype, **granularity)
    weight = gaussian(*shape) + (0 if symmetric else 0.5)
    packed = round_to_nearest(weight, args)
    n, k = shape
    assert packed.layout == "int4"
    assert packed.qdata.shape == (n, (k + 1) // 2)
    assert packed.scale.dtype == getattr(torch, scale_dtype)
    assert packed.scale.shape == (n, -(-k // (size or k)))
    assert (packed.zero_point is None) == symmetric
    q = unpack_int4(packed.qdata, k).double()
    rounding = 2.0**-11 if scale_dtype == "float16" else 2.0**-23
    for i, (columns, lo, exact) in enumerate(grouped_oracle(weight, args)):
        scale = packed.scale[:, i].double()
        torch.testing.assert_close(scale, exact, rtol=rounding, atol=2.0**-15)
        zero = torch.full((n,), 8.0) if symmetric else packed.zero_point[:, i].double()
        if not symmetric:
            assert ((zero + lo / scale).abs() <= 0.5 + 1e-5).all()
        ideal = weight[:, columns].double() / scale[:, None] + zero[:, None].double()
        limits = (1, 15) if symmetric else (0, 15)
        assert ((q[:, columns] - ideal.clamp(*limits)).abs() <= 0.5 + 1e-5).all()
    assert (packed.dequantize().double() - weight.double()).abs().max() <= 0.6 * packed.scale.double().max()


def test_smaller_groups_and_zero_points_lose_less():
    weight = gaussian(64, 512).abs() * torch.linspace(0.1, 2, 512)
    losses = []
    for size, symmetric in ((128, True), (32, True), (32, False)):
        args = QuantArgs(bits=4, symmetric=symmetric, granularity=PerGroup(size=size), scale_dtype="float16")
        losses.append(float((round_to_nearest(weight, args).dequantize() - weight).norm()))
    assert losses[0] > losses[1] > losses[2]


def test_float16_scales_that_are_too_large():
    args = QuantArgs(bits=4, scale_dtype="float16")
    with pytest.raises(ValueError, match=r"round_to_nearest: weight: got a scale of .*, expected at most 65504; use"):
        round_to_nearest(torch.full((2, 3), 1e6), args)


def test_zero_groups_with_float16_scales():
    args = QuantArgs(bits=4, granularity=PerGroup(size=32), scale_dtype="float16")
    packed = round_to_nearest(torch.zeros(2, 64), args)
    assert (packed.scale > 0).all()
    assert packed.dequantize().eq(0).all()


@settings(max_examples=20, deadline=None)
@given(exponent=st.integers(-40, 40), bits=st.integers(2, 8), seed=st.integers(0, 99))
def test_a_power_of_two_scales_only_the_scale(exponent, bits, seed):
    weight = gaussian(4, 9, seed)
    one, other = (round_to_nearest(w, QuantArgs(bits=bits)) for w in (weight, weight * 2.0**exponent))
    assert torch.equal(one.qdata, other.qdata)
    assert torch.equal(one.scale * 2.0**exponent, other.scale)
