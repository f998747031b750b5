"""GPTQ against the optimal brain surgeon in float64, and against rounding to nearest."""

import numpy as np
import pytest
import torch
from calibrated import correlated, damped, output_error, statistics_of, surgeon, weight

from tcompress.errors import CompressionWarning
from tcompress.quantize import SCHEMES, PerGroup, QuantArgs, gptq, round_to_nearest
from tcompress.statistics import InputStatistics

NAMES = ["W8A8", "W7A7", "W6A7", "W4A16", "W4A16-asym", "W4A16-g32", "W4A16-g64-asym"]


def nearest(packed):
    """The rounding to the grid of a packed weight, in numpy."""
    n, k = packed.shape
    size = packed.group_size or k
    scale = packed.scale.double().view(n, -1).repeat_interleave(size, 1)[:, :k].numpy()
    zero = 0 if packed.zero_point is None else packed.zero_point.double().repeat_interleave(size, 1)[:, :k].numpy()
    return scale, np.broadcast_to(zero, (n, k))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("name", "k"), [*((name, 40) for name in NAMES), ("W4A16-g32", 150), ("W7A7", 150)])
def test_against_the_optimal_brain_surgeon(name, act_order, k):
    args, w, x = SCHEMES[name].weights, weight(5, k), correlated(k)
    hessian = damped(x)
    # Ties in the order are told apart by float32 only, of which the algorithm sees the Hessian.
    diagonal = statistics_of(x).hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True).numpy() if act_order else np.arange(k)
    scale, zero = nearest(round_to_nearest(w, args))
    lo, hi = (-(2 ** (args.bits - 1)) + 1, 2 ** (args.bits - 1) - 1) if args.symmetric else (0, 2**args.bits - 1)

    def replace(values, i):
        return (np.clip(np.rint(values / scale[:, i]) + zero[:, i], lo, hi) - zero[:, i]) * scale[:, i]

    expected = surgeon(w, hessian, order, replace)
    packed = gptq(w, statistics_of(x), args, act_order=act_order)
    got = packed.dequantize().double()
    same = ((got - expected).abs() < 1e-3 * torch.from_numpy(scale)).double().mean()
    # A value halfway between two integers may fall to the other one in float32, and the columns after it follow.
    assert same > (0.98 if args.bits < 8 else 0.9)
    assert output_error(w, got, x) == pytest.approx(output_error(w, expected, x), rel=0.02)
    if args.symmetric and args.bits == 4:
        assert torch.equal(packed.scale, round_to_nearest(w, args).scale)


@pytest.mark.parametrize("name", NAMES)
def test_loses_less_than_rounding_to_nearest(name):
    args, w, x = SCHEMES[name].weights, weight(48, 200), correlated(200)
    statistics = statistics_of(x)
    rtn = output_error(w, round_to_nearest(w, args).dequantize(), x)
    plain = output_error(w, gptq(w, statistics, args, act_order=False).dequantize(), x)
    ordered = output_error(w, gptq(w, statistics, args).dequantize(), x)
    assert plain < 0.8 * rtn
    assert ordered < 0.8 * rtn


def test_inputs_without_correlation_are_rounded_to_nearest():
    statistics = InputStatistics(64)
    statistics.add(torch.eye(64) * torch.linspace(1, 3, 64))
    args, w = SCHEMES["W4A16-g32"].weights, weight(9, 64)
    assert torch.equal(gptq(w, statistics, args).qdata, round_to_nearest(w, args).qdata)


def test_rows_are_independent():
    args, w, x = SCHEMES["W4A16"].weights, weight(6, 260), correlated(260, 900)
    assert torch.equal(gptq(w, statistics_of(x), args).qdata[:3], gptq(w[:3], statistics_of(x), args).qdata)


def test_dead_inputs_are_rounded_to_nearest():
    args, w, x = SCHEMES["W4A16"].weights, weight(8, 50), correlated(50)
    x[:, [0, 17, 49]] = 0
    got, rtn = gptq(w, statistics_of(x), args), round_to_nearest(w, args)
    assert torch.equal(got.dequantize()[:, [0, 17, 49]], rtn.dequantize()[:, [0, 17, 49]])
    assert output_error(w, got.dequantize(), x) < output_error(w, rtn.dequantize(), x)
    nothing = InputStatistics(50)
    nothing.add(torch.zeros(3, 50))
    assert torch.equal(gptq(w, nothing, args).qdata, rtn.qdata)


@pytest.mark.parametrize("name", ["W8A8", "W4A16-g32", "W4A16-g64-asym"])
def test_zeros_stay(name):
    args, w, x = SCHEMES[name].weights, weight(32, 96), correlated(96)
    w[weight(32, 96, 5).abs() < 0.6] = 0
    got = gptq(w, statistics_of(x), args).dequantize()
    assert got[w == 0].eq(0).all()
    assert output_error(w, got, x) < 0.8 * output_error(w, round_to_nearest(w, args).dequantize(), x)
    free = gptq(w, statistics_of(x), args, keep_zeros=False).dequantize()
    assert not free[w == 0].eq(0).all()
    assert output_error(w, free, x) < output_error(w, got, x)


def test_fewer_tokens_than_inputs():
    args, w, x = SCHEMES["W4A16"].weights, weight(16, 100), correlated(100, 5)
    got = gptq(w, statistics_of(x), args)
    assert output_error(w, got.dequantize(), x) < output_error(w, round_to_nearest(w, args).dequantize(), x)


def test_damping_grows_until_the_hessian_has_a_factor():
    args, w, x = SCHEMES["W4A16"].weights, weight(16, 30), correlated(30)
    statistics = statistics_of(x)
    statistics.hessian -= torch.eye(30) * statistics.hessian.diagonal().mean() * 0.05  # not positive definite now
    with_ladder = gptq(w, statistics, args)
    assert output_error(w, with_ladder.dequantize(), x) < output_error(w, round_to_nearest(w, args).dequantize(), x)
    statistics.hessian = torch.full((30, 30), -1.0).fill_diagonal_(1e-3)
    with pytest.warns(CompressionWarning, match="gptq: the Hessian has no Cholesky factor"):
        hopeless = gptq(w, statistics, args)
    assert torch.equal(hopeless.qdata, round_to_nearest(w, args).qdata)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (3, 1)])
def test_small_shapes(shape):
    statistics = InputStatistics(shape[1])
    statistics.add(torch.ones(2, shape[1]))
    for args in (QuantArgs(bits=8), QuantArgs(bits=4, granularity=PerGroup(size=32))):
        got, rtn = gptq(torch.ones(shape), statistics, args), round_to_nearest(torch.ones(shape), args)
        assert torch.equal(got.qdata, rtn.qdata)
        assert torch.equal(got.scale, rtn.scale)


def test_types_strides_and_repetition():
    args, w, x = SCHEMES["W4A16-g32"].weights, weight(10, 70).bfloat16(), correlated(70)
    expected = gptq(w, statistics_of(x), args)
    for same in (w.float(), w.t().contiguous().t(), w.clone(), torch.nn.Parameter(w)):
        assert torch.equal(gptq(same, statistics_of(x), args).qdata, expected.qdata)


def test_errors():
    args, statistics = SCHEMES["W4A16"].weights, statistics_of(correlated(8))
    with pytest.raises(ValueError, match=r"gptq: weight: got \[8\], expected \[N, K\]"):
        gptq(torch.ones(8), statistics, args)
    with pytest.raises(ValueError, match="gptq: weight: got 8 values NaN or infinite"):
        gptq(torch.full((1, 8), torch.nan), statistics, args)
    with pytest.raises(ValueError, match="gptq: statistics: got 8 features, expected 9"):
        gptq(torch.ones(1, 9), statistics, args)
