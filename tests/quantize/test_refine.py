"""Refining against a plain coordinate descent and least squares in float64."""

import numpy as np
import pytest
import torch
from calibrated import correlated, damped, output_error, statistics_of, weight

from tcompress.quantize import SCHEMES, gptq, round_to_nearest
from tcompress.quantize.range_search import find_grid
from tcompress.quantize.refine import refine

NAMES = ["W4A16", "W4A16-g32", "W4A16-asym", "W4A16-g64-asym", "W8A8"]


def cost(w, values, hessian):
    d = (w.double() - values.double()).numpy()
    return np.einsum("nk,kj,nj->n", d, hessian, d)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [40, 150])
def test_never_worse_and_better_in_the_end(name, k):
    args, w, hessian = SCHEMES[name].weights, weight(24, k), damped(correlated(k))
    grid = find_grid(w, args, "test", "mse")
    q = grid.integers(w)
    before = cost(w, grid.values(q), hessian)
    h = torch.from_numpy(hessian).float()
    (once, thrice) = (cost(w, g.values(i), hessian) for g, i in (refine(w, h, grid, q, n) for n in (1, 3)))
    # Scales are rounded to float16, or to float32.
    assert (once <= before * 1.01).all()
    assert (thrice <= once * 1.01).all()
    assert once.sum() < 0.7 * before.sum()
    assert thrice.sum() < once.sum()
    assert torch.equal(refine(w, h, grid, q, 0)[1], q)


def test_scales_are_the_least_squares():
    args, w, hessian = SCHEMES["W4A16-g32"].weights, weight(5, 80), damped(correlated(80))
    grid = find_grid(w, args, "test", "mse")
    q = grid.integers(w)
    got, _ = refine(w, torch.from_numpy(hessian).float(), grid, q, 1)
    # The scales come last: they are the best for the integers that come with them.
    _, new_q = refine(w, torch.from_numpy(hessian).float(), grid, q, 1)
    for i in range(5):
        c = np.zeros((80, 3))
        for g in range(3):
            c[32 * g : 32 * g + 32, g] = new_q[i, 32 * g : 32 * g + 32].double().numpy()
        expected = np.linalg.solve(c.T @ hessian @ c, c.T @ hessian @ w[i].double().numpy())
        np.testing.assert_allclose(got.scale[i].double().numpy(), expected, rtol=2e-3)


def test_integers_against_a_plain_descent():
    args, w, hessian = SCHEMES["W4A16"].weights, weight(6, 30), damped(correlated(30))
    grid = find_grid(w, args, "test", "minmax")
    q = grid.integers(w)
    new_grid, got = refine(w, torch.from_numpy(hessian).float(), grid, q, 1)
    h = torch.from_numpy(hessian).float()
    # By hand, from the least-squares scales of the beginning.
    c = q.double().numpy()
    target = w.double().numpy()
    first = np.array([(ci @ hessian @ wi) / (ci @ hessian @ ci) for ci, wi in zip(c, target, strict=True)])
    values, integers = c * first[:, None], c.copy()
    for i in h.diagonal().argsort(descending=True, stable=True).tolist():
        wanted = values[:, i] + (target - values) @ hessian[:, i] / hessian[i, i]
        integers[:, i] = np.clip(np.rint(wanted / first), -7, 7)
        values[:, i] = integers[:, i] * first
    assert (got.double().numpy() == integers).mean() > 0.98
    assert new_grid.scale.shape == grid.scale.shape


@pytest.mark.parametrize("name", NAMES)
def test_after_gptq(name):
    args, w, x = SCHEMES[name].weights, weight(48, 200), correlated(200)
    statistics = statistics_of(x)
    errors = [
        output_error(w, gptq(w, statistics, args, range=r, sweeps=s).dequantize(), x)
        for r, s in (("minmax", 0), ("mse", 0), ("mse", 1), ("mse", 3))
    ]
    assert errors[1] < errors[0] * (0.97 if args.bits == 4 else 1.001)
    assert errors[2] < errors[1]
    assert errors[3] < errors[2] * 1.001


def test_zeros_stay():
    args, w, x = SCHEMES["W4A16-g32"].weights, weight(32, 96), correlated(96)
    w[weight(32, 96, 5).abs() < 0.6] = 0
    got = gptq(w, statistics_of(x), args, range="mse", sweeps=2).dequantize()
    assert got[w == 0].eq(0).all()


def test_dead_inputs_and_zero_rows():
    args, w, x = SCHEMES["W4A16-g32"].weights, weight(8, 70), correlated(70)
    x[:, :32] = 0
    w[3] = 0
    packed = gptq(w, statistics_of(x), args, range="mse", sweeps=2)
    assert torch.isfinite(packed.scale).all()
    assert packed.dequantize()[3].eq(0).all()
    rtn = round_to_nearest(w, args).dequantize()
    assert output_error(w, packed.dequantize(), x) < output_error(w, rtn, x)
    assert float((packed.dequantize()[:, :32] - w[:, :32]).norm()) < 1.2 * float((rtn[:, :32] - w[:, :32]).norm())


def test_layers_with_one_input_share_the_factor():
    args, x = SCHEMES["W4A16"].weights, correlated(40)
    statistics = statistics_of(x)
    first = gptq(weight(6, 40), statistics, args)
    ((_, _, factor),) = statistics.factors.values()
    again = gptq(weight(6, 40), statistics, args)
    assert statistics.factors[(True, 0.01)][2] is factor
    assert torch.equal(first.qdata, again.qdata)
    statistics.add(x)
    assert not statistics.factors
