"""Propagated weights against the least squares that they solve."""

import numpy as np
import pytest
import torch
from calibrated import correlated, weight

from tcompress.quantize.error_propagation import propagated_weight
from tcompress.statistics import InputStatistics


def paired(k=24, tokens=400, noise=0.3):
    x = correlated(k, tokens)
    got = x + noise * weight(tokens, k, 7) * x.std(0) + 0.1 * x.roll(1, 1)
    statistics = InputStatistics(k)
    for original, compressed in zip(x.split(37), got.split(37), strict=True):
        statistics.add(compressed, original)
    return x, got, statistics


def test_the_least_squares():
    x, got, statistics = paired()
    w = weight(9, 24)
    moved = propagated_weight(w, statistics, 1.0, damping=1e-9)
    expected = np.linalg.lstsq(got.double().numpy(), (x.double() @ w.double().T).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(moved.double().numpy(), expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())

    def loss(candidate):
        return float((got.double() @ candidate.double().T - x.double() @ w.double().T).norm())

    half = propagated_weight(w, statistics, 0.5)
    assert loss(moved) < loss(half) < loss(w)
    torch.testing.assert_close(propagated_weight(w, statistics, 0.0), w)


def test_the_same_inputs_change_nothing():
    x = correlated(24)
    statistics = InputStatistics(24)
    statistics.add(x, x)
    w = weight(5, 24)
    assert torch.equal(propagated_weight(w, statistics, 1.0), w)


def test_rows_that_are_not_finite_in_either():
    x, got, clean = paired()
    statistics = InputStatistics(24)
    statistics.add(got, x)
    bad = torch.full((2, 24), torch.nan), torch.ones(2, 24)
    statistics.add(*bad), statistics.add(*bad[::-1])
    assert statistics.left_out == 4
    torch.testing.assert_close(statistics.shift, clean.shift, rtol=1e-3, atol=1e-3)


def test_errors():
    statistics = InputStatistics(4)
    statistics.add(torch.ones(3, 4))
    with pytest.raises(ValueError, match="propagated_weight: statistics: got no original inputs"):
        propagated_weight(torch.ones(2, 4), statistics)
    with pytest.raises(ValueError, match=r"InputStatistics: original: got \[2, 4\], expected \[3, 4\]"):
        statistics.add(torch.ones(3, 4), torch.ones(2, 4))
