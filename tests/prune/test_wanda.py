"""Wanda against a plain loop over outputs."""

import pytest
import torch
from calibrated import correlated, output_error, statistics_of, weight

from tcompress.prune import magnitude_mask, wanda_mask
from tcompress.statistics import InputStatistics


def scores(w, x):
    return w.double().abs() * x.double().norm(dim=0)


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (16, 64)])
def test_the_smallest_products_of_each_output_go(shape, sparsity):
    w, x = weight(*shape), correlated(shape[1])
    mask = wanda_mask(w, statistics_of(x), "unstructured", sparsity)
    assert (mask.dtype, mask.shape) == (torch.bool, shape)
    for row, keep in zip(scores(w, x), mask, strict=True):
        assert int((~keep).sum()) == round(sparsity * shape[1])
        if keep.any() and not keep.all():
            assert row[~keep].max() <= row[keep].min() * (1 + 1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "1:3"])
def test_the_largest_products_of_each_group_stay(pattern):
    w, x = weight(9, 30), correlated(30)
    n, m = map(int, pattern.split(":"))
    mask = wanda_mask(w, statistics_of(x), pattern)
    for start in range(0, 30, m):
        group = scores(w, x)[:, start : start + m]
        best = group.argsort(1, descending=True)[:, : -(-n * group.shape[1] // m)]
        assert torch.equal(mask[:, start : start + m], torch.zeros(group.shape).scatter(1, best, 1).bool())


@pytest.mark.parametrize("pattern", ["1x4", "8x4", "16x16", "3x5"])
def test_blocks_are_compared_within_their_outputs(pattern):
    w, x = weight(35, 67), correlated(67)
    r, c = map(int, pattern.split("x"))
    mask = wanda_mask(w, statistics_of(x), pattern, 0.6)
    for i in range(0, 35, r):
        blocks = [slice(j, j + c) for j in range(0, 67, c)]
        kept = [bool(mask[i : i + r, b].all()) for b in blocks]
        assert kept == [bool(mask[i : i + r, b].any()) for b in blocks]
        assert kept.count(False) == round(0.6 * len(blocks))
        means = [float(scores(w, x)[i : i + r, b].square().mean()) for b in blocks]
        gone = [mean for mean, keep in zip(means, kept, strict=True) if not keep]
        assert max(gone) <= min(mean for mean, keep in zip(means, kept, strict=True) if keep) * (1 + 1e-5)


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.5), ("2:4", None), ("1x4", 0.5), ("8x4", 0.5)])
def test_loses_less_than_magnitude(pattern, sparsity):
    w, x = weight(64, 128), correlated(128)
    mask = wanda_mask(w, statistics_of(x), pattern, sparsity)
    assert output_error(w, w * mask, x) < output_error(w, w * magnitude_mask(w, pattern, sparsity), x)


def test_the_first_of_equal_ones_stay_and_no_hessian_is_needed():
    statistics = InputStatistics(6, hessian=False)
    statistics.add(torch.ones(1, 6))
    assert wanda_mask(torch.ones(2, 6), statistics, "unstructured", 0.5).tolist() == [[True] * 3 + [False] * 3] * 2


def test_errors():
    statistics = statistics_of(correlated(8))
    with pytest.raises(ValueError, match="wanda_mask: statistics: got 8 features, expected 4, as the weight has"):
        wanda_mask(torch.ones(2, 4), statistics, "2:4")
    with pytest.raises(ValueError, match="wanda_mask: sparsity: got None, expected 0 to 1 for 8x4"):
        wanda_mask(torch.ones(2, 8), statistics, "8x4")
    with pytest.raises(ValueError, match="wanda_mask: statistics: got no inputs"):
        wanda_mask(torch.ones(2, 8), InputStatistics(8), "2:4")
