"""Quantized attention in plain torch: the definition that every kernel follows bit for bit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tcompress.ops import attention_numbers as numbers
from tcompress.ops.attention_numbers import BLOCK


@dataclass(frozen=True)
class Visible:
    """Which keys a query sees, apart from the mask.

    Query i stands at position `i + offset`; it sees the keys from `position - left` to `position + right`. -1: no limit.
    """

    bottom_right: bool
    left: int
    right: int

    def block(self, sq: int, skv: int, keys: torch.Tensor) -> torch.Tensor:
        """bool [Sq, len(keys)]."""
        positions = torch.arange(sq, device=keys.device)[:, None] + (skv - sq if self.bottom_right else 0)
        seen = (keys < skv).expand(sq, -1)
        if self.left >= 0:
            seen = seen & (keys >= positions - self.left)
        if self.right >= 0:
            seen = seen & (keys <= positions + self.right)
        return seen


@dataclass(frozen=True)
class KeysAndValues:
    """Integers (as any type that holds them) and scales of keys and values; a token that is not finite has scale NaN.

    k [B, Hkv, S, D], k_scale [B, Hkv, S], v [B, Hkv, S, Dv], v_scale [B, Hkv, S], k_mean [B, Hkv, D].
    """

    k: torch.Tensor
    k_scale: torch.Tensor
    v: torch.Tensor
    v_scale: torch.Tensor
    k_mean: torch.Tensor

    @classmethod
    def quantize(cls, k: torch.Tensor, v: torch.Tensor, bits: int) -> KeysAndValues:
        """Keys less their mean over the tokens, and values, each token with a scale of its own."""
        k, v = k.float(), v.float()
        mean = numbers.key_mean(k)
        k_int, k_scale = numbers.quantize_tokens(k - mean[..., None, :], bits)
        v_int, v_scale = numbers.quantize_tokens(v, bits)
        return cls(k_int, k_scale, v_int, v_scale, mean)

    def repeat(self, groups: int) -> KeysAndValues:
        """For each of `groups` query heads that share a head of keys."""
        parts = (self.k, self.k_scale, self.v, self.v_scale, self.k_mean)
        return self if groups == 1 else KeysAndValues(*(t.repeat_interleave(groups, 1) for t in parts))

    def pad(self) -> KeysAndValues:
        """To whole blocks of tokens."""
        more = -self.k.shape[2] % BLOCK
        k, v = (F.pad(t, (0, 0, 0, more)) for t in (self.k, self.v))
        return KeysAndValues(k, F.pad(self.k_scale, (0, more)), v, F.pad(self.v_scale, (0, more)), self.k_mean)


def mean_product(q: torch.Tensor, k_mean: torch.Tensor) -> torch.Tensor:
    """q · k_mean in the order of the channels: [B, H, Sq, D], [B, H, D] -> [B, H, Sq]."""
    total = torch.zeros(q.shape[:-1], device=q.device)
    for d in range(q.shape[-1]):
        total = total + q[..., d] * k_mean[:, :, None, d]
    return total


def attend(
    q: torch.Tensor,
    kv: KeysAndValues,
    bits: int,
    mask: torch.Tensor | None,
    visible: Visible,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of float queries over quantized keys and values.

    Args:
        q: [B, H, Sq, D], any float type.
        kv: of Hkv heads; H is a multiple.
        bits: of the queries.
        mask: [B, H, Sq, Skv] bool (True: visible) or additive float, or None.
        visible, scale, softcap: as in `quantized_attention`; softcap 0 means none.

    Returns:
        [B, H, Sq, Dv] float32, and the logarithm of the softmax's denominator, [B, H, Sq] float32.
    """
    skv, (b, h, sq, _) = kv.k.shape[2], q.shape
    kv = kv.repeat(h // max(kv.k.shape[1], 1)).pad()
    unit = torch.tensor(numbers.ticks_scale(scale), dtype=torch.float32, device=q.device)
    q_int, q_scale = numbers.quantize_tokens(q.float(), bits)
    q_bad = torch.isnan(q_scale)
    q_scale = torch.where(q_bad, 0.0, q_scale) * unit
    q_int = (-q_int if scale < 0 else q_int).double()
    shift = mean_product(q.float(), kv.k_mean)  # what smoothing the keys took from all scores of a query
    if softcap:  # the cap is no shift of all scores: it needs them whole
        shift = torch.where(q_bad, 0.0, shift) * (-unit if scale < 0 else unit)

    highest = torch.full((b, h, sq), -math.inf, device=q.device)
    total = torch.zeros((b, h, sq), device=q.device)
    out = torch.zeros((b, h, sq, kv.v.shape[-1]), device=q.device)
    poisoned = torch.zeros((b, h, sq), dtype=torch.bool, device=q.device)
    for start in range(0, skv, BLOCK):
        tokens = slice(start, start + BLOCK)
        keys = torch.arange(start, start + BLOCK, device=q.device)
        seen = visible.block(sq, skv, keys).expand(b, h, sq, BLOCK)
        k_scale, v_scale = kv.k_scale[:, :, tokens], kv.v_scale[:, :, tokens]
        bad = (torch.isnan(k_scale) | torch.isnan(v_scale))[:, :, None]
        products = (q_int @ kv.k[:, :, tokens].double().mT).float()  # integers below 2^31, rounded once
        s = products * k_scale.nan_to_num(0.0)[:, :, None] * q_scale[..., None]
        if softcap:
            s = numbers.soften(s + shift[..., None], softcap)
        if mask is not None:
            part = F.pad(mask[..., start : min(start + BLOCK, skv)], (0, max(start + BLOCK - skv, 0)))
            if part.dtype == torch.bool:
                seen = seen & part
            else:
                seen = seen & (part != -math.inf)
                s = s + numbers.mask_ticks(part)
        broken = bad | torch.isnan(s)
        poisoned |= (seen & broken).any(-1)
        s = torch.where(seen & ~broken, s, -math.inf)

        block_highest = s.amax(-1)
        ticks = s - block_highest.clamp_min(numbers.LOWEST)[..., None]
        ticks = torch.where(ticks > -32768.0, ticks, -32768.0)  # NaN too
        weights = numbers.exp2_integer(torch.round(ticks).int())
        value_weight, value_scale = numbers.value_weights(v_scale)
        weighted = numbers.multiply_high(weights, value_weight[:, :, None])
        sums = (weighted.double() @ kv.v[:, :, tokens].double()).float()

        new = torch.maximum(highest, block_highest)
        floor = new.clamp_min(numbers.LOWEST)
        share, keep = numbers.exp2_float(block_highest - floor), numbers.exp2_float(highest - floor)
        total = total * keep + share * weights.sum(-1).float()
        out = out * keep[..., None] + sums * (share * value_scale)[..., None]
        highest = new

    empty = highest == -math.inf
    factor = torch.where(empty, 0.0, 1 / total)
    factor = torch.where(poisoned | (q_bad & ~empty), math.nan, factor)
    # P' counts a value by VALUE_ONE + 1 units, of which its weight had VALUE_ONE
    out = out * (factor * torch.tensor((numbers.VALUE_ONE + 1) / numbers.VALUE_ONE, dtype=torch.float32))[..., None]
    lse = (highest / numbers.TICKS_PER_NAT) + torch.log(total / numbers.ONE)
    if not softcap:
        lse = lse + shift * scale
    lse = torch.where(empty, -math.inf, lse)
    return out, torch.where(torch.isnan(factor), math.nan, lse)
