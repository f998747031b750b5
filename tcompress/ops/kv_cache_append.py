"""Quantizes new tokens into an int8 key-value cache."""

from __future__ import annotations

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops import attention_numbers as numbers
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.quantize_per_token import check_float
from tcompress.packing import kv_cache as layout

BITS = 8


def kv_cache_append(
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    k_mean: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: int,
) -> None:
    """Appends tokens to a cache in place, as 8-bit integers with one scale a token and head.

    ::

        k_mean  = mean over the tokens of k, if length is 0; else left as it is
        K, V    = quantize_per_token(k - k_mean), quantize_per_token(v)

    Any vector may be taken from all keys: the softmax stays the same. The mean of the first tokens keeps the later ones
    small too where a channel has a bias. `tcompress.KVCache` calls this and holds the tensors.

    Args:
        k_data: [B, Hkv, blocks, 64·D] int8, contiguous; D rounded up to fours (packing/kv_cache.py).
        k_scale: [B, Hkv, blocks, 64] float32.
        v_data: [B, Hkv, blocks, 64·Dv] int8, contiguous; Dv rounded up to 16s.
        v_scale: like k_scale.
        k_mean: [B, Hkv, D] float32.
        k: [B, Hkv, S, D], float32, bfloat16 or float16.
        v: [B, Hkv, S, Dv], like k.
        length: tokens that the cache holds already.

    Returns:
        Nothing; the first five tensors are changed.

    Raises:
        TypeError: a wrong dtype. ValueError: shapes that do not fit, or more tokens than there is room for.
    """
    op = "kv_cache_append"
    for name, x in (("k", k), ("v", v)):
        check_float(x, op, name)
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or k.dtype != v.dtype:
        got = f"{list(k.shape)} {k.dtype}, {list(v.shape)} {v.dtype}"
        raise ValueError(message(op, "k, v", got, "[B, Hkv, S, D], [B, Hkv, S, Dv] of one type"))
    check_cache(op, k_data, k_scale, v_data, v_scale, k_mean, k.shape[3], v.shape[3])
    if k.shape[:2] != k_data.shape[:2]:
        expected = f"{list(k_data.shape[:2])}, batch and heads of the cache"
        raise ValueError(message(op, "k", list(k.shape[:2]), expected))
    room = k_data.shape[2] * layout.BLOCK
    if length < 0 or length + k.shape[2] > room:
        raise ValueError(message(op, "length", f"{length} and {k.shape[2]} new tokens", f"at most {room} tokens"))
    backend.call_in_place(op, k_data, k_scale, v_data, v_scale, k_mean, k.detach(), v.detach(), length)


def check_cache(
    op: str,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    k_mean: torch.Tensor,
    d: int,
    dv: int,
) -> None:
    """Raises unless the tensors are those of a cache with head dimensions d and dv."""
    leading = tuple(k_data.shape[:3])
    expected = {
        "k_data": (k_data, torch.int8, (*leading, layout.key_bytes(d))),
        "k_scale": (k_scale, torch.float32, (*leading, layout.BLOCK)),
        "v_data": (v_data, torch.int8, (*leading, layout.value_bytes(dv))),
        "v_scale": (v_scale, torch.float32, (*leading, layout.BLOCK)),
        "k_mean": (k_mean, torch.float32, (*leading[:2], d)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype:
            raise TypeError(message(op, name, tensor.dtype, dtype))
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(message(op, name, list(tensor.shape), f"{list(shape)}, contiguous"))


def reference(
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    k_mean: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: int,
) -> None:
    if k.shape[2] == 0:
        return
    k, v = k.float(), v.float()
    if length == 0:
        k_mean.copy_(numbers.key_mean(k))
    k_int, k_steps = numbers.quantize_tokens(k - k_mean[:, :, None], BITS)
    v_int, v_steps = numbers.quantize_tokens(v, BITS)
    first, end = length // layout.BLOCK, length + k.shape[2]
    blocks = slice(first, -(-end // layout.BLOCK))
    begin = first * layout.BLOCK  # the first block may hold tokens already: it is written again as a whole
    for data, scale, new, steps, unpack, pack in (
        (k_data, k_scale, k_int, k_steps, layout.unpack_keys, layout.pack_keys),
        (v_data, v_scale, v_int, v_steps, layout.unpack_values, layout.pack_values),
    ):
        old = unpack(data[:, :, first : first + 1], length - begin, new.shape[-1])
        data[:, :, blocks] = pack(torch.cat([old, new.to(torch.int8)], 2))
        scale.flatten(2)[..., length:end] = steps


def fake(
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    k_mean: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: int,
) -> None:
    return None


def flops(
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    k_mean: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *args: object,
) -> int:
    return 5 * (k.numel() + v.numel())


def nbytes(
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    k_mean: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *args: object,
) -> int:
    return (k.numel() + v.numel()) * (k.element_size() + 1)


define(
    Op(
        name="kv_cache_append",
        schema=(
            "(Tensor(a!) k_data, Tensor(b!) k_scale, Tensor(c!) v_data, Tensor(d!) v_scale, Tensor(e!) k_mean,"
            " Tensor k, Tensor v, int length) -> ()"
        ),
        reference=reference,
        fake=fake,
        tolerance=0.0,
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("kv_cache_append", "cpu", unsupported=cpu_unsupported)
