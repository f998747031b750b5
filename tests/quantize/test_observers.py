"""Observers, batch by batch, against numpy over all batches at once."""

import numpy as np
import pytest
import torch

from tcompress.quantize.observers import MinMaxObserver, MovingAverageObserver, MseObserver, PercentileObserver


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(50, 40, generator=generator) * (1 + i / 3) + 0.2 for i in range(8)]


def observed(observer, data):
    for batch in data:
        observer.observe(batch)
    return observer


def test_min_max():
    whole = torch.cat(batches())
    assert observed(MinMaxObserver(), batches()).range() == (float(whole.min()), float(whole.max()))
    assert observed(MinMaxObserver(), [torch.tensor([2.0, 3.0])]).range() == (0.0, 3.0)


def test_moving_average():
    lo = hi = None
    for batch in batches():
        new = float(batch.min()), float(batch.max())
        lo, hi = new if lo is None else (0.9 * lo + 0.1 * new[0], 0.9 * hi + 0.1 * new[1])
    assert observed(MovingAverageObserver(0.9), batches()).range() == pytest.approx((lo, hi))
    calm = observed(MovingAverageObserver(), [*batches(), torch.tensor([1e3])])
    assert calm.range()[1] < 200


@pytest.mark.parametrize("percent", [99.0, 99.9, 100.0])
def test_percentile(percent):
    x = torch.cat(batches()).double().numpy().ravel()
    lo, hi = observed(PercentileObserver(percent), batches()).range()
    bin_width = np.abs(x).max() / 1024
    assert hi == pytest.approx(np.quantile(x, percent / 100, method="inverted_cdf"), abs=2 * bin_width)
    assert lo == pytest.approx(-np.quantile(-x, percent / 100, method="inverted_cdf"), abs=2 * bin_width)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_mse_against_a_search_over_the_values(bits, symmetric):
    data = [b.abs() ** 1.5 if not symmetric else b**3 for b in batches()]
    x = torch.cat(data).double().numpy().ravel()

    def error(scale, zero):
        low, high = (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
        return float((((np.clip(np.rint(x / scale) + zero, low, high) - zero) * scale - x) ** 2).mean())

    got = error(*observed(MseObserver(bits, symmetric), data).scale(bits, symmetric))
    whole = error(*observed(MinMaxObserver(), data).scale(bits, symmetric))
    steps = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    span = np.abs(x).max() if symmetric else x.max()
    best = min(error(span * part / steps, 0) for part in np.linspace(0.05, 1, 96))
    assert got <= 1.05 * best
    assert got < whole if bits == 4 else got <= whole * 1.01


def test_scales():
    observer = observed(MinMaxObserver(), [torch.tensor([-1.0, 3.0])])
    assert observer.scale(8, symmetric=True) == (3 / 127, 0)
    assert observer.scale(4, symmetric=False) == (4 / 15, 4)


@pytest.mark.parametrize("cls", [MinMaxObserver, MovingAverageObserver, PercentileObserver, MseObserver])
def test_values_that_are_not_finite_zeros_and_nothing(cls):
    observer = cls()
    with pytest.raises(ValueError, match=f"{cls.__name__}: range: got no finite values"):
        observer.range()
    observer.observe(torch.tensor([torch.nan, torch.inf]))
    assert observer.left_out == 2
    with pytest.raises(ValueError, match="no finite values"):
        observer.range()
    observer.observe(torch.zeros(5))
    assert observer.range() == (0, 0)
    assert observer.scale(8, symmetric=True)[0] > 0
    observer.observe(torch.tensor([-2.0, torch.nan, 1.0]))
    assert observer.left_out == 3
    lo, hi = observer.range()
    assert lo < 0 < hi


def test_errors():
    with pytest.raises(ValueError, match="MovingAverageObserver: momentum: got 1"):
        MovingAverageObserver(1)
    with pytest.raises(ValueError, match="PercentileObserver: percentile: got 30"):
        PercentileObserver(30)
