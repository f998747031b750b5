"""Windows and softcap of the attention kernels in Triton's interpreter, against float64; reads out of bounds."""

from __future__ import annotations

import math

import pytest
import torch
import triton_cases

triton_cases.require()

from guarded import guarded, outcome  # noqa: E402
from tcompress.kernels.triton.attention import attention  # noqa: E402
from tcompress.kernels.triton.attention_tiles import attention_tile  # noqa: E402

import tcompress.ops  # noqa: E402, F401
from tcompress.ops.attention_reference import Visible  # noqa: E402


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def random(*shape, dtype=torch.float16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(q, k, v, mask, bottom_right, left, right, softcap):
    """Output, logarithm of the denominator, and whether a query sees a key, in float64."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    s = q @ k.mT * q.shape[-1] ** -0.5
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    seen = Visible(bottom_right, left, right).block(q.shape[2], k.shape[2], torch.arange(k.shape[2]))
    seen = seen.expand(s.shape) if mask is None else seen & mask
    s = s.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(s, -1)
    some = seen.expand(s.shape).any(-1)
    return torch.exp(s - lse.masked_fill(~some, 0)[..., None]) @ v, lse, some


WINDOWS = [  # bottom_right, left, right
    (False, 10, 0), (True, 10, 0), (True, 70, 5), (False, 0, 0), (False, -1, 3), (True, 100, -1), (False, 5, 90),
    (True, 0, -1),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "softcap"), [((130, 150), 0.0), slow((70, 200), 0.0), slow((200, 70), 0.0),
    slow((150, 150), 3.0), slow((70, 200), 3.0)])  # fmt: skip
@pytest.mark.parametrize("window", WINDOWS)
def test_windows(window, shape, softcap):
    bottom_right, left, right = window
    q, k, v = random(1, 2, shape[0], 32), random(1, 1, shape[1], 32, seed=1) + 1, random(1, 1, shape[1], 32, seed=2)
    out, lse = attention(
        q,
        k,
        v,
        None,
        bottom_right,
        return_lse=True,
        left=left,
        right=right,
        softcap=softcap,
        tile=attention_tile(32, 32, 4, 2),
    )
    expected, expected_lse, some = exact(q, k, v, None, bottom_right, left, right, softcap)
    assert (out[~some] == 0).all()
    assert (lse[~some] == -math.inf).all()
    assert (lse - expected_lse)[some].abs().max() < 0.06
    assert (out - expected)[some].norm() <= 0.021 * expected[some].norm()


@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap_with_masks_and_the_default_tile(softcap):
    q, k, v = random(2, 2, 90, 64), random(2, 2, 130, 64, seed=1) + 2, random(2, 2, 130, 48, seed=2)
    mask = random(2, 1, 90, 130, dtype=torch.float32, seed=3) > -0.5
    for causal in (False, True):
        out, lse = attention(q, k, v, mask.expand(2, 2, 90, 130), False, causal, None, True, softcap=softcap)
        expected, expected_lse, some = exact(q, k, v, mask, False, -1, 0 if causal else -1, softcap)
        assert (lse - expected_lse)[some].abs().max() < 0.06
        assert (out - expected)[some].norm() <= 0.021 * expected[some].norm()


def test_nothing_is_read_out_of_bounds():
    def run(at_start):
        for sq, skv, d, dv in ((70, 33, 40, 24), (5, 64, 64, 64)):
            q, k, v = random(1, 2, sq, d), random(1, 1, skv, d), random(1, 1, skv, dv)
            q, k, v = (guarded(t, at_start) for t in (q, k, v))
            mask = guarded(torch.ones(1, 1, sq, skv, dtype=torch.bool), at_start).expand(1, 2, sq, skv)
            attention(q, k, v, causal=True, return_lse=True)
            attention(q, k, v, mask, return_lse=True)
            attention(q, k, v, left=9, right=2)

    assert outcome(lambda: run(False)) == "ok"
    assert outcome(lambda: run(True)) == "ok"
