"""Hadamard matrices by their definition, and what the orthogonal ones made of them do."""

import pytest
import torch

from tcompress.quantize.hadamard import hadamard, mean_preserving, randomized_hadamard


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 40, 44, 60, 72, 76, 108, 140, 384, 576, 896, 2560])
def test_definition(n):
    h = hadamard(n)
    assert h is not None
    assert torch.equal(h.abs(), torch.ones(n, n))
    assert torch.equal(h @ h.T, n * torch.eye(n))


@pytest.mark.parametrize("n", [0, 3, 6, 10, 22, 52, 100])
def test_none_is_known(n):
    assert hadamard(n) is None


def test_sylvester():
    assert hadamard(4).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]


@pytest.mark.parametrize(("n", "kind"), [(1, "Hadamard"), (48, "Hadamard"), (52, "orthogonal"), (7, "orthogonal")])
def test_orthogonal(n, kind):
    q, what = randomized_hadamard(n)
    assert kind in what
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64))
    assert torch.equal(q, randomized_hadamard(n)[0])
    if n > 1:
        assert not torch.equal(q, randomized_hadamard(n, seed=1)[0])


def test_one_large_channel_is_spread_evenly():
    q, _ = randomized_hadamard(48)
    x = torch.zeros(48, dtype=torch.float64)
    x[5] = 10
    torch.testing.assert_close((x @ q).abs(), torch.full((48,), 10 / 48**0.5, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 9, 64])
def test_mean_preserving(n):
    q = mean_preserving(n)
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64))
    x = torch.randn(5, n, dtype=torch.float64)
    torch.testing.assert_close((x @ q).mean(1), x.mean(1))
    torch.testing.assert_close((x @ q).var(1, correction=0), x.var(1, correction=0))


@pytest.mark.parametrize("make", [randomized_hadamard, mean_preserving])
def test_no_channels(make):
    with pytest.raises(ValueError, match="n: got 0"):
        make(0)
