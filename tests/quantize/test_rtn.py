"""Round to nearest, against numpy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcompress.quantize import QuantArgs, round_to_nearest

#: Quotients are float32: near an integer and a half, one of at most 127 is off by half a unit in its last place.
QUOTIENT_ERROR = 127 * 2.0**-24


def gaussian(n, k, seed=0, dtype=torch.float32):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
    assert packed.qdata.dtype == torch.int8
    assert packed.scale.dtype == torch.float32
    assert (packed.shape, packed.layout) == (shape, "dense")
    assert packed.qdata.shape == shape
    assert packed.scale.shape == shape[:1]
    np.testing.assert_allclose(packed.scale.double().numpy(), scale, rtol=2.0**-24)
    q = packed.qdata.double().numpy()
    # The nearest integer; either one where float32 cannot tell which is nearer.
    assert (np.abs(q - quotient) <= 0.5 + 2 * QUOTIENT_ERROR).all()
    assert (q == np.rint(quotient)).mean() > 0.999


@pytest.mark.parametrize(("bits", "q_max"), [(8, 127), (7, 63), (4, 7), (2, 1)])
def test_range(bits, q_max):
    packed = round_to_nearest(gaussian(50, 200), QuantArgs(bits=bits))
    assert packed.qdata.abs().amax(1).eq(q_max).all()
    assert packed.qdata.min() == -q_max
    assert packed.qdata.max() == q_max


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
    scale = packed.scale.double()[:, None]
    error = (packed.qdata.double() * scale - weight.double()).abs()
    assert (error <= scale * (0.5 + 2 * QUOTIENT_ERROR)).all()
    assert packed.qdata.abs().max() <= 2 ** (bits - 1) - 1


@settings(max_examples=20, deadline=None)
@given(exponent=st.integers(-40, 40), bits=st.integers(2, 8), seed=st.integers(0, 99))
def test_a_power_of_two_scales_only_the_scale(exponent, bits, seed):
    weight = gaussian(4, 9, seed)
    one, other = (round_to_nearest(w, QuantArgs(bits=bits)) for w in (weight, weight * 2.0**exponent))
    assert torch.equal(one.qdata, other.qdata)
    assert torch.equal(one.scale * 2.0**exponent, other.scale)
