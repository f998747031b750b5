"""Attention in floating point, with the options and the conventions of `ops.quantized_attention`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tcompress.errors import message
from tcompress.ops.attention_options import Causal, Window, check_groups, checked_options
from tcompress.ops.attention_reference import Visible

_OP = "float_attention"


def float_attention(
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
    dropout: float = 0.0,
) -> torch.Tensor:
    """`softmax(scale · q kᵀ + mask) v` by `torch.nn.functional.scaled_dot_product_attention`.

    Its arguments mean what they mean in `ops.quantized_attention`, those that torch's function lacks included: `window`
    and `"bottom_right"` become part of the mask, and with a `softcap` the scores are computed in plain torch. A query
    that sees no key gives zeros, and no gradient flows through it. What torch returns there is not documented.

    Args:
        q: [B, H, Sq, D], any float type, also float64. k: [B, Hkv, Skv, D]. v: [B, Hkv, Skv, Dv].
        dropout: probability of dropping a weight; applied whenever it is above 0.

    Returns:
        [B, H, Sq, Dv] in the type of q. Differentiable.

    Raises:
        TypeError: a mask that is neither bool nor float. ValueError: an unknown option, or shapes that do not fit.
    """
    options = checked_options(_OP, 8, is_causal, window, softcap, scale, q.shape[-1])
    _, bottom_right, left, right, cap, factor = options
    check_groups(_OP, q.shape[1], k.shape[1], enable_gqa)
    if factor < 0:  # of which torch's causal kernel makes NaN
        q, factor = -q, -factor
    sq, skv = q.shape[2], k.shape[2]
    bottom_right = bottom_right and sq != skv
    visible, bias = _split(mask)
    causal = right == 0 and left < 0 and not bottom_right
    if visible is None and not cap and (causal or (left < 0 and right < 0)):
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=causal, scale=factor, enable_gqa=enable_gqa
        )
    if left >= 0 or right >= 0:
        near = Visible(bottom_right, left, right).block(sq, skv, torch.arange(skv, device=q.device))
        visible = near if visible is None else visible & near
    empty = None
    if visible is not None:
        # a query without keys is opened to every key, and its result is overwritten
        visible = visible[(None,) * (4 - visible.dim())]
        empty = ~visible.any(-1, keepdim=True)
        visible = visible | empty
    if cap:
        out = _softcapped(q, k, v, visible, bias, factor, cap, dropout)
    else:
        attn_mask = visible if bias is None else _additive(visible, empty, bias, q.dtype)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=dropout, scale=factor, enable_gqa=enable_gqa
        )
    return out if empty is None else out.masked_fill(empty, 0.0)


def _split(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A mask as (which keys are visible, what is added to the scores)."""
    if mask is None:
        return None, None
    if not isinstance(mask, torch.Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(message(_OP, "mask", got, "a bool or float tensor", "mask.bool() shows keys where it is not 0"))
    if mask.dim() > 4:
        raise ValueError(message(_OP, "mask", list(mask.shape), "broadcastable to [B, H, Sq, Skv]"))
    return (mask, None) if mask.dtype == torch.bool else (mask != -math.inf, mask)


def _additive(
    visible: torch.Tensor | None, empty: torch.Tensor | None, bias: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """One float mask of the type that torch's function wants; what is finite stays finite in it."""
    assert visible is not None
    assert empty is not None
    finite = bias.to(dtype).clamp_min(torch.finfo(dtype).min)
    return torch.where(empty, 0.0, torch.where(visible, finite, -math.inf)).to(dtype)


def _softcapped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    dropout: float,
) -> torch.Tensor:
    groups = q.shape[1] // max(k.shape[1], 1)
    dtype = q.dtype if q.dtype == torch.float64 else torch.float32
    k, v = (x.to(dtype).repeat_interleave(groups, 1) for x in (k, v))
    scores = softcap * torch.tanh((q.to(dtype) @ k.mT) * (scale / softcap))
    if bias is not None:
        scores = scores + torch.where(bias == -math.inf, 0.0, bias).to(dtype)  # at -inf the key is not visible
    if visible is not None:
        scores = torch.where(visible, scores, -math.inf)
    weights = F.dropout(scores.softmax(-1), dropout)
    return (weights @ v).to(q.dtype)
