"""The numbers of the report, against a computation by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tcompress.attention_error import AttentionError
from tcompress.nn import Int8Attention
from tcompress.ops import quantized_attention


def qkv(b=2, h=3, sq=5, skv=6, d=8):
    return [torch.randn(b, h, s, d) for s in (sq, skv, skv)]


def by_hand(expected, got):
    o, p = expected.double().flatten(), got.double().flatten()
    return (
        float(F.cosine_similarity(o, p, dim=0)),
        float((p - o).abs().sum() / o.abs().sum()),
        float((p - o).square().mean().sqrt()),
    )


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_by_hand_over_several_calls(precision):
    torch.manual_seed(0)
    attention, error = Int8Attention(12, precision).eval(), AttentionError(8)
    attention.register_forward_hook(error.hook, with_kwargs=True)
    calls = [qkv(), qkv(1, sq=9, skv=2)]
    options = {"is_causal": True, "scale": 0.4}
    for call in calls:
        attention(*call, **options, dropout=0.1)
    expected = [F.scaled_dot_product_attention(*c, **options) for c in calls]
    got = [quantized_attention(*c, bits=8, **options) for c in calls]
    assert error.calls == 2

    def join(results, heads):
        return torch.cat([r[:, heads].flatten() for r in results])

    assert error.total == pytest.approx(by_hand(join(expected, slice(None)), join(got, slice(None))), abs=1e-6)
    for head in range(3):
        assert error.heads[head] == pytest.approx(by_hand(join(expected, head), join(got, head)), abs=1e-6)
    assert 0 < error.total[1] < 0.05


def test_calls_with_other_numbers_of_heads():
    error = AttentionError(8)
    for heads in (2, 3, 1):
        error.add(torch.ones(1, heads, 1, 1), torch.full((1, heads, 1, 1), 2.0))
    assert error.heads == [(1.0, 1.0, 1.0)] * 3
    assert error.calls == 3


@pytest.mark.parametrize(
    ("expected", "got", "numbers"),
    [
        (0.0, 0.0, (1.0, 0.0, 0.0)),
        (0.0, 2.0, (0.0, math.inf, 2.0)),
        (1.0, -1.0, (-1.0, 2.0, 2.0)),
        (1.0, math.nan, (math.nan, math.nan, math.nan)),
        (math.inf, 1.0, (math.nan, math.nan, math.inf)),
    ],
)
def test_special_values(expected, got, numbers):
    error = AttentionError(12)
    error.add(torch.full((1, 1, 2, 2), expected), torch.full((1, 1, 2, 2), got))
    assert error.total == pytest.approx(numbers, nan_ok=True)


def test_never_called():
    error = AttentionError(12)
    assert (error.calls, error.heads) == (0, [])
