"""Ranges against a plain search in numpy."""

import numpy as np
import pytest
import torch
from calibrated import weight

from tcompress.quantize import SCHEMES, round_to_nearest
from tcompress.quantize.grid import Grid
from tcompress.quantize.range_search import find_grid

ARGS = {name: SCHEMES[name].weights for name in ("W4A16", "W4A16-g32", "W4A16-asym", "W4A16-g64-asym", "W8A8")}


def heavy(n, k, seed=0):
    """Weights with heavy tails, for which the whole range is too much."""
    return weight(n, k, seed) * torch.exp(0.8 * weight(n, k, seed + 1))


def costs(w, packed, importance):
    """Σ importance · error² of each row, in float64."""
    return ((packed.dequantize().double() - w.double()).square() * importance.double()).sum(1)


def plain_search(row, importance, lo, hi, scales):
    """The smallest cost of one group over these scales, one after the other."""
    best = np.inf
    for s in scales:
        q = np.clip(np.rint(row / s), lo, hi)
        best = min(best, float((importance * (q * s - row) ** 2).sum()))
    return best


@pytest.mark.parametrize("weighted", [False, True])
def test_symmetric_four_bits_against_a_plain_search(weighted):
    w = heavy(12, 64)
    importance = torch.exp(weight(1, 64, 5)[0]) if weighted else torch.ones(64)
    packed = round_to_nearest(w, ARGS["W4A16"], range="mse", importance=importance)
    got = costs(w, packed, importance)
    for i, row in enumerate(w.double().numpy()):
        largest = np.abs(row).max()
        scales = [sign * largest * part / 7 for part in np.linspace(0.25, 1.05, 401) for sign in (1, -1)]
        best = plain_search(row, importance.double().numpy(), -8, 7, scales)
        assert got[i] <= 1.1 * best  # 15 parts and three steps instead of 802 scales


@pytest.mark.parametrize("name", ARGS)
def test_loses_less_than_the_whole_range(name):
    w, args, ones = heavy(40, 150), ARGS[name], torch.ones(150)
    whole, found = (costs(w, round_to_nearest(w, args, range=r), ones) for r in ("minmax", "mse"))
    assert (found <= whole * (1 + 1e-6)).all()
    # Both ends of an asymmetric range shrink by one part, and one of them is often needed.
    part = 1 if args.bits > 4 else 0.9 if args.symmetric else 0.99
    assert found.sum() < part * whole.sum()


def test_importance_counts():
    w, args = heavy(20, 96), ARGS["W4A16"]
    importance = torch.ones(96)
    importance[:8] = 1e4
    plain, weighted = (round_to_nearest(w, args, range="mse", importance=i) for i in (None, importance))
    assert costs(w, weighted, importance).sum() < 0.5 * costs(w, plain, importance).sum()


def test_all_of_the_storage_is_used():
    """The larger end falls on -8, whatever its sign."""
    w = torch.tensor([[8.0, -7.0, 1.0, 3.0], [-8.0, 7.0, 1.0, 3.0]])
    grid = find_grid(w, ARGS["W4A16"], "test", "mse")
    assert grid.full_range
    assert grid.scale.flatten().tolist() == [-1.0, 1.0]
    assert torch.equal(grid.pack(grid.integers(w)).dequantize(), w)


def test_eight_bits_stay_symmetric():
    packed = round_to_nearest(heavy(9, 40), ARGS["W8A8"], range="mse")
    assert (packed.scale > 0).all()
    assert int(packed.qdata.min()) >= -127


def test_percentile():
    w = heavy(6, 1000)
    grid = find_grid(w, ARGS["W4A16"], "test", "percentile")
    limit = np.quantile(w.abs().double().numpy(), 0.995, axis=1)
    np.testing.assert_allclose(grid.scale[:, 0].double().numpy() * 7, limit, rtol=1e-5)
    assert torch.equal(grid.integers(w).abs().amax(1), torch.full((6,), 7.0))


def test_rows_are_independent_however_many(monkeypatch):
    w, args = heavy(30, 64), ARGS["W4A16-g32"]
    whole = round_to_nearest(w, args, range="mse")
    monkeypatch.setattr("tcompress.quantize.range_search._CHUNK", 64 * 7)
    parts = round_to_nearest(w, args, range="mse")
    assert torch.equal(whole.qdata, parts.qdata)
    assert torch.equal(whole.scale, parts.scale)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (3, 33)])
@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_small_shapes_and_zeros(shape, method):
    for args in ARGS.values():
        packed = round_to_nearest(torch.zeros(shape), args, range=method)
        assert packed.dequantize().eq(0).all()
        assert torch.isfinite(packed.scale).all()


def test_errors():
    with pytest.raises(ValueError, match=r"test: importance: got \[3\], expected \[4\]"):
        find_grid(torch.ones(2, 4), ARGS["W4A16"], "test", "mse", torch.ones(3))
    with pytest.raises(ValueError, match="test: weight: got 1 values NaN or infinite"):
        find_grid(torch.tensor([[1.0, torch.nan]]), ARGS["W4A16"], "test", "mse")


def test_a_grid_knows_what_its_integers_stand_for():
    for args in ARGS.values():
        w = heavy(7, 70)
        grid = Grid.of(w, args, "test")
        q = grid.integers(w)
        torch.testing.assert_close(grid.values(q), grid.pack(q).dequantize(), rtol=1e-6, atol=0)
