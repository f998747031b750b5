"""Defects planted in what Triton compiled for 8.0: what a wrong compiler, or a wrong kernel, would do is reported."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import triton_cases

triton_cases.require_compiler()

from emulated import emulated  # noqa: E402
from ptx import AsyncNotWaited, DivergentBarrier, Misaligned, OutOfBounds, PtxError, Race  # noqa: E402
from tcompress.kernels.triton.attention import attention  # noqa: E402
from tcompress.kernels.triton.attention_tiles import attention_tile  # noqa: E402
from tcompress.kernels.triton.attention_varlen import attention_varlen  # noqa: E402
from tcompress.kernels.triton.linear import linear  # noqa: E402
from tcompress.kernels.triton.quantize_tokens import quantize_tokens  # noqa: E402


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wide() -> torch.Tensor:
    weight = torch.randint(-128, 128, (40, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    return linear(random(70, 256), weight, torch.ones(40), out_dtype=torch.int32)


def attend() -> torch.Tensor:
    q, k, v = (random(1, 1, 130, 64, seed=i).half() for i in range(3))
    return attention(q, k, v, causal=True)[0]


def quantize() -> torch.Tensor:
    return quantize_tokens(random(5, 300))[0]


def attend_varlen() -> torch.Tensor:
    """Two sequences, of 20 and 13 queries and 33 and 30 keys."""
    q, k, v = random(33, 1, 32).half(), random(63, 1, 32, seed=1).half(), random(63, 1, 32, seed=2).half()
    ends = torch.tensor([0, 20, 33]), torch.tensor([0, 33, 63])
    return attention_varlen(q, k, v, *ends, right=0, tile=attention_tile(64, 32, 4, 2))[0]


RUNS: dict[str, Callable[[], torch.Tensor]] = {
    "linear_wide": wide,
    "attend": attend,
    "attend_varlen": attend_varlen,
    "quantize_rows": quantize,
}
KERNELS = pytest.mark.parametrize(
    "kernel", ["linear_wide", "quantize_rows", pytest.param("attend", marks=pytest.mark.slow)]
)


def planted(kernel: str, pattern: str, replacement: str, only: int | None = None) -> torch.Tensor:
    """The result with the pattern's `only`-th place, or each, replaced in that kernel; it has to be there."""

    def edit(name: str, text: str) -> str:
        if name != kernel:
            return text
        found = list(re.finditer(pattern, text))
        assert found
        for i, m in reversed(list(enumerate(found))):
            if only in (None, i):
                text = text[: m.start()] + m.expand(replacement) + text[m.end() :]
        return text

    with emulated(80, edit=edit):
        return RUNS[kernel]()


def places(kernel: str, pattern: str) -> int:
    count = 0

    def edit(name: str, text: str) -> str:
        nonlocal count
        count += len(re.findall(pattern, text)) if name == kernel else 0
        return text

    with emulated(80, edit=edit):
        RUNS[kernel]()
    return count


BARRIER = r"bar\.sync\s+0;"
WAIT = r"cp\.async\.wait_group\s+\d+;"


@KERNELS
def test_every_barrier_that_is_missing(kernel):
    """Those that Triton places without need change nothing; none is missing unnoticed where it changes the result."""
    with emulated(80):
        right = RUNS[kernel]()
    reported = 0
    n = places(kernel, BARRIER)
    for i in range(n):
        try:
            assert torch.equal(planted(kernel, BARRIER, "", i), right)
        except Race:
            reported += 1
    assert reported > n // 2


@pytest.mark.parametrize("kernel", ["linear_wide", pytest.param("attend", marks=pytest.mark.slow)])
def test_every_wait_that_is_too_short(kernel):
    for i in range(places(kernel, WAIT)):
        with pytest.raises(AsyncNotWaited):
            planted(kernel, WAIT, "cp.async.wait_group 7;", i)


@pytest.mark.parametrize("at", [0, 1])
def test_a_bound_that_is_off_by_one(at):
    """Rows, and values of a row."""
    with pytest.raises(OutOfBounds):
        planted("quantize_rows", r"setp\.lt\.s32", "setp.le.s32", at)


def test_a_vector_that_is_not_aligned():
    with pytest.raises(Misaligned):
        planted("linear_wide", r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+ 0 \], \[ %rd\d+) \+ 0 \]", r"\1 + 4 ]", 0)


def test_a_barrier_that_lanes_skip():
    skip = "{ .reg .pred q; setp.gt.s32 q, %r1, 100; @q bra SKIP; bar.sync 0; SKIP: }"
    tid = r"mov\.u32\s+(%r\d+), %tid\.x;"
    with pytest.raises(DivergentBarrier):
        planted(
            "quantize_rows",
            rf"{tid}((?:.|\n)*?){BARRIER}",
            rf"mov.u32 \1, %tid.x;\2{skip.replace('%r1', chr(92) + '1')}",
        )


def test_a_mask_that_is_wrong():
    """No rule of PTX is broken: it shows in the numbers. Query i no longer sees key i."""
    with emulated(80):
        right = attend()
    wrong = planted("attend", r"setp\.le\.s32", "setp.lt.s32")
    # the first query sees nothing now
    assert (wrong[0, 0, 0] == 0).all()
    assert (wrong - right).abs().max() > 0.1


def test_a_mask_of_sequences_that_is_wrong():
    """The same for sequences laid end to end: the first query of each sees nothing."""
    with emulated(80):
        right = attend_varlen()
    wrong = planted("attend_varlen", r"setp\.le\.s32", "setp.lt.s32")
    assert (right[[0, 20]] != 0).any(-1).all()
    assert (wrong[[0, 20]] == 0).all()
    assert (wrong - right).abs().max() > 0.1


def test_a_copy_from_beyond_the_end():
    """The clamp to the last row is what keeps the address inside."""
    with pytest.raises(PtxError) as caught:
        planted("linear_wide", r"min\.s32\s+(%r\d+), (%r\d+), (%r\d+);", r"mov.b32 \1, \2;")
    assert isinstance(caught.value, OutOfBounds)
