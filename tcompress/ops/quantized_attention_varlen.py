"""Fused attention on integers over sequences of different lengths, laid end to end."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.attention_options import Bits, Causal, Window, check_heads, checked_options
from tcompress.ops.quantized_attention import reference as dense_reference


def quantized_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    bits: Bits = "auto",
    is_causal: Causal = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`quantized_attention` of each of N sequences by itself, without padding.

    Sequence n has the queries `cu_seqlens_q[n]` to `cu_seqlens_q[n + 1] - 1` and the keys and values likewise; the
    numbers are those of a call with that sequence alone, bit for bit. (On a GPU: if both run with the same tile, and
    all keys together are at most 8192, beyond which means of keys may be summed in another order.)

    Args:
        q: [Tq, H, D], float32, bfloat16 or float16; the tokens of all sequences.
        k: [Tk, Hkv, D]; v: [Tk, Hkv, Dv].
        cu_seqlens_q, cu_seqlens_k: [N + 1] int32 or int64 on the CPU or on q's device: 0, then the sums of the lengths.
            What they hold on a GPU is not checked, which would wait for it. There the Triton kernel holds them to
            0 … tokens, and queries behind the last offset, in a buffer that is not full, give zeros.
        bits, is_causal, scale, enable_gqa, window, softcap: as in `quantized_attention`; "auto" is 8 on a GPU.
        return_lse: also return the logarithms of the denominators, [H, Tq] float32.

    Returns:
        [Tq, H, Dv] in the type of q, contiguous; with return_lse also [H, Tq] float32.

    Raises:
        TypeError: a wrong dtype. ValueError: shapes or offsets that do not fit, an unknown option.
    """
    op = "quantized_attention_varlen"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor) or x.dim() != 3:
            shape = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(message(op, name, shape, "[tokens, heads, D]"))
    check_heads(op, q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], enable_gqa)
    for argument, offsets, tokens in (("cu_seqlens_q", cu_seqlens_q, len(q)), ("cu_seqlens_k", cu_seqlens_k, len(k))):
        _check_offsets(op, argument, offsets, tokens)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        got = f"{list(cu_seqlens_q.shape)}, {list(cu_seqlens_k.shape)}"
        raise ValueError(message(op, "cu_seqlens_q, cu_seqlens_k", got, "as many sequences in both"))
    if bits == "auto" and q.is_cuda:
        bits = 8  # 12 take twice the matrix instructions of torch's own attention for Q Kᵀ
    options = checked_options(op, bits, is_causal, window, softcap, scale, q.shape[-1])
    out, lse = backend.call(op, q, k, v, cu_seqlens_q.long(), cu_seqlens_k.long(), *options, return_lse)
    return (out, lse) if return_lse else out


def int8_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    is_causal: Causal = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`quantized_attention_varlen` with `bits=8`, whatever the processor."""
    return quantized_attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        bits=8,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        window=window,
        softcap=softcap,
        return_lse=return_lse,
    )


def _check_offsets(op: str, name: str, offsets: torch.Tensor, tokens: int) -> None:
    if not isinstance(offsets, torch.Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        got = offsets.dtype if isinstance(offsets, torch.Tensor) else type(offsets).__name__
        raise TypeError(message(op, name, got, "an int32 or int64 tensor"))
    if offsets.dim() != 1 or len(offsets) == 0:
        raise ValueError(message(op, name, list(offsets.shape), "[sequences + 1]"))
    if offsets.is_cuda or torch.compiler.is_compiling():
        return  # the values are not known; the CPU kernel checks them again
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != tokens or any(a > b for a, b in pairwise(values)):
        expected = f"offsets that rise from 0 to {tokens}, the number of tokens"
        raise ValueError(message(op, name, values if len(values) < 9 else [*values[:4], "…", values[-1]], expected))


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    bits: int,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_zeros((q.shape[0], q.shape[1], v.shape[2]))
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, device=q.device)
    starts, key_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for n in range(len(starts) - 1):
        rows, tokens = slice(starts[n], starts[n + 1]), slice(key_starts[n], key_starts[n + 1])
        q_one, k_one, v_one = (x.transpose(0, 1)[None] for x in (q[rows], k[tokens], v[tokens]))
        part, part_lse = dense_reference(
            q_one, k_one, v_one, None, bits, bottom_right, left, right, softcap, scale, True
        )
        out[rows] = part[0].transpose(0, 1)
        lse[:, rows] = part_lse[0]
    return out, lse if return_lse else lse.new_empty(0)


def fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    bits: int,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = q.new_empty((q.shape[1], q.shape[0]) if return_lse else (0,), dtype=torch.float32)
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2])), lse


def flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *args: object,
) -> int:
    pairs = int((cu_seqlens_q.diff() * cu_seqlens_k.diff()).sum())
    return 2 * q.shape[1] * pairs * (q.shape[2] + v.shape[2])


def nbytes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: object) -> int:
    return (q.shape[0] * q.shape[1] * (q.shape[2] + v.shape[2]) + k.numel() + v.numel()) * q.element_size()


define(
    Op(
        name="quantized_attention_varlen",
        schema=(
            "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int bits, bool bottom_right,"
            " int left, int right, float softcap, float scale, bool return_lse) -> (Tensor, Tensor)"
        ),
        reference=reference,
        fake=fake,
        # The result is the same bit for bit; the logarithm is the C library's or torch's.
        tolerance=4.0,
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("quantized_attention_varlen", "cpu", unsupported=cpu_unsupported)
