"""Low-rank factors against the theorem, and against the output error that the cut singular values are to cost."""

from __future__ import annotations

import pytest
import torch
from calibrated import correlated, output_error, weight

from tcompress.share import low_rank_factors, rank_for


def test_the_best_of_its_rank():
    w = weight(12, 20).double()
    b, a = low_rank_factors(w, 5)
    assert (b.shape, a.shape) == ((12, 5), (5, 20))
    cut = torch.linalg.svdvals(w)[5:]
    assert torch.isclose((w - b @ a).norm(), cut.norm())


def test_whitened_costs_the_output_what_is_cut_off():
    w, x = weight(24, 32).double(), correlated(32).double()
    h = x.T @ x
    b, a = low_rank_factors(w, 8, h, damping=0.0)
    # ‖W X‖ has the singular values of W H^½.
    values, vectors = torch.linalg.eigh(h)
    cut = torch.linalg.svdvals(w @ vectors * values.sqrt())[8:]
    assert torch.isclose(((w - b @ a) @ x.T).norm(), cut.norm())
    plain = torch.matmul(*low_rank_factors(w, 8))
    assert output_error(w, b @ a, x) < 0.8 * output_error(w, plain, x)


def test_full_rank_is_exact():
    w, x = weight(6, 9), correlated(9)
    for h in (None, x.T @ x):
        torch.testing.assert_close(torch.matmul(*low_rank_factors(w, 6, h)), w, atol=1e-3, rtol=1e-3)


def test_fewer_tokens_than_inputs():
    w, x = weight(16, 40), correlated(40, tokens=10)
    b, a = low_rank_factors(w, 12, x.T @ x)
    assert output_error(w, b @ a, x) < 1e-2
    assert torch.isfinite(torch.matmul(*low_rank_factors(w, 3, torch.zeros(40, 40)))).all()


def test_rank_for_a_size():
    assert rank_for((100, 100), 0.5) == 25
    assert rank_for((576, 1536), 0.4) * (576 + 1536) <= 0.4 * 576 * 1536
    assert rank_for((2, 2), 0.5) == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"weight": torch.ones(2, 2).int()}, TypeError),
        ({"weight": torch.ones(2)}, ValueError),
        ({"rank": 0}, ValueError),
        ({"rank": 3}, ValueError),
        ({"weight": torch.tensor([[torch.inf, 1], [1, 1]])}, ValueError),
        ({"hessian": torch.ones(3, 3)}, ValueError),
        ({"hessian": torch.full((2, 2), torch.nan)}, ValueError),
        ({"hessian": -torch.eye(2) * 1e9}, ValueError),
    ],
)
def test_errors(arguments, error):
    with pytest.raises(error, match="low_rank_factors: .*got .*expected"):
        low_rank_factors(**{"weight": torch.ones(2, 2), "rank": 1} | arguments)
