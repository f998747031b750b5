"""AWQ's scales against the formula written out, and the error by which ratios are compared."""

import numpy as np
import pytest
import torch
from calibrated import correlated, output_error, statistics_of, weight

from tcompress.quantize import SCHEMES, round_to_nearest
from tcompress.quantize.awq import RATIOS, awq_scales, weight_error

ARGS = SCHEMES["W4A16-g32"].weights


@pytest.mark.parametrize("ratio", [0.0, 0.35, 0.95])
def test_formula(ratio):
    mean = torch.tensor([0.2, 5.0, 1.0, 0.01])
    s = mean.double().numpy() ** ratio
    np.testing.assert_allclose(awq_scales(mean, ratio).numpy(), s / np.sqrt(s.max() * s.min()), rtol=1e-5)


def test_unused_channels_keep_their_scale():
    s = awq_scales(torch.tensor([0.0, 4.0, 1.0]), 0.5)
    assert s[0] == 1
    assert (s[1] / s[2]).item() == pytest.approx(2)
    assert awq_scales(torch.zeros(3), 0.5).tolist() == [1, 1, 1]


def test_error_is_that_of_the_outputs():
    x, w = correlated(64, 300), weight(16, 64)
    s = awq_scales(x.abs().mean(0), 0.4)
    approximation = round_to_nearest(w * s, ARGS).dequantize().double() / s.double()
    expected = 2 / len(x) * ((approximation - w.double()) @ x.double().T).square().sum()
    assert weight_error(w, statistics_of(x).hessian, s, ARGS) == pytest.approx(float(expected), rel=1e-4)


def test_the_best_ratio_beats_rounding_alone():
    x, w = correlated(128, 400), weight(32, 128)
    x[:, 7] *= 20  # a salient channel
    hessian, mean = statistics_of(x).hessian, x.abs().mean(0)
    scales = [awq_scales(mean, i / RATIOS) for i in range(RATIOS)]
    best = min(scales, key=lambda s: weight_error(w, hessian, s, ARGS))
    rounded = round_to_nearest(w, ARGS).dequantize()
    scaled = round_to_nearest(w * best, ARGS).dequantize() / best
    assert output_error(w, scaled, x) < 0.8 * output_error(w, rounded, x)
