"""What the attention ops are called with: the options, their checks, and what `bits="auto"` means."""

from __future__ import annotations

import math
from typing import Literal, NoReturn

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops import attention_numbers as numbers
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


def auto_bits() -> int:
    """What `bits="auto"` means on this processor, where it means integers."""
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
