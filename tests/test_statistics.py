"""Statistics of inputs against float64."""

import pytest
import torch
from torch import nn

from tcompress.statistics import InputStatistics, check_count, checked_hessian


def inputs(n=200, k=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) @ torch.randn(k, k, generator=generator)


def collected(*batches, hessian=True):
    statistics = InputStatistics(batches[0].shape[-1], hessian)
    for batch in batches:
        statistics.add(batch)
    return statistics


def check_against_float64(statistics, x):
    x = x.double()
    assert statistics.count == len(x)
    torch.testing.assert_close(statistics.hessian.double(), 2 * x.T @ x / len(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.norm.double(), x.norm(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.mean_abs.double(), x.abs().mean(0), rtol=1e-6, atol=0)
    assert torch.equal(statistics.max_abs.double(), x.abs().amax(0))


@pytest.mark.parametrize("sizes", [[200], [1] * 200, [3, 0, 150, 47]])
def test_against_float64(sizes):
    x = inputs()
    statistics = collected(*x.split(sizes))
    check_against_float64(statistics, x)
    assert statistics.left_out == 0


def test_leading_dimensions_strides_and_types():
    x = inputs(24)
    check_against_float64(collected(x.view(2, 3, 4, 7)), x)
    check_against_float64(collected(x.t().contiguous().t()), x)
    check_against_float64(collected(x.bfloat16()), x.bfloat16())
    check_against_float64(collected(x[0]), x[:1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_rows_that_are_not_finite_are_left_out(bad):
    x = inputs()
    spoiled = x.clone()
    spoiled[[3, 50], [0, 6]] = bad
    good = torch.ones(200, dtype=torch.bool)
    good[[3, 50]] = False
    statistics = collected(*spoiled.split(40))
    check_against_float64(statistics, x[good])
    assert statistics.left_out == 2


def test_many_small_batches_lose_nothing():
    x = inputs(1, 3).repeat(3000, 1)
    statistics = collected(*x.split(1))
    torch.testing.assert_close(statistics.hessian, 2 * x[:1].T @ x[:1], rtol=1e-5, atol=0)


def test_hook():
    layer, x = nn.Linear(7, 3), inputs()
    statistics = InputStatistics(7)
    layer.register_forward_pre_hook(statistics.hook, with_kwargs=True)
    layer(x[:50])
    layer(input=x[50:])
    check_against_float64(statistics, x)


def test_errors():
    with pytest.raises(ValueError, match=r"InputStatistics: x: got \[2, 8\], expected \[..., 7\]"):
        InputStatistics(7).add(torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"gptq: statistics: got none of the Hessian, expected InputStatistics\(hess"):
        checked_hessian(collected(inputs(), hessian=False), 7, "gptq")
    with pytest.raises(ValueError, match="wanda_mask: statistics: got 7 features, expected 8"):
        check_count(collected(inputs()), 8, "wanda_mask")
    spoiled = collected(torch.full((2, 7), torch.nan))
    with pytest.raises(
        ValueError, match="x: statistics: got no inputs, expected at least one token; 2 inputs held NaN"
    ):
        check_count(spoiled, 7, "x")
