"""What the attention ops should compute, in numpy's float64 (and float32 where their definition names float32 steps);
nothing here calls the library. With it, a bound on each element's error, from the roundings of the definition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

HALF_ULP = 2.0**-24
MIN_RANGE = 2.0**-100
BLOCK = 64
LOWEST = -1e35  # stands for the lowest number of a type in a mask
TICKS_PER_NAT = 2048 / math.log(2)

Array = np.ndarray


def to_numpy(x: torch.Tensor) -> Array:
    return x.detach().float().resolve_neg().contiguous().numpy()


def key_mean(k: Array) -> Array:
    """[..., S, D] float32 -> [..., D]: float32 sums over the tokens of a block, then over the blocks."""
    s = k.shape[-2]
    total = np.zeros((*k.shape[:-2], k.shape[-1]), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, s, BLOCK):
            block = np.zeros_like(total)
            for i in range(start, min(start + BLOCK, s)):
                block = block + k[..., i, :]
            total = total + block
        mean = total * (np.float32(1) / np.float32(s)) if s else total
    return np.where(np.isfinite(mean), mean, np.float32(0))


def quantize_tokens(x: Array, bits: int) -> tuple[Array, Array]:
    """[..., D] float32 -> symmetric integers (int64) and the scale [...] of each row; NaN if the row is not finite."""
    q_max = 2 ** (bits - 1) - 1
    step = np.float32(1) / np.float32(q_max)
    finite = np.isfinite(x).all(-1)
    x = np.where(finite[..., None], x, np.float32(0))
    scale = np.maximum(np.abs(x).max(-1, initial=0) * step, np.float32(MIN_RANGE) * step)
    q = np.clip(np.rint(x * (np.float32(1) / scale)[..., None]), -q_max, q_max).astype(np.int64)
    return q, np.where(finite, scale, np.float32(np.nan))


def allowed(sq: int, skv: int, is_causal: Any, window: Any) -> Array:
    """bool [Sq, Skv]"""
    position = np.arange(sq)[:, None] + (skv - sq if is_causal == "bottom_right" else 0)
    back = position - np.arange(skv)  # how far the key lies behind the query
    seen = np.ones((sq, skv), bool)
    if is_causal:
        seen &= back >= 0
    if isinstance(window, int):
        seen &= np.abs(back) < window
    elif window is not None:
        left, right = (np.inf if w == -1 else w for w in window)
        seen &= (back <= left) & (-back <= right)
    return seen


@dataclass(frozen=True)
class Softmax:
    """The scores of every pair, before the values.

    seen [B, H, Sq, Skv] bool; scores in nats, -inf where not seen; slack: how far float32 steps may move a score.
    """

    seen: Array
    scores: Array
    slack: Array

    @property
    def weights(self) -> Array:
        """exp(score - largest of the row); zeros in an empty row."""
        return np.where(self.seen, np.exp(self.scores - self._top(self.scores)), 0.0)

    @staticmethod
    def _top(scores: Array) -> Array:
        top = scores.max(-1, keepdims=True, initial=-np.inf)
        return np.where(np.isfinite(top), top, 0.0)

    @property
    def lse(self) -> Array:
        with np.errstate(divide="ignore"):
            return np.log(self.weights.sum(-1)) + self._top(self.scores)[..., 0]

    def block_share(self) -> Array:
        """exp(largest of the key's block - largest of the row), for every key."""
        share = np.zeros_like(self.scores)
        for start in range(0, share.shape[-1], BLOCK):
            part = self.scores[..., start : start + BLOCK].max(-1, keepdims=True)
            share[..., start : start + BLOCK] = np.exp(part - self._top(self.scores))
        return share


def scores(
    q: Array,
    k: Array,
    *,
    mask: torch.Tensor | None = None,
    is_causal: Any = False,
    scale: float | None = None,
    window: Any = None,
    softcap: float | None = None,
    shift: Array | float = 0.0,
) -> Softmax:
    """Of float64 q [B, H, Sq, D] and k [B, Hkv, Skv, D]; `shift` is added to the products times scale."""
    (_, h, sq, d), skv = q.shape, k.shape[2]
    k = np.repeat(k, h // k.shape[1], 1) if h else k[:, :0]
    s = (q @ np.swapaxes(k, -1, -2)) * (1 / math.sqrt(d or 1) if scale is None else scale)
    s = s + shift
    slack = np.abs(s) * 8 * HALF_ULP
    if softcap:
        s = softcap * np.tanh(s / softcap)
        slack = slack + 1e-6 * softcap
    seen = np.broadcast_to(allowed(sq, skv, is_causal, window), s.shape)
    if mask is not None:
        m = np.broadcast_to(mask.numpy() if mask.dtype == torch.bool else to_numpy(mask), s.shape)
        if m.dtype == bool:
            seen = seen & m
        else:
            seen = seen & (m != -np.inf)
            m = np.where(m == -np.inf, 0, m).astype(np.float64)
            # Beside the lowest number of a type no score counts: such a key is seen only where a row has no other.
            lowest = m < -1e30
            s = np.where(lowest, LOWEST, s + m)
            slack = np.where(lowest, 0.0, slack + (np.abs(np.where(lowest, 0.0, m)) + np.abs(s)) * 4 * HALF_ULP)
    return Softmax(seen, np.where(seen, s, -np.inf), slack)


def attention(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    """softmax(…) v and the logarithm of the denominators; zeros and -inf in an empty row."""
    softmax = scores(q, k, **options)
    p = softmax.weights
    total = p.sum(-1, keepdims=True)
    v = np.repeat(v, q.shape[1] // v.shape[1], 1) if q.shape[1] else v[:, :0]
    return (p @ v) / np.where(total > 0, total, 1.0), softmax.lse


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` of the tensors as they are."""
    out, lse = attention(*(to_numpy(x).astype(np.float64) for x in (q, k, v)), **options)
    return torch.from_numpy(out), torch.from_numpy(lse)


@dataclass(frozen=True)
class Quantized:
    """Attention of the integers that the definition makes of q, k and v, in float64, and bounds on what its own
    arithmetic may add to it: `out` within `out_bound`, `lse` within `lse_bound`, element by element."""

    out: Array
    lse: Array
    out_bound: Array
    lse_bound: Array


def quantized(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bits: int, **options: Any) -> Quantized:
    """Of finite q, k and v."""
    k_float, q_float = to_numpy(k), to_numpy(q)
    mean = key_mean(k_float)
    return of_integers(
        q_float,
        *quantize_tokens(k_float - mean[..., None, :], bits),
        *quantize_tokens(to_numpy(v), bits),
        mean,
        bits,
        torch.finfo(q.dtype),
        **options,
    )


def of_integers(
    q: Array,
    k_int: Array,
    k_scale: Array,
    v_int: Array,
    v_scale: Array,
    mean: Array,
    bits: int,
    finfo: torch.finfo,
    **options: Any,
) -> Quantized:
    """From integers of k and v. A softcap needs whole scores: to those of k less its mean, q · mean is added again."""
    groups = q.shape[1] // k_int.shape[1] if q.shape[1] else 0
    q_int, q_scale = quantize_tokens(q, bits)
    q_real = q_int * q_scale[..., None].astype(np.float64)
    k_real = k_int * k_scale[..., None].astype(np.float64)
    v_real = v_int * v_scale[..., None].astype(np.float64)
    factor = options.get("scale")
    factor = 1 / math.sqrt(q.shape[-1] or 1) if factor is None else factor
    terms = q.astype(np.float64) * np.repeat(mean, groups, 1)[:, :, None] * factor
    shift = terms.sum(-1)
    softcapped = bool(options.get("softcap"))
    softmax = scores(q_real, k_real, **options, shift=shift[..., None] if softcapped else 0.0)

    weights, share = softmax.weights, softmax.block_share()
    total = weights.sum(-1)
    safe = np.where(total > 0, total, 1.0)
    out = weights @ np.repeat(v_real, groups, 1) / safe[..., None]

    # A score is rounded to a tick (two roundings of half a tick, with its block's maximum), the exponential is within
    # four units of 2^-14, and rounded to a unit of 2^-13 of the block's maximum. NaN and overflow: anything goes.
    with np.errstate(over="ignore", invalid="ignore"):
        relative = np.expm1(2 * softmax.slack + 0.51 / TICKS_PER_NAT) + 4.5 / 16384
        error = np.where(softmax.seen, weights * relative + share * 0.51 / 8192, share * 0.51 / 8192)
        error_total = error.sum(-1)
        # The scale of a value is rounded to a unit of 2^-15 of its block's largest, its product with the weight again
        # to 2^-13.
        largest = np.zeros_like(v_scale, dtype=np.float64)
        for start in range(0, largest.shape[-1], BLOCK):
            part = v_scale[..., start : start + BLOCK]
            largest[..., start : start + BLOCK] = part.max(-1, keepdims=True)
        size = np.repeat(np.abs(v_int) * largest[..., None], groups, 1)
        error_sum = error @ np.repeat(np.abs(v_real), groups, 1)
        error_sum += (weights * 1.6e-5 + share * 0.51 / 8192) @ size
        bound = (error_sum + np.abs(out) * error_total[..., None]) / safe[..., None]
        bound = bound / np.maximum(1 - error_total / safe, 1e-30)[..., None]
        bound += np.abs(out) * (float(finfo.eps) / 2 + 1e-6) + float(finfo.tiny)
        lse_bound = -np.log1p(-np.minimum(error_total / safe, 1 - 1e-12))
        lse = softmax.lse if softcapped else softmax.lse + shift
        lse_bound += np.abs(terms).sum(-1) * (q.shape[-1] + 4) * HALF_ULP + 1e-6 * np.maximum(1, np.abs(softmax.lse))
    return Quantized(out, lse, bound, lse_bound)


def assert_within(got: torch.Tensor, lse: torch.Tensor | None, expected: Quantized, what: object = "") -> None:
    """Every element of a result within its bound."""
    difference = np.abs(got.detach().double().numpy() - expected.out)
    worst = (difference / expected.out_bound).max(initial=0.0)
    assert (difference <= expected.out_bound).all(), f"{what}: out: {worst:.3g} times the bound"
    if lse is None:
        return
    values = lse.double().numpy()
    empty = expected.lse == -np.inf
    assert (values[empty] == -np.inf).all(), f"{what}: lse of rows that see nothing"
    lowest = (expected.lse < LOWEST / 2) & ~empty
    assert (values[lowest] < -1e30).all(), f"{what}: lse of rows that see only the lowest number"
    ordinary = ~empty & ~lowest
    difference = np.abs(values[ordinary] - expected.lse[ordinary])
    assert (difference <= expected.lse_bound[ordinary]).all(), f"{what}: lse: off by {difference.max():.3g}"


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Σ|Δ| / Σ|O|"""
    return float((got.double() - exact).abs().sum() / exact.abs().sum())


def root_mean_square(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt())


def cosine(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(got.double().flatten(), exact.flatten(), dim=0))


def same_lse(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Logarithms of different processors: the same but for the last places; infinities and NaN alike."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True))
