"""Fused attention on integers: softmax(Q Kᵀ) V with Q, K and V quantized on the way in."""

from __future__ import annotations

import math
from typing import Any, Literal, NoReturn

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops import attention_numbers as numbers
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.attention_reference import KeysAndValues, Visible, attend
from tcompress.ops.quantize_per_token import FLOAT_DTYPES, check_float

Bits = Literal["auto", 8, 12]
Causal = bool | Literal["top_left", "bottom_right"]
Window = int | tuple[int, int] | None
MAX_HEAD_DIM = 256
#: What `bits="auto"` means on a path of the CPU; 12 elsewhere. See docs/design/007.
AUTO_BITS = {"avx512vnni": 8, "amx": 8}
#: `bits="auto"` is float32 (`short_attention`) up to so many keys, and pairs of a query with a key for each head of k:
#: below, quantizing takes longer than what it saves. See docs/design/007.
MAX_SHORT_KEYS = 64
MAX_SHORT_PAIRS = 48 * 48


def quantized_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bits: Bits = "auto",
    mask: torch.Tensor | None = None,
    is_causal: Causal = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`softmax(scale · q kᵀ + mask) v`, as `torch.nn.functional.scaled_dot_product_attention`, in integers.

    ::

        k'       = k - mean over tokens(k)        leaves the softmax as it is; one channel's bias costs no bits
        Q, K, V  = integers of `bits` bits, one scale a token and head
        S        = Q Kᵀ                           exact, in int32
        s        = S · scales                     in ticks, 2^-11 of an exponent of 2
        P        = 2^(s - max s)                  per block of 64 keys, integers of 13 bits, in 16-bit arithmetic
        O        = Σ over blocks, rescaled to the common maximum, of (P · scales of V) V      P V exact, in int32

    The result of 8 or 12 bits is the same on every path of the CPU, bit for bit. Relative error against float64 on
    normal inputs: about 0.001 with 12 bits, 0.011 with 8.

    Papers: the blockwise softmax, Milakov & Gimelshein, arXiv 1805.02867, section 3, and Dao et al., arXiv 2205.14135,
    section 3.1; smoothing of K, Zhang et al. (SageAttention), arXiv 2410.02367, section 4.2.

    Args:
        q: [B, H, Sq, D], float32, bfloat16 or float16; any strides. D is at most 256.
        k: [B, Hkv, Skv, D], like q.
        v: [B, Hkv, Skv, Dv], like q; Dv is at most 256.
        bits: 8 or 12, of q, k and v. "auto" takes what this processor runs fastest: 8 where it has a dot product of
            bytes (AVX-512 VNNI, AMX), else 12, which there cost no more; and float32 instead of integers where these
            bring no speed: for at most 64 keys and 2304 pairs of a query with a key (48 × 48) for each head of k,
            without mask, left limit of a window, softcap or return_lse. Its error is then that of `short_attention`,
            below that of 12 bits, and its last places may differ from path to path.
        mask: broadcastable to [B, H, Sq, Skv]. bool: True lets a query see a key. float: added to the scores; -inf
            hides the key.
        is_causal: True or "top_left": query i sees the keys 0 … i, torch's convention. "bottom_right": it sees the keys
            0 … i + Skv - Sq, so that the last query sees all, as a chunk of queries after a cache wants.
        scale: of the scores; 1/√D by default. May be negative.
        enable_gqa: allow H to be a multiple of Hkv; consecutive query heads then share a head of k and v.
        window: query i stands at position i ("bottom_right": i + Skv - Sq). An int w: it sees keys less than w away.
            A tuple (left, right): from position - left to position + right, -1 for no limit.
        softcap: c > 0 replaces a score s by c · tanh(s / c), before the mask.
        return_lse: also return the natural logarithm of each softmax's denominator, Σ exp(score).

    Returns:
        [B, H, Sq, Dv] in the type of q, in memory [B, Sq, H, Dv], so that joining the heads copies nothing; with
        return_lse also [B, H, Sq] float32.

        A query that sees no key gives zeros, and -inf for return_lse. A query that holds NaN or infinity gives NaN, and
        a key or value token that does gives NaN to all queries that see it, and to no other.

    Raises:
        TypeError: a wrong dtype. ValueError: shapes that do not fit, an unknown option, D above 256. Both before
        anything is computed. Inference only: backward raises.
    """
    op = "quantized_attention"
    h, hkv, sq, skv, d = check_heads(op, q, k, v, enable_gqa)
    short = bits == "auto" and mask is None and not return_lse and is_short(h, hkv, sq, skv)
    if short and is_causal is False and window is None and softcap is None and scale is None:
        # Nothing is left to check: as much time as four heads take.
        return backend.call("short_attention", q, k, v, skv, 1 / math.sqrt(d or 1))
    if mask is not None:
        mask = expanded_mask(op, mask, (*q.shape[:3], skv))
    options = checked_options(op, bits, is_causal, window, softcap, scale, d)
    _, bottom_right, left, right, cap, factor = options
    if short and left < 0 and not cap:
        return backend.call("short_attention", q, k, v, keys_of_first(bottom_right, right, sq, skv), factor)
    out, lse = backend.call(op, q, k, v, mask, *options, return_lse)
    return (out, lse) if return_lse else out


def int8_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    is_causal: Causal = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`quantized_attention` with `bits=8`, whatever the processor."""
    return quantized_attention(
        q,
        k,
        v,
        bits=8,
        mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        window=window,
        softcap=softcap,
        return_lse=return_lse,
    )


def auto_bits() -> int:
    """What `bits="auto"` means here, where it means integers."""
    return AUTO_BITS.get(backend.cpu_path() or "reference", 12)


def is_short(h: int, hkv: int, sq: int, skv: int) -> bool:
    """Whether `bits="auto"` means float32 for a problem of this size."""
    return skv <= MAX_SHORT_KEYS and h * sq * skv <= MAX_SHORT_PAIRS * hkv


def keys_of_first(bottom_right: bool, right: int, sq: int, skv: int) -> int:
    """How many keys the first query sees (or less than none), of options without a limit to the left."""
    return skv if right < 0 else 1 + right + (skv - sq if bottom_right else 0)


def checked_options(
    op: str, bits: Bits, is_causal: Causal, window: Window, softcap: float | None, scale: float | None, d: int
) -> tuple[int, bool, int, int, float, float]:
    """(bits, bottom_right, left, right, softcap, scale) as the ops take them: -1 no limit, softcap 0 none.

    Raises:
        ValueError, TypeError: an unknown value.
    """
    if bits != "auto" and bits not in numbers.BITS:
        raise ValueError(message(op, "bits", repr(bits), f"'auto' or one of {numbers.BITS}"))
    if not (is_causal is False or is_causal is True or is_causal in ("top_left", "bottom_right")):
        raise ValueError(message(op, "is_causal", repr(is_causal), "a bool, 'top_left' or 'bottom_right'"))
    left, right = (-1, -1) if window is None else _window(op, window)
    if is_causal:
        right = 0
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(message(op, "softcap", softcap, "a number above 0, or None"))
    scale = 1 / math.sqrt(max(d, 1)) if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(message(op, "scale", scale, "a finite number"))
    chosen = auto_bits() if bits == "auto" else int(bits)
    return chosen, is_causal == "bottom_right", left, right, float(softcap or 0.0), scale


def _window(op: str, window: Window) -> tuple[int, int]:
    if isinstance(window, int) and not isinstance(window, bool):
        if window < 1:
            raise ValueError(message(op, "window", window, "at least 1, or (left, right)"))
        return window - 1, window - 1
    if isinstance(window, tuple | list) and len(window) == 2 and all(isinstance(w, int) and w >= -1 for w in window):
        return window[0], window[1]
    raise ValueError(message(op, "window", repr(window), "an int, (left, right) or None", "-1 means no limit"))


def check_heads(
    op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, enable_gqa: bool
) -> tuple[int, int, int, int, int]:
    """Raises unless q, k and v are float tensors of one type and fitting shapes. Returns H, Hkv, Sq, Skv and D."""
    try:  # what fits is seen in a fraction of a microsecond: a small attention takes a few
        b, h, sq, d = q.shape
        kb, kh, tokens, kd = k.shape
        vb, vh, v_tokens, dv = v.shape
    except (AttributeError, ValueError):
        _refuse_heads(op, q, k, v)
        raise
    dtype = q.dtype
    if (
        b == kb == vb
        and kh == vh
        and tokens == v_tokens
        and d == kd
        and d <= MAX_HEAD_DIM
        and dv <= MAX_HEAD_DIM
        and dtype == k.dtype
        and dtype == v.dtype
        and dtype in FLOAT_DTYPES
        and ((q.is_cpu and k.is_cpu and v.is_cpu) or q.device == k.device == v.device)
    ):
        if h != kh:
            check_groups(op, h, kh, enable_gqa)
        return h, kh, sq, tokens, d
    _refuse_heads(op, q, k, v)


def _refuse_heads(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> NoReturn:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float(x, op, name)
        if x.dim() != 4:
            raise ValueError(message(op, name, list(x.shape), "[B, H, S, D]", "add missing dimensions with x[None]"))
        if x.dtype != q.dtype or x.device != q.device:
            got, expected = f"{x.dtype} on {x.device}", f"{q.dtype} on {q.device} as q"
            raise TypeError(message(op, name, got, expected))
    for name, x in (("q", q), ("v", v)):
        if x.shape[3] > MAX_HEAD_DIM:
            raise ValueError(message(op, name, list(x.shape), f"a last dimension of at most {MAX_HEAD_DIM}"))
    got = f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
    raise ValueError(message(op, "q, k, v", got, "[B, H, Sq, D], [B, Hkv, Skv, D], [B, Hkv, Skv, Dv]"))


def check_groups(op: str, heads: int, kv_heads: int, enable_gqa: bool) -> None:
    """Raises unless the query heads are as many as those of k and v or, with enable_gqa, a multiple."""
    if heads == kv_heads or (enable_gqa and kv_heads and heads % kv_heads == 0):
        return
    expected = f"a multiple of {kv_heads} as in k" if enable_gqa else f"{kv_heads} as in k"
    hint = "" if enable_gqa else "enable_gqa=True lets query heads share those of k and v"
    raise ValueError(message(op, "q", f"{heads} heads", expected, hint))


def expanded_mask(op: str, mask: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """The mask as a view of `shape`.

    Raises:
        TypeError: neither bool nor float. ValueError: it cannot be broadcast.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dtype not in (torch.bool, *FLOAT_DTYPES):
        got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        hint = "integers could mean either; mask.bool() shows keys where they are not 0"
        raise TypeError(message(op, "mask", got, "bool, float32, bfloat16 or float16", hint))
    fits = mask.dim() <= 4 and all(m in (1, s) for m, s in zip(reversed(mask.shape), reversed(shape), strict=False))
    if not fits:
        raise ValueError(message(op, "mask", list(mask.shape), f"broadcastable to [B, H, Sq, Skv] = {list(shape)}"))
    return mask.expand(shape)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bits: int,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    kv = KeysAndValues.quantize(k, v, bits)
    out, lse = attend(q, kv, bits, mask, Visible(bottom_right, left, right), scale, softcap)
    return heads_last(out.to(q.dtype)), lse if return_lse else lse.new_empty(0)


def heads_last(out: torch.Tensor) -> torch.Tensor:
    """The same [B, H, S, D], laid out as [B, S, H, D]."""
    b, h, s, d = out.shape
    return out.new_empty((b, s, h, d)).copy_(out.transpose(1, 2)).transpose(1, 2)


def fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bits: int,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    b, h, sq, _ = q.shape
    lse = q.new_empty((b, h, sq) if return_lse else (0,), dtype=torch.float32)
    return q.new_empty((b, sq, h, v.shape[3])).transpose(1, 2), lse


def flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: object) -> int:
    b, h, sq, d = q.shape
    return 2 * b * h * sq * k.shape[2] * (d + v.shape[3])


def nbytes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: object) -> int:
    b, h, sq, d = q.shape
    return (b * h * sq * (d + v.shape[3]) + k.numel() + v.numel()) * q.element_size()


define(
    Op(
        name="quantized_attention",
        schema=(
            "(Tensor q, Tensor k, Tensor v, Tensor? mask, int bits, bool bottom_right, int left, int right,"
            " float softcap, float scale, bool return_lse) -> (Tensor, Tensor)"
        ),
        reference=reference,
        fake=fake,
        # The result is the same bit for bit; the logarithm is the C library's or torch's.
        tolerance=4.0,
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("quantized_attention", "cpu", unsupported=cpu_unsupported)


def _stand_in(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *others: Any,  # the op's own arguments, where the bits are chosen
    bits: Bits = "auto",
    mask: torch.Tensor | None = None,
    is_causal: Causal = False,
    window: Window = None,
    softcap: float | None = None,
    return_lse: bool = False,
    **options: Any,
) -> str | None:
    if others or bits != "auto" or mask is not None or softcap or return_lse:
        return None
    h, hkv, sq, skv, d = check_heads("explain", q, k, v, True)
    left = checked_options("explain", bits, is_causal, window, softcap, None, d)[2]
    return "short_attention" if left < 0 and is_short(h, hkv, sq, skv) else None


backend.register_stand_in("quantized_attention", _stand_in)
