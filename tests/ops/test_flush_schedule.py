"""The proof that 16-bit sums do not overflow, attacked: weights and activations at their bounds, in the worst order."""

import cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcompress import ops, use_cpu_path
from tcompress.ops.int8_prepack import flush_schedule


def _runs(weight):
    """Run lengths of the first group, from the packed bytes."""
    n, k = weight.shape
    assert n % 48 == 0
    steps = (k + 3) // 4
    packed = ops.int8_prepack(weight).view(torch.uint8)
    return packed[n * steps * 4 + n * 4 :][:steps].tolist()


def _check(weight, bits):
    """bits [M, K] of zeros and ones become activations 0 and 127; every path must give the exact sums."""
    x = torch.from_numpy(bits.astype(np.float32))
    a, _, zero_point = ops.quantize_per_token(x, 7, False)
    assert zero_point.eq(0).all()
    assert torch.equal(a.bool(), x.bool())
    assert a.max() in (0, 127)
    expected = a.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    packed, scale = ops.int8_prepack(weight), torch.ones(weight.shape[0])
    for path in cases.CPU_PATHS:
        with use_cpu_path(path):
            got = ops.int8_linear(x, weight, scale, None, packed, 7, False, "none", torch.int32)
        assert np.array_equal(got.numpy(), expected), path


def test_length_of_runs():
    """Worked by hand: a lane takes 258 in all, two weights of it a step."""
    assert _runs(torch.full((48, 400), 1, dtype=torch.int8))[:2] == [100, 0]
    assert _runs(torch.full((48, 800), 1, dtype=torch.int8))[:3] == [129, 71, 0]
    assert _runs(torch.full((48, 400), 21, dtype=torch.int8))[:2] == [6, 6]
    assert _runs(torch.full((48, 408), -43, dtype=torch.int8))[:2] == [3, 3]
    assert _runs(torch.full((48, 400), 44, dtype=torch.int8)) == [0] * 100  # runs of 2 do not pay
    assert _runs(torch.zeros((48, 2000), dtype=torch.int8))[:3] == [255, 245, 0]


def test_one_lane_decides_for_its_group():
    weight = torch.zeros(96, 400, dtype=torch.int8)
    weight[47, 2::4] = 64
    assert _runs(weight)[:3] == [4, 4, 4]
    assert flush_schedule(torch.zeros(1, 5, 192, dtype=torch.int8)).tolist() == [[5, 0, 0, 0, 0]]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [1, 2, 20, 43, 63, 64, 127])
@pytest.mark.parametrize("rows", [1, 2, 3, 35])
def test_all_at_the_bound(sign, magnitude, rows):
    weight = torch.full((96, 771), sign * magnitude, dtype=torch.int8)
    _check(weight, np.ones((rows, 771), np.int64))


@pytest.mark.parametrize("seed", range(8))
def test_activations_chosen_against_each_output(seed):
    """Row m turns on exactly the activations whose weight in output m is positive (then negative): the largest partial
    sums that there are."""
    generator = np.random.default_rng(seed)
    limit = int(generator.integers(1, 64))
    weight = torch.from_numpy(generator.integers(-limit, limit + 1, (144, 1021)).astype(np.int8))
    _check(weight, np.concatenate([weight.numpy() > 0, weight.numpy() < 0]))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), k=st.integers(1, 90), n=st.sampled_from([48, 49, 96]))
def test_any_weights(data, k, n):
    levels = st.sampled_from([-128, -127, -64, -63, -43, -1, 0, 1, 42, 63, 127])
    row = data.draw(st.lists(levels, min_size=k, max_size=k))
    shift = data.draw(st.integers(0, k))
    weight = torch.tensor([row[i % (shift + 1) :] + row[: i % (shift + 1)] for i in range(n)], dtype=torch.int8)
    bits = np.array([weight[0].numpy() > 0, weight[0].numpy() < 0, np.ones(k), np.zeros(k)])
    _check(weight, bits)
