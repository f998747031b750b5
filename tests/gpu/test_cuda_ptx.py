"""The PTX that nvcc makes of csrc/cuda, in the emulator of tests/gpu/ptx: the shim never sees compiled code."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import nvcc_figures
import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import setup_cuda  # noqa: E402

NVCC = setup_cuda.find_nvcc()
if NVCC is None:
    pytest.skip("nvcc is not installed", allow_module_level=True)
ptx = pytest.importorskip("ptx", reason="there is no PTX emulator in tests/gpu/ptx")

from tcompress.ops import attention_numbers  # noqa: E402
from tcompress.packing.int4 import pack_int4  # noqa: E402
from tcompress.packing.sparse_n_m import pack_n_m  # noqa: E402

NULL = np.uint64(0)
FLOAT32, BFLOAT16, FLOAT16, INT32 = (np.int32(i) for i in range(4))


@cache
def compiled(source: str) -> str:
    return nvcc_figures.build(NVCC, source, 80, setup_cuda.NVCC_FLAGS).ptx.read_text()


def kernel(source: str, part: str) -> str:
    """The mangled name that holds `part`."""
    (name,) = {n for n in re.findall(r"\.entry (\w+)\(", compiled(source)) if part in n}
    return name


def run(source: str, part: str, blocks: int, threads: int, args: list, shared: int = 0, **options) -> None:
    ptx.run_ptx(compiled(source), kernel(source, part), (blocks, 1, 1), (threads, 1, 1), args, shared, **options)


def integers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, shape, dtype=np.int8)


def linear_args(a: np.ndarray, weight: object, y: np.ndarray, k: int, ldw: int) -> object:
    """`Int8LinearArgs` for exact sums."""
    (m, lda), n = a.shape, y.shape[1]
    sizes = [np.int64(i) for i in (m, n, k, lda, ldw)]
    ones = np.ones(max(m, n), np.float32)
    return ptx.Struct(
        (a, weight, ones, ones, NULL, NULL, NULL, NULL, ptx.Buffer(y, written=False), *sizes, INT32, np.int32(0),
         np.int32(4))
    )  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("tile", "m", "n", "k", "threads", "blocks", "shared"),
    [
        ("Int8GemmTileILi128E", 130, 129, 150, 128, 4, 65536),
        ("Int8GemmTileILi64E", 65, 40, 208, 128, 2, 65536),
        ("Int8GemmTileILi16E", 3, 33, 600, 256, 2, 49152),
    ],
)
def test_int8_linear(tile, m, n, k, threads, blocks, shared, reverse):
    ld = -(-k // 16) * 16
    a, weight = (np.pad(integers(rows, k, seed=rows), ((0, 0), (0, ld - k))) for rows in (m, n))
    y = np.zeros((m, n), np.int32)
    run("int8_linear", tile, blocks, threads, [linear_args(a, weight, y, k, ld)], shared, reverse=reverse)
    assert (y == a[:, :k].astype(np.int32) @ weight[:, :k].astype(np.int32).T).all()


@pytest.mark.slow
def test_two_four_linear():
    m, n, k = 11, 70, 200
    dense = integers(n, k // 4, 4)
    dense[np.argsort(np.random.default_rng(1).random(dense.shape), -1) < 2] = 0
    dense = dense.reshape(n, k)
    stored = pack_n_m(torch.from_numpy(dense), (2, 4), 8)
    rows, steps = -(-n // 16), -(-k // 64)
    packed = np.zeros(rows * steps * 640, np.uint8)
    pack = ptx.Struct(
        (stored.values.numpy().view(np.int8), stored.index.numpy(), np.int64(n), np.int64(k),
         ptx.Buffer(packed, written=False))
    )  # fmt: skip
    run("two_four_linear", "two_four_pack", -(-rows * steps * 32 // 128), 128, [pack])
    a, y = np.pad(integers(m, k, seed=2), ((0, 0), (0, 8))), np.zeros((m, n), np.int32)
    run("two_four_linear", "TwoFourTileILi64E", 2, 128, [linear_args(a, packed, y, k, 0)], 32 * 64 * 4 + 18432)
    assert (y == a[:, :k].astype(np.int32) @ dense.astype(np.int32).T).all()


@pytest.mark.slow
@pytest.mark.parametrize("bfloat16", [False, True])
def test_int4_linear(bfloat16):
    m, n, k, group = 5, 40, 200, 64
    generator = np.random.default_rng(0)
    q = generator.integers(0, 16, (n, k), dtype=np.uint8)
    scale = generator.random((n, 4), dtype=np.float32)
    zero = generator.integers(0, 16, (n, 4), dtype=np.uint8)
    columns, steps = 64, 7
    packed = np.zeros(columns // 32 * steps * 512 + 4 * columns * 5, np.uint8)
    sizes = [np.int64(i) for i in (n, k, group)]
    weight = pack_int4(torch.from_numpy(q)).numpy()
    pack = ptx.Struct((weight, scale, FLOAT32, zero, *sizes, ptx.Buffer(packed, written=False)))
    run("int4_linear", "int4_pack", -(-(columns * steps * 4 + 4 * columns) // 128), 128, [pack])
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16 if bfloat16 else torch.float16)
    y = np.zeros((m, n), np.float32)
    sizes = [np.int64(i) for i in (m, n, k, k, group)]
    args = ptx.Struct(
        (x.view(torch.int16).numpy(), BFLOAT16 if bfloat16 else FLOAT16, packed, NULL, NULL,
         ptx.Buffer(y, written=False), *sizes, FLOAT32, np.int32(0))
    )  # fmt: skip
    run("int4_linear", f"Int4TileILi16ELi256ELi1ELi8ELi4EEELb{int(bfloat16)}", 2, 256, [args], 49152)
    spread = [np.repeat(t.astype(np.float64), group, 1)[:, :k] for t in (zero, scale)]
    w = (q - spread[0]) * spread[1]
    assert (np.abs(y - x.double().numpy() @ w.T) <= 2e-6 * (np.abs(x.double().numpy()) @ np.abs(w).T)).all()


@pytest.mark.slow
@pytest.mark.parametrize(("d", "causal", "dtype"), [(64, True, torch.float16), (128, False, torch.bfloat16)])
def test_attention(d, causal, dtype):
    """The four launches, one after the other, on one workspace."""
    sq, skv, h, kv_heads = 70, 130, 2, 1
    generator = torch.Generator().manual_seed(d)
    shapes = ((h, sq), (kv_heads, skv), (kv_heads, skv))
    q, k, v = (torch.randn(1, n, s, d, generator=generator).to(dtype) for n, s in shapes)
    sqp, skp = 128, 192
    parts = [h * sqp * d, kv_heads * skp * d, h * sqp * 4, h * sqp * 4, kv_heads * skp // 64 * 4, kv_heads * d * 4]
    workspace = np.zeros(sum(parts) + kv_heads * skp // 64 * d * 4, np.uint8)
    out, lse = np.zeros((1, sq, h, d), np.int16), np.zeros((1, h, sq), np.float32)

    def args(written: bool) -> list:
        heads = []
        for t in (q, k, v):
            heads += [t.view(torch.int16).numpy(), *(np.int64(s) for s in t.stride()[:3])]
        kind = FLOAT16 if dtype == torch.float16 else BFLOAT16
        sizes = [np.int64(i) for i in (1, h, kv_heads, sq, skv, d, d)]
        mask = [NULL, np.uint8(0), FLOAT32, *[np.int64(0)] * 4]
        window = [np.int64(skv - sq), np.int64(-1), np.int64(0 if causal else -1)]
        window += [np.float32(d**-0.5), np.float32(0)]
        buffers = [ptx.Buffer(out, written=False), ptx.Buffer(lse, written=False), ptx.Buffer(workspace, written)]
        return [ptx.Struct((*heads, kind, kind, *sizes, *mask, *window, *buffers))]

    run("attention", "key_sums", 3 * kv_heads, 128, args(False))
    run("attention", "key_mean", kv_heads, 128, args(True))
    run("attention", f"quantize_queries_and_keys_kernelILi{d}E", h * sqp // 64 + kv_heads * 3, 128, args(True), 16)
    shared = 128 * d + 2 * 3 * 64 * d + 2 * 128 * 4 + 16
    run("attention", f"attention_kernelILi{d}ELb{int(dtype == torch.bfloat16)}ELb0E", h, 128, args(True), shared)

    mean = attention_numbers.key_mean(k.float())
    at = sum(parts[:5])
    assert np.array_equal(workspace[at : at + d * 4].view(np.float32), mean.flatten().numpy())
    s = q.double() @ k.double().mT * d**-0.5
    if causal:
        s = s.masked_fill(torch.arange(skv) > torch.arange(sq)[:, None] + skv - sq, -torch.inf)
    expected = torch.softmax(s, -1) @ v.double()
    got = torch.from_numpy(out).view(dtype).transpose(1, 2).double()
    assert (got - expected).abs().sum() / expected.abs().sum() <= 0.021
    assert (torch.from_numpy(lse) - torch.logsumexp(s, -1)).abs().max() < 0.06
