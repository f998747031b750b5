"""W4A16 with many tokens, through the dequantized weight: in Triton's interpreter, with torch's product on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import triton_cases

triton_cases.require()
sys.path.append(str(Path(__file__).parent.parent / "ops"))

import cases  # noqa: E402
from guarded import guarded, outcome  # noqa: E402
from tcompress.kernels.triton import int4_dequantize  # noqa: E402
from tcompress.kernels.triton.int4_linear import int4_linear  # noqa: E402
from tcompress.kernels.triton.reasons import DEQUANTIZED_FROM  # noqa: E402
from tcompress.kernels.triton.tiles import TileConfig  # noqa: E402

from tcompress import explain, ops, use_backend  # noqa: E402

M = DEQUANTIZED_FROM
HALVES = [torch.float16, torch.bfloat16]


def weight(n, k, group, dtype=torch.float16, zeros="random"):
    return cases.int4_weight(cases.random_int4(n, k), group, dtype, zeros)


def inputs(m, k, dtype):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(k)).to(dtype)


@pytest.fixture
def dequantizations(monkeypatch):
    """How often the weight was dequantized."""
    seen = []
    run = int4_dequantize.int4_dequantize

    class Counted:
        def __getitem__(self, grid):
            seen.append(grid)
            return run[grid]

    monkeypatch.setattr(int4_dequantize, "int4_dequantize", Counted())
    return seen


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("n", "k", "group", "zeros"),
    [(33, 64, 32, "random"), (1, 1, 32, None), (64, 129, 64, "random"), (40, 300, 512, None), (31, 256, 128, None)],
)
def test_weight_is_rounded_once(dequantizations, n, k, group, zeros, dtype):
    """The identity as activations gives the weight itself, in every bit."""
    w = weight(n, k, group, torch.float32 if n % 2 else torch.float16, zeros)
    x = torch.eye(max(k, M), k, dtype=dtype)
    got = int4_linear(x, *w.operands, None, group, None)
    assert torch.equal(got[:k], w.dequantized(torch.float32).to(dtype).t())
    assert not got[k:].any()
    assert len(dequantizations) == 1


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ["none", *cases.ACTIVATIONS])
def test_as_near_to_the_truth_as_torch(activation, dtype):
    w, x = weight(40, 192, 64), inputs(M, 192, dtype)
    bias, residual = torch.randn(40), torch.randn(M, 40).to(dtype)
    got = int4_linear(x, *w.operands, bias, 64, None, True, activation, None, residual)
    functions = {
        "none": lambda y: y, "relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu,
        "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    }  # fmt: skip
    run = lambda x, w, b, r: functions[activation](torch.nn.functional.linear(x, w, b)) + r  # noqa: E731
    exact = run(x.double(), w.dequantized(torch.float64), bias.double(), residual.double())
    of_torch = run(x, w.dequantized(torch.float32).to(dtype), bias.to(dtype), residual)
    error, allowed = (got.double() - exact).norm(), (of_torch.double() - exact).norm()
    assert error <= 1.5 * allowed


def test_in_parts_and_in_strides(dequantizations, monkeypatch):
    """Channels in several parts, of which the last is shorter; x, weight and residual lie otherwise in memory."""
    w = weight(70, 96, 32)
    x = inputs(M, 2 * 96, torch.bfloat16)[:, ::2].view(4, M // 4, 96)
    residual = torch.randn(70, M).bfloat16().t().view(4, M // 4, 70)
    expected = int4_linear(x.contiguous(), *w.operands, None, 32, None, residual=residual)
    monkeypatch.setattr(int4_dequantize, "WORKSPACE", 32 * 96 * 2)
    strided = (w.weight.t().contiguous().t(), w.scale.t().contiguous().t(), w.zero_point.t().contiguous().t())
    got = int4_linear(x, *strided, None, 32, None, residual=residual)
    assert got.shape == (4, M // 4, 70)
    assert len(dequantizations) == 1 + 3
    assert torch.equal(got, expected)


def test_who_goes_this_way(dequantizations):
    w = weight(16, 64, 32)

    def run(m, dtype, *options, **more):
        before = len(dequantizations)
        int4_linear(inputs(m, 64, dtype), *w.operands, None, 32, *options, **more)
        return len(dequantizations) > before

    assert run(M, torch.float16, None)
    assert run(M, torch.bfloat16, None, out_dtype=torch.bfloat16)
    assert not run(M - 1, torch.float16, None)
    assert not run(M, torch.float16, 8)
    assert not run(M, torch.float32, None)
    assert not run(M, torch.bfloat16, None, out_dtype=torch.float32)
    assert not run(M, torch.float16, None, tile=TileConfig(64, 16, 32))


def test_explain_says_so():
    w = weight(16, 64, 32)

    def path(m, dtype, **options):
        with use_backend("triton"):
            return explain(ops.int4_linear, inputs(m, 64, dtype), *w.operands, group_size=32, **options).path

    assert path(M, torch.float16, act_bits=None).startswith("weight dequantized, then torch's product")
    assert path(M - 1, torch.float16, act_bits=None) is None
    assert path(M, torch.float16) is None


@pytest.mark.parametrize("at_start", [False, True])
def test_nothing_is_read_out_of_bounds(at_start):
    def run():
        for n, k, group in ((17, 75, 32), (33, 128, 64)):
            w = weight(n, k, group)
            packed = [guarded(t, at_start) for t in w.operands]
            x, bias = guarded(inputs(M + 1, k, torch.float16), at_start), guarded(torch.randn(n), at_start)
            residual = guarded(torch.randn(M + 1, n).half(), at_start)
            int4_linear(x, *packed, bias, group, None, residual=residual)

    assert outcome(run) == "ok"


def test_a_mask_too_wide_is_caught():
    """The same with a weight that ends before the kernel thinks."""

    def run():
        w = weight(17, 64, 64)
        packed = guarded(w.weight[:-1].contiguous())
        out = torch.empty(M, 17, dtype=torch.float16)
        arguments = (packed, w.scale, w.zero_point, None, 64, "none", None, out)
        int4_dequantize.dequantized_product(inputs(M, 64, torch.float16), *arguments)

    assert outcome(run) != "ok"
