"""SparseGPT against the optimal brain surgeon in float64, and against Wanda and magnitude."""

import numpy as np
import pytest
import torch
from calibrated import correlated, damped, output_error, statistics_of, surgeon, weight

from tcompress.packing import pack_sparse
from tcompress.prune import magnitude_mask, sparsegpt, wanda_mask
from tcompress.quantize import SCHEMES, gptq, round_to_nearest
from tcompress.statistics import InputStatistics

PATTERNS = [("unstructured", 0.5), ("2:4", None), ("1x4", 0.5), ("8x4", 0.5), ("16x16", 0.5)]


def chooser(mask, pattern, sparsity, stripe):
    """Fills the mask as the docstring says, one group of columns at a time, in plain loops."""

    def choose(w, costs, step):
        n, k = w.shape
        if ":" in pattern:
            keep, m = map(int, pattern.split(":"))
            if step % m == 0:
                for row in range(n):
                    loss = w[row, step : step + m] ** 2 / costs[step : step + m]
                    mask[row, step : step + m] = False
                    mask[row, step + np.argsort(-loss)[: -(-keep * len(loss) // m)]] = True
        elif step % stripe == 0:
            r, c = (1, 1) if pattern == "unstructured" else map(int, pattern.split("x"))
            end = min(step + stripe, k)
            blocks = [(slice(i, min(i + r, n)), slice(j, min(j + c, end))) for i in range(0, n, r)
                      for j in range(step, end, c)]  # fmt: skip
            loss = [float((w[b] ** 2 / costs[b[1]]).mean()) for b in blocks]
            for index in np.argsort(loss)[: round(sparsity * len(blocks))]:
                mask[blocks[index]] = False

    return choose


@pytest.mark.parametrize("name", [None, "W8A8", "W4A16-g32"])
@pytest.mark.parametrize(("pattern", "sparsity"), [*PATTERNS, ("3:5", None), ("3x5", 0.4)])
def test_against_the_optimal_brain_surgeon(pattern, sparsity, name):
    n, k = 10, 150
    w, x = weight(n, k), correlated(k)
    mask = np.ones((n, k), dtype=bool)
    stripe = 128 - 128 % (int(pattern.split("x")[1]) if "x" in pattern else 1)
    choose = chooser(mask, pattern, sparsity, stripe)
    expected = surgeon(w, damped(x), np.arange(k), lambda values, i: values * mask[:, i], choose)
    args = None if name is None else SCHEMES[name].weights
    if args is not None:
        scale = round_to_nearest(expected, args).scale.double().view(n, -1).numpy()
        q_max, size = 2 ** (args.bits - 1) - 1, args.group_size or k

        def replace(values, i):
            return np.clip(np.rint(values * mask[:, i] / scale[:, i // size]), -q_max, q_max) * scale[:, i // size]

        order = statistics_of(x).hessian.diagonal().argsort(descending=True, stable=True).numpy()
        expected = surgeon(expected, damped(x), order, replace)
    got = sparsegpt(w, statistics_of(x), pattern, sparsity, args)
    assert float((got.mask == torch.from_numpy(mask)).double().mean()) > 0.99
    assert output_error(w, got.weight, x) == pytest.approx(output_error(w, expected, x), rel=0.02)
    assert got.weight[~got.mask].eq(0).all()
    pack_sparse(got.weight, pattern)
    if args is None:
        assert got.packed is None
        same = torch.isclose(got.weight.double(), expected, rtol=1e-3, atol=1e-3)
        assert float(same.double().mean()) > 0.98
    else:
        assert torch.equal(got.packed.dequantize(), got.weight)


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_order_of_the_methods(pattern, sparsity):
    w, x = weight(64, 256), correlated(256, 1024)
    statistics = statistics_of(x)
    magnitude = output_error(w, w * magnitude_mask(w, pattern, sparsity), x)
    wanda = output_error(w, w * wanda_mask(w, statistics, pattern, sparsity), x)
    solved = sparsegpt(w, statistics, pattern, sparsity)
    assert output_error(w, solved.weight, x) < wanda < magnitude
    assert float((~solved.mask).double().mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_in_one_pass_less_is_lost_than_one_after_the_other(pattern, sparsity):
    args, w, x = SCHEMES["W4A16-g32"].weights, weight(64, 256), correlated(256, 1024)
    statistics = statistics_of(x)
    joint = output_error(w, sparsegpt(w, statistics, pattern, sparsity, args).weight, x)
    pruned = sparsegpt(w, statistics, pattern, sparsity)
    rounded = output_error(w, round_to_nearest(pruned.weight, args).dequantize(), x)
    assert joint < 0.8 * rounded
    dense = gptq(w, statistics, args).dequantize()
    mask = magnitude_mask(dense, pattern, sparsity)
    assert joint < 0.8 * output_error(w, dense * mask, x)  # the other way round


def test_weights_of_dead_inputs_go_first():
    w, x = weight(8, 64), correlated(64)
    x[:, 10:20] = 0
    solved = sparsegpt(w, statistics_of(x), "unstructured", 0.5)
    assert solved.weight[:, 10:20].eq(0).all()
    assert not solved.mask[:, 10:20].any()


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_and_all(sparsity):
    w = weight(8, 40)
    solved = sparsegpt(w, statistics_of(correlated(40)), "8x4", sparsity)
    assert torch.equal(solved.weight, w * (1 - sparsity))
    assert solved.mask.all() if sparsity == 0 else not solved.mask.any()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1)])
def test_small_shapes(shape):
    statistics = InputStatistics(shape[1])
    statistics.add(torch.ones(2, shape[1]))
    assert sparsegpt(torch.ones(shape), statistics, "2:4").weight.shape == shape
    assert sparsegpt(torch.ones(shape), statistics, "8x4", 0.5, SCHEMES["W8A8"].weights).packed.shape == shape


def test_errors():
    statistics = statistics_of(correlated(8))
    with pytest.raises(ValueError, match="sparsegpt: statistics: got 8 features, expected 4"):
        sparsegpt(torch.ones(2, 4), statistics, "2:4")
    with pytest.raises(ValueError, match="sparsegpt: weight: got 8 values NaN"):
        sparsegpt(torch.full((1, 8), torch.inf), statistics, "2:4")
    without = InputStatistics(8, hessian=False)
    without.add(torch.ones(1, 8))
    with pytest.raises(ValueError, match="sparsegpt: statistics: got none of the Hessian"):
        sparsegpt(torch.ones(1, 8), without, "2:4")
