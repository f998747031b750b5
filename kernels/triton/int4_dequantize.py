"""int4 linear, many tokens in 16-bit floats (W4A16): the weight to floats once, then torch's product.

    weight [N, ceil(K/2)] ─▶ W [n, K] in the type of x, n channels at a time     int4_dequantize
    y [:, n channels]     ◀─ x Wᵀ                                               torch (cuBLAS), sums in float32
    y [M, N]              ◀─ activation(y + bias) + residual                    finish_tiles, where there is any

int4_wide turns the same nibbles into floats again for each tile of tokens; from 64 tokens on it was slower than torch's
product of bfloat16 on an H100 (docs/design/012), at 512 by 4.5 times. Writing W and reading it costs 2 N K bytes each
way, whatever M is: less than a fifth of the product at 2048 tokens by the H100's data sheet. Not measured on a GPU.

Numbers: W is rounded to the type of x, as for torch's own 16-bit layer, and so is y before what follows it.

Constraints: x in float16 or bfloat16, the result in its type. W takes at most `WORKSPACE` bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .int4_blocks import load_group, load_nibbles
from .linear_finish import ACTIVATIONS, finish_floats

#: Bytes of W: more would not stay in the second-level cache of 50 MB anyway, and a head of 128,000 would take 1 GB.
WORKSPACE = 64 * 2**20
BLOCK_N, BLOCK_K = 32, 128
FINISH_M, FINISH_N = 16, 128


@triton.jit
def int4_dequantize(
    WEIGHT, WEIGHT_SCALE, WEIGHT_ZERO, OUT, first, n, k, groups, stride_w,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr, GROUP_SIZE: tl.constexpr,
    HAS_WEIGHT_ZERO: tl.constexpr,
):  # fmt: skip
    """Channels `first` and on, n of them, to OUT [n, K]."""
    row, start = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_K
    channel = (first + tl.minimum(row, n - 1)).to(tl.int64)
    nibbles = load_nibbles(WEIGHT + channel[:, None] * stride_w, start, k, BLOCK_K, WHOLE_K)
    scale, zero = load_group(WEIGHT_SCALE, WEIGHT_ZERO, channel * groups + start // GROUP_SIZE, HAS_WEIGHT_ZERO)
    w = (nibbles - zero[:, None]).to(tl.float32) * scale[:, None]
    at = start + tl.arange(0, BLOCK_K)
    out_at = OUT + row.to(tl.int64)[:, None] * k + at[None, :]
    tl.store(out_at, w.to(OUT.dtype.element_ty), mask=(row < n)[:, None] & (at < k)[None, :])


@triton.jit(do_not_specialize=["m"])
def finish_tiles(
    BIAS, RESIDUAL, OUT, m, n, stride_residual,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """OUT [M, N], in place."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    y = tl.load(OUT + rows.to(tl.int64)[:, None] * n + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    finish_floats(y, rows, columns, m, n, BIAS, RESIDUAL, OUT, stride_residual, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)


def dequantized_product(
    rows: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    activation: str,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Fills `out` [M, N], contiguous, of the type of `rows` [M, K].

    Args:
        weight: [N, ceil(K/2)], last stride 1. weight_scale, zero_point: [N, groups], contiguous.
        group_size: a power of two from 32 on; K or more where there is one group.
        residual: [M, N], last stride 1, or None.
    """
    (m, k), (n, groups) = rows.shape, weight_scale.shape
    block_k = min(BLOCK_K, group_size)
    count = max(1, min(n, WORKSPACE // (k * rows.element_size())))
    part = triton.cdiv(n, triton.cdiv(n, count))
    held = torch.empty((part, k), dtype=rows.dtype, device=rows.device)
    for first in range(0, n, part):
        channels = min(part, n - first)
        int4_dequantize[(triton.cdiv(channels, BLOCK_N), triton.cdiv(k, block_k))](
            weight, weight_scale, weight if zero_point is None else zero_point, held, first, channels, k, groups,
            weight.stride(0), BLOCK_N=BLOCK_N, BLOCK_K=block_k, WHOLE_K=k % block_k == 0, GROUP_SIZE=group_size,
            HAS_WEIGHT_ZERO=zero_point is not None, num_warps=4, num_stages=1,
        )  # fmt: skip
        torch.mm(rows, held[:channels].t(), out=out[:, first : first + channels])
    if bias is not None or residual is not None or activation != "none":
        finish_tiles[(triton.cdiv(m, FINISH_M), triton.cdiv(n, FINISH_N))](
            weight_scale if bias is None else bias.contiguous(), weight_scale if residual is None else residual, out,
            m, n, 0 if residual is None else residual.stride(0), BLOCK_M=FINISH_M, BLOCK_N=FINISH_N,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=ACTIVATIONS.index(activation),
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return out
