"""The kernels of csrc/cuda as nvcc compiles them, run in the PTX emulator: integers bit for bit, attention against
float64.

The launches repeat what the host code in the .cuh files does: the structures field by field (`Struct`), the grid, the
shared memory. `run_ptx` checks the structure's size against the compiled one.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import numpy as np
import nvcc
import pytest
from ptx import Buffer, Struct, run_ptx

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
if nvcc.missing():
    pytest.skip(nvcc.missing() or "", allow_module_level=True)
if not CUDA.is_dir():
    pytest.skip("there is no csrc/cuda", allow_module_level=True)
torch = pytest.importorskip("torch")

import tcompress.ops  # noqa: E402, F401

per_token = sys.modules["tcompress.ops.quantize_per_token"]

I8, I32, I64, F16, F32 = np.int8, np.int32, np.int64, np.float16, np.float32
NULL = np.uint64(0)
#: cpu::DType, cpu::Activation
FLOAT32, FLOAT16, INT32, NO_ACTIVATION = I32(0), I32(2), I32(3), I32(0)
ARCHITECTURES = pytest.mark.parametrize("architecture", [80, pytest.param(89, marks=pytest.mark.slow)])


def compiled(name: str, architecture: int) -> str:
    return nvcc.compile_ptx(CUDA / f"{name}.cu", architecture, (), (), ("--expt-relaxed-constexpr",))


def named(text: str, *words: str) -> str:
    """The mangled name of the kernel whose name has these words, and template arguments."""
    found = [n for n in re.findall(r"\.entry (\w+)\(", text) if all(w in n for w in words)]
    assert len(found) == 1, (words, found)
    return found[0]


def unwritten(*shape: int, dtype: type = I32) -> Buffer:
    return Buffer(np.zeros(shape, dtype), written=False)


@ARCHITECTURES
@pytest.mark.parametrize(("m", "k", "bits", "symmetric"), [(3, 304, 8, True), (2, 77, 7, False)])
def test_quantizer_is_exact(architecture, m, k, bits, symmetric):
    x = np.random.default_rng(0).standard_normal((m, k)).astype(F32)
    width = -(-k // 16) * 16
    q, scale, zero = unwritten(m, width, dtype=np.uint8), unwritten(m, dtype=F32), unwritten(m)
    args = Struct(
        (x, FLOAT32, I64(m), I64(k), I32(bits), np.bool_(symmetric), np.bool_(False), q, I64(width), scale, zero)
    )
    text = compiled("quantize_per_token", architecture)
    run_ptx(text, named(text, "quantize_per_token_kernel"), (m, 1, 1), (128, 1, 1), [args], 16)
    expected, expected_scale, expected_zero = per_token.reference(torch.from_numpy(x), bits, symmetric)
    assert (q.array[:, :k] == expected.numpy().view(np.uint8)).all()
    assert (q.array[:, k:] == 0).all()
    assert (scale.array == expected_scale[:, 0].numpy()).all()
    assert (zero.array == expected_zero[:, 0].numpy()).all()


def linear_arguments(a, weight, y, k, stride) -> Struct:
    m, n = y.array.shape
    ones = np.ones(m, F32), np.ones(n, F32)
    return Struct((
        a, weight, *ones, NULL, NULL, NULL, NULL, y, I64(m), I64(n), I64(k), I64(a.shape[1]), I64(stride), INT32,
        NO_ACTIVATION, I32(1),
    ))  # fmt: skip


# tokens, and of the tile: its name, tokens, channels, threads, bytes
TILES = [
    (130, "Li128ELi128ELi64E", 128, 128, 128, 64 * 1024),
    (70, "Li64ELi64ELi64E", 64, 64, 128, 32 * 1024),
    (9, "Li16ELi32ELi256E", 16, 32, 256, 48 * 1024),
]


@ARCHITECTURES
@pytest.mark.parametrize(("m", "tile", "bm", "bn", "threads", "shared"), TILES)
def test_linear_is_exact(architecture, m, tile, bm, bn, threads, shared):
    n, k = 40, 208
    rng = np.random.default_rng(m)
    a, weight = (rng.integers(-128, 128, (rows, k)).astype(I8) for rows in (m, n))
    y = unwritten(m, n)
    text = compiled("int8_linear", architecture)
    blocks = -(-m // bm) * -(-n // bn)
    args = linear_arguments(a, weight, y, k, k)
    run_ptx(text, named(text, "int8_linear_kernel", tile), (blocks, 1, 1), (threads, 1, 1), [args], shared)
    assert (y.array == a.astype(I32) @ weight.astype(I32).T).all()


@ARCHITECTURES
@pytest.mark.parametrize(("m", "tile"), [(5, (32, 8, 512, 256)), (40, (64, 32, 64, 128)), (130, (128, 128, 64, 128))])
def test_two_of_four_is_exact(architecture, m, tile):
    if not (CUDA / "two_four_linear.cu").exists():
        pytest.skip("there is no two_four_linear.cu")
    n, k = 40, 192
    bf, bm, bk, threads = tile
    rng = np.random.default_rng(m)
    a = rng.integers(-128, 128, (m, k)).astype(I8)
    kept = np.sort(np.argsort(rng.random((n, k // 4, 4)), axis=2)[:, :, :2], axis=2)
    values = rng.integers(-128, 128, kept.shape).astype(I8)
    dense = np.zeros((n, k // 4, 4), I8)
    np.put_along_axis(dense, kept, values, 2)
    # four bits a group, two groups a byte
    nibbles = (kept[:, :, 0] | kept[:, :, 1] << 2).astype(np.uint8)
    index = np.ascontiguousarray(nibbles[:, ::2] | nibbles[:, 1::2] << 4)
    rows, steps = -(-n // 16), -(-k // 64)
    packed = np.zeros(rows * steps * 640, np.uint8)
    text = compiled("two_four_linear", architecture)
    pack = Struct((values, index, I64(n), I64(k), Buffer(packed, written=False)))
    run_ptx(text, named(text, "two_four_pack_kernel"), (-(-rows * steps * 32 // 128), 1, 1), (128, 1, 1), [pack])
    y = unwritten(m, n)
    stage = bm * bk + bf // 16 * (bk // 64) * 640
    shared = max(4 * stage, (8 if bk == 512 else 1) * bm * bf * 4)
    args = linear_arguments(a, packed, y, k, k)
    name = named(text, "two_four_linear_kernel", f"Li{bf}ELi{bm}ELi{bk}E")
    run_ptx(text, name, (-(-m // bm) * -(-n // bf), 1, 1), (threads, 1, 1), [args], shared)
    assert (y.array == a.astype(I32) @ dense.reshape(n, k).astype(I32).T).all()


@pytest.mark.slow  # nvcc takes a minute for all its forms
@ARCHITECTURES
@pytest.mark.parametrize(("sq", "skv", "causal"), [(70, 130, False), (129, 129, True)])
def test_attention(architecture, sq, skv, causal):
    head, heads, block = 64, 1, 128
    rng = np.random.default_rng(sq)
    q, k, v = (rng.standard_normal((heads, s, head)).astype(F16) for s in (sq, skv, skv))
    sqp, skp = -(-sq // block) * block, -(-skv // 64) * 64
    size = heads * (sqp * head + skp * head + 8 * sqp + 4 * (skp // 64) + 4 * head + 4 * (skp // 64) * head)
    workspace = np.zeros(size, np.uint8)
    out, lse = unwritten(sq, heads, head, dtype=F16), unwritten(heads, sq, dtype=F32)

    def tensor(x: np.ndarray) -> tuple:
        return x, I64(x.size), I64(x.shape[1] * head), I64(head)

    mask = (NULL, np.bool_(False), FLOAT32, I64(0), I64(0), I64(0), I64(0))
    args = Struct((
        *tensor(q), *tensor(k), *tensor(v), FLOAT16, FLOAT16, I64(1), I64(heads), I64(heads), I64(sq), I64(skv),
        I64(head), I64(head), *mask, I64(0), I64(-1), I64(0 if causal else -1), F32(head**-0.5), out, lse, workspace,
    ))  # fmt: skip
    text = compiled("attention", architecture)
    blocks = skp // 64
    for kernel, grid, shared in (
        (("key_sums_kernel",), (blocks, heads, 1), 0),
        (("key_mean_kernel",), (heads, 1, 1), 0),
        (("quantize_queries_and_keys_kernel", "Li64E"), (heads * (sqp // 64) + heads * blocks, 1, 1), 16),
        (("attention_kernel", "Li64ELb0ELb0E"), (heads * sqp // block, 1, 1), 8192 + 2 * 12288 + 512 + 16),
    ):
        run_ptx(text, named(text, *kernel), grid, (128, 1, 1), [args], shared)
    s = q.astype(np.float64) @ k.astype(np.float64).transpose(0, 2, 1) * head**-0.5
    if causal:
        s = np.where(np.arange(skv) <= np.arange(sq)[:, None], s, -math.inf)
    p = np.exp(s - s.max(2, keepdims=True))
    expected = (p / p.sum(2, keepdims=True)) @ v.astype(np.float64)
    error = np.abs(out.array.transpose(1, 0, 2) - expected).sum() / np.abs(expected).sum()
    # the bar of the project for 8-bit scores
    assert error <= 0.021
    assert np.abs(lse.array - np.log(p.sum(2)) - s.max(2)).max() <= 0.06
