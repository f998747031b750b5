"""The launch functions of `kernels/triton` on tensors without data: for whoever looks at what they would launch.

`every()` covers each kernel, each tile of each table and what a compiler may stumble over: tails, types, masks, zero
points. `one_of_each()` starts each kernel once. tests/gpu/test_triton_compiles.py fails where a kernel or a tile is
missing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tcompress.kernels.triton.attention import attention
from tcompress.kernels.triton.attention_varlen import attention_varlen
from tcompress.kernels.triton.block_panels import BlockRows
from tcompress.kernels.triton.block_sparse_linear import block_sparse_linear
from tcompress.kernels.triton.decode import kv_cache_attention
from tcompress.kernels.triton.int4_linear import int4_linear
from tcompress.kernels.triton.int4_sparse_linear import int4_sparse_linear
from tcompress.kernels.triton.linear import linear
from tcompress.kernels.triton.linear_quantized import multiply
from tcompress.kernels.triton.quantize_norm import quantize_norm
from tcompress.kernels.triton.quantize_rotary import quantize_rotary
from tcompress.kernels.triton.quantize_tokens import quantize_tokens
from tcompress.kernels.triton.two_four_linear import two_four_linear

from tcompress.packing import kv_cache as layout

F16, BF16, F32, I8, U8 = torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8
PACKAGE = "tcompress.kernels.triton."


@contextmanager
def on_architecture(capability: int) -> Iterator[None]:
    """Within, launch functions take the tiles of that GPU."""
    modules = [m for name, m in sys.modules.items() if name.startswith(PACKAGE) and hasattr(m, "capability")]
    before = [m.capability for m in modules]
    try:
        for module in modules:
            module.capability = lambda x: capability  # type: ignore[attr-defined]
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.capability = function  # type: ignore[attr-defined]


def empty(*shape: int, dtype: torch.dtype = F16) -> torch.Tensor:
    """Without data: nothing is run."""
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(
    head: int, sq: int, dtype: torch.dtype = F16, mask: torch.dtype | None = None, heads: int = 4, **options: int
) -> None:
    q, k, v = (empty(1, h, sq, head, dtype=dtype) for h in (heads, 2, 2))
    masks = None if mask is None else empty(1, 1, sq, sq, dtype=mask).expand(1, heads, sq, sq)
    attention(q, k, v, masks, **options)


def varlen(
    head: int, tokens: int = 4096, sequences: int = 1, dtype: torch.dtype = F16, heads: int = 4, **options: float
) -> None:
    q, k, v = (empty(tokens * sequences, h, head, dtype=dtype) for h in (heads, 2, 2))
    offsets = empty(sequences + 1, dtype=torch.int64)
    attention_varlen(q, k, v, offsets, offsets, **options)


def decode(
    d: int = 128, heads: int = 32, kv_heads: int = 8, sq: int = 1, length: int = 4096, batch: int = 1,
    dtype: torch.dtype = BF16, mask: torch.dtype | None = None, softcap: float = 0.0, lse: bool = False,
) -> None:  # fmt: skip
    blocks = (batch, kv_heads, -(-length // layout.BLOCK))
    k_data, v_data = empty(*blocks, layout.key_bytes(d), dtype=I8), empty(*blocks, layout.value_bytes(d), dtype=I8)
    scale = empty(*blocks, layout.BLOCK, dtype=F32)
    masks = None if mask is None else empty(batch, heads, sq, length, dtype=mask)
    kv_cache_attention(
        empty(batch, heads, sq, d, dtype=dtype), k_data, scale, v_data, scale, empty(batch, kv_heads, d, dtype=F32),
        masks, length, d, True, -1, 0, softcap, d**-0.5, lse,
    )  # fmt: skip


def int8(
    m: int, n: int = 4096, k: int = 4096, dtype: torch.dtype = F16, activation: str = "none", symmetric: bool = True
) -> None:
    """With an activation: a float32 bias and a residual too."""
    full = activation != "none"
    linear(
        empty(m, k, dtype=dtype), empty(n, k, dtype=I8), empty(n, dtype=F32), empty(n, dtype=F32) if full else None,
        None, 8 if symmetric else 7, symmetric, activation, None, empty(m, n, dtype=dtype) if full else None,
    )  # fmt: skip


def int8_quantized(m: int, n: int = 4096, k: int = 4096, activation: str = "none") -> None:
    multiply(empty(m, k, dtype=I8), empty(m, dtype=F32), empty(n, k, dtype=I8), empty(n, dtype=F32), None,
             activation, BF16)  # fmt: skip


def int4(
    m: int,
    bits: int | None,
    n: int = 4096,
    k: int = 4096,
    group: int = 128,
    dtype: torch.dtype = BF16,
    activation: str = "none",
    zeros: bool = True,
    out_dtype: torch.dtype | None = None,
) -> None:
    """bits: of the activations, with a zero point where 7; None: W4A16. With an activation: bias and residual too."""
    groups, full = -(-k // group), activation != "none"
    int4_linear(
        empty(m, k, dtype=dtype), empty(n, (k + 1) // 2, dtype=U8), empty(n, groups),
        empty(n, groups, dtype=U8) if zeros else None, empty(n, dtype=F32) if full else None, group, bits, bits != 7,
        activation, out_dtype, empty(m, n, dtype=dtype) if full else None,
    )  # fmt: skip


def two_four(
    m: int, values: torch.dtype = I8, n: int = 4096, k: int = 4096, dtype: torch.dtype = BF16, activation: str = "none"
) -> None:
    groups, whole = -(-k // 4), values == I8
    two_four_linear(
        empty(m, k, dtype=dtype), empty(n * groups * 2, dtype=values), empty((n * groups + 1) // 2, dtype=U8), n,
        empty(n, dtype=F32) if whole else None, empty(n, dtype=torch.int32) if whole else None,
        empty(n, dtype=F32) if activation != "none" else None, 8, True, activation,
    )  # fmt: skip


def _kept(n: int, k: int, size: tuple[int, int], groups: int = 1) -> tuple[int, BlockRows]:
    """Half of the blocks."""
    rows, columns = -(-n // size[0]), -(-k // size[1])
    blocks = rows * columns // 2
    return blocks, BlockRows(empty(rows * groups + 1, dtype=torch.int32), empty(blocks, dtype=torch.int32))


def block_sparse(
    m: int, size: tuple[int, int], values: torch.dtype = I8, n: int = 4096, k: int = 4096, dtype: torch.dtype = BF16,
    activation: str = "none",
) -> None:  # fmt: skip
    blocks, kept = _kept(n, k, size)
    full = activation != "none"
    block_sparse_linear(
        empty(m, k, dtype=dtype), empty(blocks * size[0] * size[1], dtype=values), kept, n, size,
        empty(n, dtype=F32) if values == I8 else None, None, empty(n, dtype=F32) if full else None, 8, True,
        activation, None, empty(m, n, dtype=dtype) if full else None,
    )  # fmt: skip


def int4_sparse(m: int, size: tuple[int, int] = (8, 4), n: int = 4096, k: int = 4096, symmetric: bool = True) -> None:
    groups = -(-k // 128)
    blocks, kept = _kept(n, k, size, groups)
    values = empty(blocks * size[0] * size[1] // 2, dtype=U8)
    int4_sparse_linear(
        empty(m, k, dtype=BF16), values, kept, empty(n, groups), size, None, 8 if symmetric else 7, symmetric
    )


def norm(k: int, centre: bool = False, residual: bool = True, dtype: torch.dtype = BF16) -> None:
    x, weight = empty(64, k, dtype=dtype), empty(k, dtype=dtype)
    quantize_norm(x, weight, weight if centre else None, centre=centre, residual=x if residual else None)


def rotary(d: int = 128, interleaved: bool = False, positions: bool = False) -> None:
    angles = empty(4096, d // 2, dtype=F32)
    quantize_rotary(
        empty(1, 4, 300, d, dtype=BF16), angles, angles, empty(1, 300, dtype=torch.int64) if positions else None, 0,
        interleaved,
    )  # fmt: skip


def few() -> None:
    """For a short test."""
    attend(128, 4096, causal=True)
    int8(16, 100, 71, BF16, "gelu", symmetric=False)
    int8(8192)
    int4(16, None)


def one_of_each() -> None:
    """Each kernel once."""
    few()
    for m, bits in ((16, 8), (64, None), (256, None)):
        int4(m, bits, activation="silu")
    decode()
    varlen(64, right=0)
    attend(64, 4096, value_bits=8)
    attend(128, 4096, bits=12)
    two_four(64)
    block_sparse(64, (16, 16))
    block_sparse(64, (16, 16), BF16)
    block_sparse(1, (8, 4))
    int4_sparse(64)
    norm(4096)
    rotary()


def every() -> None:
    """Each kernel, tile and kind of argument."""
    for head in (64, 128, 256):
        attend(head, 64)
        attend(head, 4096)
        attend(head, 4096, causal=True, return_lse=True)
    attend(32, 4096)
    attend(64, 300, dtype=BF16, mask=torch.bool, causal=True)
    attend(256, 300, dtype=F32, mask=F32)
    for head in (64, 128, 256):
        attend(head, 4096, value_bits=8)
        varlen(head, right=0)
    attend(128, 300, dtype=BF16, causal=True, value_bits=8)
    for head in (64, 128, 256):
        attend(head, 64, bits=12)
        attend(head, 4096, causal=True, return_lse=True, bits=12)
        attend(head, 300, dtype=BF16, mask=torch.bool, bits=12)
    varlen(64, 60, 5, BF16, left=100, right=0, bits=12)
    varlen(128, right=0, bits=12)
    varlen(64, 60, 5, dtype=F32)
    varlen(128, 60, 5, BF16, left=100, right=0, softcap=20.0)
    for d, sq, length in ((64, 1, 4096), (64, 6, 300), (128, 1, 64), (128, 16, 4096), (256, 6, 300), (64, 16, 300)):
        decode(d, sq=sq, length=length, lse=length < 4096)
    decode(80, mask=torch.bool)
    decode(64, mask=F32, softcap=20.0, dtype=F32)

    for m in (1, 16, 32, 64, 128, 8192):
        int8(m)
    for m in (1, 16, 32, 64):
        int8(m, 11008)
    int8(1, 1024, 8192)
    int8(1, 100, 71, F32, "silu")
    int8(16, 4096, 4096, BF16, "gelu", symmetric=False)
    int8(64, 100, 71, F32, "gelu_tanh", symmetric=False)
    int8(8192, 4096, 4096, BF16, "gelu", symmetric=False)
    int8(8192, 4096, 4100, F32, "relu")
    int8_quantized(16)
    int8_quantized(8192, activation="silu")
    for k in (8, 9001):
        quantize_tokens(empty(5, k), 8, True)
        quantize_tokens(empty(5, k, dtype=BF16), 7, False)
    quantize_tokens(empty(5, 4096, dtype=F32), 4)
    norm(4096)
    norm(300, centre=True, residual=False, dtype=F16)
    norm(9001, residual=False)
    rotary()
    rotary(80, interleaved=True, positions=True)

    for m in (16, 32, 64, 8192):
        int4(m, None, dtype=F16, zeros=False, activation="gelu" if m >= 64 else "none")
        int4(m, 8, k=4160 if m == 32 else 4096, activation="silu" if m == 8192 else "none")
        int4(m, None, dtype=F32, k=1000)
    int4(8192, None, out_dtype=F32)
    int4(16, 7, 100, 71, 32)
    int4(64, 7, 100, 71, 71)
    for m in (16, 32, 64, 8192):
        two_four(m, k=4096 if m != 64 else 4100)
        two_four(m, F32, n=100, k=300, dtype=F32)
    two_four(64, activation="gelu")
    two_four(8192, BF16)
    two_four(8192, k=4100)
    two_four(64, F16, dtype=F16)
    for m, size in ((16, (8, 4)), (32, (16, 16)), (64, (32, 16)), (1024, (16, 8)), (1024, (64, 4))):
        block_sparse(m, size, activation="gelu" if m == 64 else "none")
    for m, size in ((16, (8, 4)), (32, (16, 16))):
        block_sparse(m, size, F32, dtype=F32)
    block_sparse(64, (32, 16), BF16)
    for values in (torch.int8, BF16, F32):
        block_sparse(1, (8, 4), values, dtype=BF16 if values == torch.int8 else values)
    int4_sparse(1)
    int4_sparse(16)
    int4_sparse(64, (16, 16), symmetric=False)
