"""The Triton kernels as compiled for 9.0, with products of warpgroups, run in the PTX emulator: the same integers as
the references and as the code for 8.0; and the fences and waits of that code, planted wrong."""

from __future__ import annotations

import re

import pytest
import torch
import triton_cases

triton_cases.require_compiler()

import test_triton_emulated as emulated_cases  # noqa: E402
from emulated import emulated  # noqa: E402
from ptx import AsyncNotWaited, MissingFence  # noqa: E402
from tcompress.kernels.triton.attention import attention  # noqa: E402
from tcompress.kernels.triton.attention_tiles import attention_tile  # noqa: E402
from tcompress.kernels.triton.linear import linear  # noqa: E402
from tcompress.kernels.triton.tiles import TileConfig  # noqa: E402

int8_linear = emulated_cases.int8_linear
random, arguments = emulated_cases.random, emulated_cases.arguments
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
SLOW = pytest.mark.slow

LINEAR = [  # tokens, channels, products, bits, symmetric, tile
    (33, 70, 130, 8, True, None),
    (65, 64, 128, 7, False, None),
    (70, 50, 300, 8, True, TileConfig(64, 32, 128, 4, 8)),
    (130, 257, 400, 8, True, TileConfig(128, 128, 128, 8, 3, registers=128)),
    (70, 130, 512, 7, False, TileConfig(64, 256, 64, 8, 3)),
]


@pytest.mark.parametrize(("m", "n", "k", "bits", "symmetric", "tile"), LINEAR)
def test_sums_are_exact(m, n, k, bits, symmetric, tile):
    x, weight, scale = arguments(m, n, k)
    with emulated(90) as gpu:
        got = linear(x, weight, scale, None, None, bits, symmetric, "none", torch.int32, tile=tile)
    assert gpu.launched[-1].kernel == "linear_wide"
    assert torch.equal(got, int8_linear.reference(x, weight, scale, None, None, bits, symmetric, "none", torch.int32))


def test_the_epilogue_is_that_of_the_code_for_8_0():
    x, weight, scale = arguments(40, 33, 70, BF16)
    results = []
    for architecture in (80, 90):
        with emulated(architecture):
            results.append(linear(x, weight, scale, random(33, seed=5), None, 7, False, "silu", None, x[:, :33]))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if i in (0, 3) else SLOW) for i, c in enumerate(emulated_cases.ATTENTION)]
)
def test_attention(case):
    emulated_cases.check_attention(90, case, 8)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if i == 0 else SLOW) for i, c in enumerate(emulated_cases.ATTENTION[:5])]
)
def test_attention_in_12_bits(case):
    """Four products into one accumulator, which is changed between them: each is waited for."""
    emulated_cases.check_attention(90, case, 12)


NORMAL = [  # D, causal, tile
    pytest.param(64, True, attention_tile(128, 128, 4, 3), marks=SLOW),
    pytest.param(64, False, None, marks=SLOW),
    pytest.param(128, True, None, marks=SLOW),
    pytest.param(128, False, attention_tile(128, 64, 8, 3, registers=128)),
]


@pytest.mark.parametrize(("d", "causal", "tile"), NORMAL)
def test_accuracy_on_normal_inputs(d, causal, tile):
    """The bars of SageAttention's paper, for int8 Q and K with smoothed K; RMSE at 256 tokens."""
    q, k, v = (random(1, 2, 256, d, dtype=F16, seed=i) for i in range(3))
    with emulated(90):
        out, _ = attention(q, k, v, causal=causal, tile=tile)
    s = q.double() @ k.double().mT * d**-0.5
    if causal:
        s = s.masked_fill(torch.ones(256, 256, dtype=torch.bool).triu(1), -torch.inf)
    expected = torch.softmax(s, -1) @ v.double()
    got = out.double()
    assert torch.cosine_similarity(got.flatten(), expected.flatten(), dim=0) >= 0.9998
    assert (got - expected).abs().sum() / expected.abs().sum() <= 0.021


def wide() -> torch.Tensor:
    x, weight, scale = arguments(70, 40, 512)
    return linear(x, weight, scale, out_dtype=torch.int32)


def attend() -> torch.Tensor:
    q, k, v = (random(1, 1, 130, 64, dtype=F16, seed=i) for i in range(3))
    return attention(q, k, v, causal=True)[0]


RUNS = {"linear_wide": wide, "attend": attend}
KERNELS = pytest.mark.parametrize("kernel", ["linear_wide", pytest.param("attend", marks=SLOW)])


def run_edited(kernel: str, pattern: str, replacement: str, only: int) -> tuple[torch.Tensor, int]:
    """The result with the pattern's `only`-th place replaced in that kernel, none for -1; how many places there are."""
    places = 0

    def edit(name: str, text: str) -> str:
        nonlocal places
        if name != kernel:
            return text
        found = list(re.finditer(pattern, text))
        places = len(found)
        if only >= 0:
            text = text[: found[only].start()] + replacement + text[found[only].end() :]
        return text

    with emulated(90, edit=edit):
        return RUNS[kernel](), places


PROXY, FENCE = r"fence\.proxy\.async\.shared::cta;", r"wgmma\.fence\.sync\.aligned;"
WAIT, COMMIT = r"wgmma\.wait_group\.sync\.aligned\s+\d+;", r"wgmma\.commit_group\.sync\.aligned;"


#: 128 bytes of swizzle, 1024 from 8 rows to the next: what the compiler adds to an address for a descriptor.
SWIZZLED_128 = 1 << 62 | 1024 >> 4 << 32
DESCRIPTOR = rf"\b{SWIZZLED_128}(?=;)"


@KERNELS
@pytest.mark.parametrize(("pattern", "replacement", "error"), [
    (PROXY, "", MissingFence), (FENCE, "", MissingFence), (WAIT, "wgmma.wait_group.sync.aligned 7;", AsyncNotWaited),
    (COMMIT, "", AsyncNotWaited),
])  # fmt: skip
def test_what_is_missing_is_reported(kernel, pattern, replacement, error):
    """Each of its places, of which the compiler may have put some without need: those change no result."""
    right, places = run_edited(kernel, pattern, replacement, -1)
    reported = 0
    for i in range(places):
        try:
            assert torch.equal(run_edited(kernel, pattern, replacement, i)[0], right)
        except error:
            reported += 1
    assert reported > 0
    assert reported >= places // 2


def test_a_wrong_descriptor_changes_the_sums():
    """The second 32 bytes of each row in the place of the first."""
    right, places = run_edited("linear_wide", DESCRIPTOR, "", -1)
    assert places >= 2
    moved, _ = run_edited("linear_wide", DESCRIPTOR, str(SWIZZLED_128 + 2), 0)
    assert not torch.equal(moved, right)
