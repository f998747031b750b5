"""Magnitude pruning against a float64 loop over blocks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcompress.packing import pack_sparse
from tcompress.prune import magnitude_mask

BLOCKS = ["unstructured", "1x1", "1x4", "8x4", "16x16", "32x32", "3x5", "64x1"]
N_M = ["2:4", "1:2", "1:3", "5:8", "1:64"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def gaussian(n, k, seed=0, dtype=torch.float32):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sizes(pattern):
    return (1, 1) if pattern == "unstructured" else tuple(int(s) for s in pattern.replace("x", ":").split(":"))


def blocks_of(array, pattern):
    r, c = sizes(pattern)
    n, k = array.shape
    return [array[i : i + r, j : j + c] for i in range(0, n, r) for j in range(0, k, c)]


@pytest.mark.parametrize("pattern", BLOCKS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (1, 1), (1, 50), (50, 1), (16, 32), (33, 67)])
@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.95, 1])
def test_the_smallest_blocks_go(shape, pattern, sparsity):
    for dtype in FLOATS:
        weight = gaussian(*shape, dtype=dtype)
        mask = magnitude_mask(weight, pattern, sparsity)
        assert (mask.dtype, mask.shape) == (torch.bool, shape)
        assert mask.is_contiguous()
        kept = [bool(block.all()) for block in blocks_of(mask, pattern)]
        assert kept == [bool(block.any()) for block in blocks_of(mask, pattern)]  # a block goes whole or not at all
        assert kept.count(False) == round(sparsity * len(kept))
        scores = [
            float(np.sqrt(np.mean(b.astype(np.float64) ** 2))) for b in blocks_of(weight.double().numpy(), pattern)
        ]
        removed = [score for score, keep in zip(scores, kept, strict=True) if not keep]
        stay = [score for score, keep in zip(scores, kept, strict=True) if keep]
        if removed and stay:
            assert max(removed) <= min(stay) * (1 + 1e-12)


@pytest.mark.parametrize("pattern", N_M)
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (1, 1), (1, 50), (50, 1), (16, 32), (33, 67), (5, 64)])
def test_the_largest_of_each_group_stay(shape, pattern):
    n, m = sizes(pattern)
    for dtype in FLOATS:
        weight = gaussian(*shape, dtype=dtype)
        mask = magnitude_mask(weight, pattern)
        assert (mask.dtype, mask.shape) == (torch.bool, shape)
        assert mask.is_contiguous()
        for row, keep in zip(weight.abs().tolist(), mask.tolist(), strict=True):
            for start in range(0, len(row), m):
                group = row[start : start + m]
                order = sorted(range(len(group)), key=lambda i: (-group[i], i))
                chosen = sorted(order[: -(-n * len(group) // m)])
                assert [i for i, k in enumerate(keep[start : start + m]) if k] == chosen
        for sparsity in (None, 1 - n / m, (m - n) / m):
            assert torch.equal(magnitude_mask(weight, pattern, sparsity), mask)
        if dtype != torch.float64:
            pack_sparse(weight * mask, pattern)


@given(
    shape=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    pattern=st.sampled_from(BLOCKS),
    sparsity=st.floats(0, 1),
    levels=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_exact_number_with_ties(shape, pattern, sparsity, levels, seed):
    weight = gaussian(*shape, seed).round().clamp(-levels, levels)
    mask = magnitude_mask(weight, pattern, sparsity)
    kept = [bool(block.any()) for block in blocks_of(mask, pattern)]
    assert kept.count(False) == round(sparsity * len(kept))
    assert torch.equal(magnitude_mask(weight.clone(), pattern, sparsity), mask)


@pytest.mark.parametrize("pattern", BLOCKS)
def test_of_equal_blocks_the_first_stay(pattern):
    # As large in the ragged blocks: the score is by element.
    mask = magnitude_mask(torch.full((70, 67), -0.3), pattern, 0.5)
    kept = [bool(block.any()) for block in blocks_of(mask, pattern)]
    assert kept == sorted(kept, reverse=True)


def test_of_equal_ones_in_a_group_the_first_stay():
    assert magnitude_mask(torch.tensor([[1.0, -1, 1, 1, 0, 0, 0]]), "2:4").tolist() == [
        [True, True] + [False] * 2 + [True, True, False]
    ]


def test_ragged_blocks_are_compared_by_element():
    weight = torch.ones(9, 5)
    weight[8, 4] = 1.1  # alone in its block, with the smallest norm and the largest root mean square
    mask = magnitude_mask(weight, "8x4", 0.75)
    assert mask.nonzero().tolist() == [[8, 4]]


def test_large_and_small_values():
    big = torch.tensor([[3e38, 3e38, 1e38, 1e38], [1e-38, 2e-38, 3e-38, 1e-45]])
    assert magnitude_mask(big, "1x2", 0.5).tolist() == [[True] * 4, [False] * 4]
    assert magnitude_mask(big, "1x2", 0.75).tolist() == [[True] * 2 + [False] * 2, [False] * 4]
    assert magnitude_mask(big[1:], "1x2", 0.5).tolist() == [[False] * 2 + [True] * 2]


def test_zeros_go_first():
    weight = gaussian(64, 64)
    weight[weight.abs() < 0.5] = 0
    zero = float((weight == 0).float().mean())
    assert torch.equal(magnitude_mask(weight, "unstructured", zero), weight != 0)


def test_any_strides_and_parameters():
    weight = gaussian(40, 24)
    for pattern in ("unstructured", "8x4", "2:4"):
        sparsity = None if pattern == "2:4" else 0.6
        for view in (weight.t(), weight[::2, 1::3], weight[:1].expand(9, 24)):
            assert torch.equal(magnitude_mask(view, pattern, sparsity), magnitude_mask(view.clone(), pattern, sparsity))
        parameter = magnitude_mask(torch.nn.Parameter(weight), pattern, sparsity)
        assert torch.equal(parameter, magnitude_mask(weight, pattern, sparsity))


ONES = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("weight", "pattern", "sparsity", "error", "text"),
    [
        (ONES.to(torch.int8), "8x4", 0.5, TypeError, "magnitude_mask: weight: got torch.int8, expected a float type"),
        (torch.ones(4), "8x4", 0.5, ValueError, "magnitude_mask: weight: got [4], expected [N, K]"),
        (ONES * float("nan"), "8x4", 0.5, ValueError, "magnitude_mask: weight: got 16 values NaN or infinite"),
        (ONES / 0, "2:4", None, ValueError, "magnitude_mask: weight: got 16 values NaN or infinite"),
        (ONES, "4", 0.5, ValueError, "Pattern: pattern: got '4'"),
        (ONES, "8x4", None, ValueError, "magnitude_mask: sparsity: got None, expected 0 to 1 for 8x4"),
        (ONES, "8x4", 1.01, ValueError, "magnitude_mask: sparsity: got 1.01, expected 0 to 1"),
        (ONES, "8x4", -0.1, ValueError, "magnitude_mask: sparsity: got -0.1, expected 0 to 1"),
        (ONES, "8x4", float("nan"), ValueError, "magnitude_mask: sparsity: got nan, expected 0 to 1"),
        (ONES, "2:4", 0.6, ValueError, "magnitude_mask: sparsity: got 0.6, expected None or 0.5 for 2:4"),
    ],
)
def test_errors(weight, pattern, sparsity, error, text):
    with pytest.raises(error) as raised:
        magnitude_mask(weight, pattern, sparsity)
    assert str(raised.value).startswith(text)
