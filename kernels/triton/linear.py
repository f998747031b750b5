"""int8 linear: per-token activations times per-channel weights, its epilogue fused; which kernel runs, and the launch.

    tokens        launches
    1             1   linear_narrow quantizes x itself
    <= 32         2   quantize_tokens, linear_narrow
    more          2   quantize_tokens, linear_wide

With K split over programs one more, which clears the partial sums.

Constraints (`bindings`): the storage layout is there (`weight`). Any number of tokens.
"""

from __future__ import annotations

import torch
import triton

from . import autotune
from .linear_finish import ACTIVATIONS
from .linear_narrow import linear_narrow
from .linear_tiles import NARROW_TOKENS, int8_linear_tile
from .linear_wide import linear_wide
from .numbers import capability, steps
from .quantize_tokens import aligned_rows, quantize_tokens
from .tiles import TileConfig


def _candidates(stored: TileConfig) -> list[TileConfig]:
    tiles = autotune.neighbours(stored, block_n=(16, 32, 64, 128), warps=(4, 8), stages=(3, 4, 6, 8))
    return tiles + (autotune.neighbours(stored, split=(1, 2, 4, 8, 16)) if stored.block_m <= NARROW_TOKENS else [])


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
    act_bits: int = 8,
    act_symmetric: bool = True,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
    tile: TileConfig | None = None,
    fuse_quantizer: bool | None = None,
) -> torch.Tensor:
    """`tcompress.ops.int8_linear` for a weight in the storage layout; checked arguments.

    Args:
        x: [..., K], weight [N, K] int8 (last stride 1), weight_scale [N], bias [N], residual [..., N]: as the op has
        them.
        weight_sum: [N] int32, `weight.sum(1)`; computed here if needed and not given (asymmetric activations).
        tile, fuse_quantizer: other than `autotune` chooses, which starts from `linear_tiles`; `block_m` up to 32 and at
            least M means linear_narrow. Fusing needs one token, and that.

    Returns:
        [..., N]; `out_dtype=torch.int32` gives the exact sums.
    """
    k, n = x.shape[-1], weight.shape[0]
    rows = x.reshape(-1, k) if k else x.new_zeros((x.shape[:-1].numel(), 1))
    if not k:
        weight = weight.new_zeros((n, 1))
    m, k = rows.shape
    dtype = out_dtype or x.dtype
    out = torch.empty((*x.shape[:-1], n), dtype=dtype, device=x.device)
    if m == 0 or n == 0:
        return out
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    if not act_symmetric and weight_sum is None:
        weight_sum = weight.sum(1, dtype=torch.int32)
    if residual is not None:
        residual = residual.reshape(m, n)
        residual = residual if residual.stride(1) == 1 else residual.contiguous()
    if tile is None:
        sizes = f"{autotune.tokens(m)}x{k}x{n} {x.dtype} {act_bits} {act_symmetric} {activation} {fuse_quantizer}"
        arguments = (x, weight, weight_scale, bias, weight_sum, act_bits, act_symmetric, activation, out_dtype)
        stored = int8_linear_tile(capability(x), m, n, k)
        tile = autotune.choose(
            "int8_linear", sizes, stored, lambda: _candidates(stored),
            lambda tile: linear(*arguments, residual, tile, fuse_quantizer), x,
        )  # fmt: skip
    narrow = m <= tile.block_m <= NARROW_TOKENS
    if narrow and (m == 1 if fuse_quantizer is None else fuse_quantizer):
        a, scale, zero = rows, weight_scale, weight_scale  # the last two are not read
        quantize = True
    else:
        a, scale, zero = quantize_tokens(rows, act_bits, act_symmetric)
        quantize = False
    if not narrow:
        # the integers of x have as many columns, so K may end there
        weight = aligned_rows(weight)
        k = weight.shape[1]
    nowhere = weight_scale
    pointers = (
        a, scale, zero, weight, weight_scale,
        nowhere if weight_sum is None else weight_sum, nowhere if bias is None else bias.contiguous(),
        nowhere if residual is None else residual, out,
    )  # fmt: skip
    flags = {
        "HAS_ZERO": not act_symmetric, "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None,
        "ACTIVATION": ACTIVATIONS.index(activation), "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    stride_residual = 0 if residual is None else residual.stride(0)
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    if not narrow:
        linear_wide[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)](
            *pointers, m, n, k, a.stride(0), weight.stride(0), stride_residual,
            **blocks, GROUP=tile.group, WHOLE_K=k % tile.block_k == 0, **flags,
            **({} if tile.registers is None else {"maxnreg": tile.registers}),
        )  # fmt: skip
        return out
    tiles = triton.cdiv(n, tile.block_n)
    part = triton.cdiv(triton.cdiv(k, tile.split), tile.block_k) * tile.block_k
    partial, done = pointers[-1], pointers[-1]
    if tile.split > 1:
        cells = tiles * tile.block_m * tile.block_n
        workspace = torch.zeros(cells + tiles, dtype=torch.int32, device=x.device)
        partial, done = workspace, workspace[cells:]
    q_max, step, lowest = steps(act_bits, act_symmetric)
    linear_narrow[(tiles * tile.split,)](
        *pointers, partial, done, m, n, k, part, a.stride(0), a.stride(1), weight.stride(0), stride_residual,
        **blocks, SPLIT=tile.split, WHOLE_K=k % tile.block_k == 0,
        QUANTIZE=quantize, Q_MAX=q_max, STEP=step, LOWEST=lowest, **flags, enable_fp_fusion=not quantize,
    )  # fmt: skip
    return out
