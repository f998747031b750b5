"""The proof that the runs of a sparse weight's words do not overflow 16 bits, attacked: weights and activations at
their bounds, in the worst order."""

import cases
import numpy as np
import pytest
import sparse_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcompress import ops, use_backend, use_cpu_path


def _check(weight, bits):
    """bits [M, K] of zeros and ones become activations 0 and 127; every path must give the exact sums, also where the
    tokens are too many for the way of few."""
    x = torch.from_numpy(np.tile(bits.astype(np.float32), (-(-9 // len(bits)), 1)))
    a, _, zero_point = ops.quantize_per_token(x, 7, False)
    assert zero_point.eq(0).all()
    assert torch.equal(a.bool(), x.bool())
    assert a.max() in (0, 127)
    expected = a.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    for layout in sparse_cases.LAYOUTS[torch.int8]:
        packed, scale = ops.sparse_prepack(weight, layout), torch.ones(weight.shape[0])
        for path in cases.CPU_PATHS:
            for m in (len(x), min(len(bits), 8)):
                with use_backend("cpu"), use_cpu_path(path):
                    y = ops.int8_sparse_linear(x[:m], packed, scale, None, layout, 7, False, "none", torch.int32)
                assert np.array_equal(y.numpy(), expected[:m]), (layout, path, m)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [1, 2, 3, 20, 43, 63, 64, 65, 127])
@pytest.mark.parametrize("rows", [1, 9, 35])
def test_all_at_the_bound(sign, magnitude, rows):
    weight = torch.full((19, 771), sign * magnitude, dtype=torch.int8)
    _check(weight, np.ones((rows, 771), np.int64))
    _check(torch.full((19, 771), -128, dtype=torch.int8), np.ones((rows, 771), np.int64))


@pytest.mark.parametrize("pattern", sparse_cases.PATTERNS)
@pytest.mark.parametrize("limit", [3, 17, 64, 127])
def test_activations_chosen_against_each_output(pattern, limit):
    """Row m turns on exactly the activations whose weight in output m is positive (then negative): the largest partial
    sums that there are."""
    g = np.random.default_rng(limit)
    weight = torch.from_numpy(g.integers(-limit - 1, limit + 1, (50, 1021)).astype(np.int8))
    weight = weight.masked_fill(~sparse_cases.PATTERNS[pattern](50, 1021), 0)
    _check(weight, np.concatenate([weight.numpy() > 0, weight.numpy() < 0]))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), k=st.integers(1, 600), n=st.sampled_from([1, 7, 9, 49]))
def test_any_weights(data, k, n):
    """A few levels along K, sparse in units of four and shifted from output to output."""
    levels = st.sampled_from([-128, -127, -64, -43, -1, 0, 1, 42, 63, 127])
    period = data.draw(st.lists(levels, min_size=1, max_size=24))
    kept = data.draw(st.lists(st.booleans(), min_size=1, max_size=70))
    shift = data.draw(st.integers(0, 5))
    output, column = np.arange(n)[:, None], np.arange(k)
    weight = np.array(period, np.int8)[(column + output * shift) % len(period)]
    weight = torch.from_numpy(weight * np.array(kept)[(column // 4 + output * shift) % len(kept)])
    w = weight.numpy()
    _check(weight, np.concatenate([w[:3] > 0, w[:3] < 0, np.ones((1, k)), np.zeros((1, k))]))
