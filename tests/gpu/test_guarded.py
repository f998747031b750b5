"""The guard pages themselves: a planted access out of bounds must not go unseen."""

from __future__ import annotations

import pytest
import torch
import triton_cases

triton_cases.require()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from guarded import guarded, outcome  # noqa: E402


@triton.jit
def copy(X, Y, n, BLOCK: tl.constexpr, EXTRA: tl.constexpr, BEFORE: tl.constexpr):
    at = tl.arange(0, BLOCK) - BEFORE
    tl.store(Y + at + BEFORE, tl.load(X + at, mask=at < n + EXTRA, other=0))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
@pytest.mark.parametrize(("extra", "before", "expected"), [(0, 0, "ok"), (1, 0, "SIGSEGV"), (0, 1, "SIGSEGV")])
def test_reads_out_of_bounds_end_the_process(dtype, extra, before, expected):
    x = guarded(torch.arange(100, dtype=dtype), at_start=before > 0)
    y = torch.zeros(128, dtype=dtype)
    assert outcome(lambda: copy[(1,)](x, y, 100, 128, extra, before)) == expected


def test_a_failed_assertion_is_told():
    def fail():
        raise AssertionError

    assert outcome(fail) == "raised"


@pytest.mark.parametrize("at_start", [False, True])
def test_values_are_kept(at_start):
    x = torch.randn(7, 13)
    assert torch.equal(guarded(x, at_start), x)
    assert guarded(torch.empty(0, 3)).shape == (0, 3)
