"""k-means codebooks against a plain Lloyd iteration, and against the exact optimum of small sets."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from calibrated import weight

from tcompress.packing.codebook import CodebookWeight, pack_bits, unpack_bits
from tcompress.packing.int4 import pack_int4
from tcompress.quantize import Scheme, round_to_nearest
from tcompress.share import kmeans_1d, kmeans_codebook


def lloyd(values, masses, centroids, iterations):
    """Every value with every centroid."""
    values, masses, centroids = (np.asarray(t, dtype=np.float64) for t in (values, masses, centroids))
    for _ in range(iterations):
        nearest = np.abs(values[:, None] - centroids[None]).argmin(1)
        for i in range(len(centroids)):
            own = nearest == i
            if masses[own].sum() > 0:
                centroids[i] = (values[own] * masses[own]).sum() / masses[own].sum()
    return np.sort(centroids)


def cost(values, masses, centroids):
    gaps = (values[:, None].double() - centroids[None].double()).square().amin(1)
    return float((gaps * masses.double()).sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_lloyds_algorithm(weighted):
    values = weight(3, 200)
    masses = torch.rand(3, 200, generator=torch.Generator().manual_seed(1)) if weighted else torch.ones(3, 200)
    got = kmeans_1d(values, masses, 8, "linear", 25)
    for v, m, c in zip(values, masses, got, strict=True):
        start = np.linspace(float(v.min()), float(v.max()), 8)
        assert np.allclose(c.numpy(), lloyd(v, m, start, 25), atol=1e-5)


@pytest.mark.parametrize("init", ["linear", "k-means++"])
def test_near_the_exact_optimum(init):
    values = weight(1, 14)[0].sort().values
    masses = torch.ones(14)
    best = min(
        sum(float((part - part.mean()).double().square().sum()) for part in torch.tensor_split(values, cuts))
        for cuts in combinations(range(1, 14), 3)
    )
    generator = torch.Generator().manual_seed(0)
    found = min(
        cost(values, masses, kmeans_1d(values[None], masses[None], 4, init, 100, generator)[0])
        for _ in range(1 if init == "linear" else 5)
    )
    assert best * (1 - 1e-6) <= found <= best * 1.6


def test_what_weighs_nothing_takes_no_part():
    values = torch.cat([weight(2, 40), torch.full((2, 3), 1e4)], 1)
    masses = torch.cat([torch.ones(2, 40), torch.zeros(2, 3)], 1)
    got = kmeans_1d(values, masses, 4, "k-means++", 50, torch.Generator().manual_seed(0))
    expected = kmeans_1d(values[:, :40], masses[:, :40], 4, "linear", 50)
    assert got.abs().max() < 10
    assert torch.equal(kmeans_1d(values, masses, 4, "linear", 50), expected)


@pytest.mark.parametrize(("rows", "columns"), [(None, None), (1, None), (5, None), (None, 7), (4, 8), (100, 100)])
def test_tiles_are_clustered_one_by_one(rows, columns):
    w = weight(13, 22)
    found = kmeans_codebook(w, 3, rows, columns, dtype=torch.float32)
    r, c = min(rows or 13, 13), min(columns or 22, 22)
    got = found.dequantize()
    assert got.shape == w.shape
    for i, strip in enumerate(w.split(r)):
        for j, tile in enumerate(strip.split(c, 1)):
            alone = kmeans_codebook(tile, 3, dtype=torch.float32)
            torch.testing.assert_close(got[i * r : (i + 1) * r, j * c : (j + 1) * c], alone.dequantize())


def test_each_weight_takes_the_nearest_stored_value():
    w = weight(9, 31)
    found = kmeans_codebook(w, 4, 1)
    assert found.codebook.dtype == torch.float16
    assert found.codebook.shape == (9, 1, 16)
    assert found.indices.shape == (9, 16)
    gaps = (w[:, :, None] - found.codebook.float()).abs()
    assert torch.allclose((found.dequantize(torch.float32) - w).abs(), gaps.amin(2))
    assert found.nbytes == 9 * 16 + 9 * 16 * 2


@pytest.mark.parametrize(("rows", "better"), [(1, 0.75), (8, 0.85), (None, 0.85)])
def test_against_rounding_to_a_grid(rows, better):
    """Of as many bits and one scale a row."""
    w = weight(64, 256) * torch.linspace(0.5, 1.5, 64)[:, None]
    w[:, ::97] *= 3  # a few that are larger than the rest
    rounded = round_to_nearest(w, Scheme.named("W4A16").weights).dequantize()
    shared = kmeans_codebook(w, 4, rows).dequantize(torch.float32)
    assert (shared - w).norm() < better * (rounded - w).norm()


def test_importance_draws_the_values():
    w = weight(16, 32)
    w[:, :8] *= 0.3
    h = torch.ones(32)
    h[:8] = 100
    plain, weighted = (kmeans_codebook(w, 2, importance=i).dequantize(torch.float32) for i in (None, h))
    errors = [((got - w).square() * h).sum() for got in (plain, weighted)]
    assert errors[1] < 0.9 * errors[0]


def test_zeros_stay_zero():
    w = weight(8, 40)
    w[:, ::2] = 0
    assert torch.equal(kmeans_codebook(w, 3, 1).dequantize()[:, ::2], torch.zeros(8, 20, dtype=torch.float16))
    few = weight(1, 40) + 3
    few[0, 0] = 0  # one in forty costs no value of its own
    assert kmeans_codebook(few, 2).dequantize()[0, 0] != 0 or few.abs().min() == 0


def test_few_distinct_values_are_exact():
    w = torch.tensor([[0.5, -1.0, 0.25, 0.5], [2.0, 2.0, -1.0, 0.25]])
    assert torch.equal(kmeans_codebook(w, 3, dtype=torch.float32).dequantize(), w)
    constant = torch.full((3, 3), 0.7)
    assert torch.equal(kmeans_codebook(constant, 2, dtype=torch.float32).dequantize(), constant)


def test_drawn_by_the_seed():
    w = weight(4, 300)
    a, b, c = (kmeans_codebook(w, 3, init="k-means++", iterations=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.codebook, b.codebook)
    assert not torch.equal(a.codebook, c.codebook)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing(bits):
    q = torch.randint(0, 2**bits, (5, 13), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack_bits(q, bits)
    assert packed.shape == (5, -(-13 * bits // 8))
    numbers = [sum(int(v) << (i * bits) for i, v in enumerate(row)) for row in q]
    assert [int.from_bytes(bytes(row.tolist()), "little") for row in packed] == numbers
    assert torch.equal(unpack_bits(packed, 13, bits), q)
    if bits == 4:
        assert torch.equal(packed, pack_int4(q))


def test_packing_nothing():
    assert pack_bits(torch.zeros(0, 5, dtype=torch.uint8), 3).shape == (0, 2)
    assert unpack_bits(torch.zeros(2, 0, dtype=torch.uint8), 0, 3).shape == (2, 0)


def test_of_a_codebook_a_tile():
    weight = CodebookWeight(
        pack_bits(torch.tensor([[0, 1, 1]], dtype=torch.uint8), 1), torch.tensor([[[1.0, 2], [3, 4]]]), (1, 3), 1, 1, 2
    )
    assert weight.dequantize().tolist() == [[1, 2, 4]]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"weight": torch.ones(2, 2).int()}, TypeError),
        ({"weight": torch.ones(2)}, ValueError),
        ({"weight": torch.ones(0, 2)}, ValueError),
        ({"weight": torch.tensor([[torch.nan]])}, ValueError),
        ({"weight": torch.tensor([[1e6]])}, ValueError),
        ({"bits": 9}, ValueError),
        ({"rows": 0}, ValueError),
        ({"dtype": torch.bfloat16}, ValueError),
        ({"importance": torch.ones(3)}, ValueError),
        ({"importance": torch.tensor([-1.0, 1.0])}, ValueError),
    ],
)
def test_errors(arguments, error):
    with pytest.raises(error, match="kmeans_codebook: .*got .*expected"):
        kmeans_codebook(**{"weight": torch.ones(2, 2), "bits": 2} | arguments)
