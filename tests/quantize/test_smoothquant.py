"""SmoothQuant's scales against the formula written out, and the error by which exponents are compared."""

import numpy as np
import pytest
import torch
from calibrated import correlated, weight

from tcompress.quantize import SCHEMES
from tcompress.quantize.smoothquant import ALPHAS, best_alpha, output_error, smooth_scales


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_formula(alpha):
    x, w = torch.tensor([1.0, 8.0, 0.1, 30.0]), torch.tensor([0.5, 0.02, 3.0, 1.0])
    expected = [a**alpha / b ** (1 - alpha) for a, b in zip(x.tolist(), w.tolist(), strict=True)]
    np.testing.assert_allclose(smooth_scales(x, w, alpha).numpy(), expected, rtol=1e-5)


def test_half_makes_both_maxima_equal():
    x, w = torch.rand(50) + 0.01, torch.rand(50) + 0.01
    s = smooth_scales(x, w, 0.5)
    torch.testing.assert_close(x / s, w * s)


def test_channels_without_inputs_or_weights_stay():
    s = smooth_scales(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]), 0.5)
    assert s.tolist() == [1, 1, 2]


def test_scales_are_at_least_the_authors_floor():
    assert smooth_scales(torch.tensor([1e-30]), torch.tensor([1e10]), 0.5)[0] == pytest.approx(1e-5)


def _per_token(x, q_max):
    step = np.abs(x).max(1, keepdims=True) / q_max
    return np.round(x / step) * step


def test_error_against_float64():
    x, w = correlated(24, 40), weight(16, 24)
    s = smooth_scales(x.abs().amax(0), w.abs().amax(0), 0.5)
    a, b, c = x.double().numpy(), w.double().numpy(), s.double().numpy()
    got = _per_token(a / c, 127) @ _per_token(b * c, 127).T
    expected = ((got - a @ b.T) ** 2).sum()
    assert output_error(x, w, s, SCHEMES["W8A8"]) == pytest.approx(expected, rel=1e-2)


def test_it_helps_where_inputs_have_outliers():
    x, w = torch.randn(200, 32), weight(16, 32)
    x[:, 5] *= 60
    s = smooth_scales(x.abs().amax(0), w.abs().amax(0), 0.5)
    scheme = SCHEMES["W8A8"]
    assert output_error(x, w, s, scheme) < 0.1 * output_error(x, w, None, scheme)


def test_best_alpha():
    errors = [5.0] * len(ALPHAS)
    errors[3] = 1.0
    assert best_alpha(errors, 2.0) == ALPHAS[3]
    assert best_alpha(errors, 1.0) is None
