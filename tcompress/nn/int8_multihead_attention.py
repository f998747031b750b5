"""Drop-in for `torch.nn.MultiheadAttention` whose projections and attention can be compressed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcompress.errors import message
from tcompress.nn.int8_attention import Int8Attention, Precision
from tcompress.ops.attention_options import Bits

_NAME = "Int8MultiheadAttention"


class Int8MultiheadAttention(nn.Module):
    """`out_proj(concat over heads of softmax(Q Kᵀ / √d) V)`, called exactly like `torch.nn.MultiheadAttention`.

    `q_proj`, `k_proj`, `v_proj` and `out_proj` are modules of their own, `nn.Linear` or `QuantizedLinear`; `attention`
    is an `Int8Attention`. torch's Transformer layers take it for their own module and never hand its weights to their
    native fast path.

    Differences from torch: a query that may see no key attends to nothing (its row is the bias of `out_proj`);
    `add_bias_kv` and `add_zero_attn` do not exist; nested tensors are refused. With `need_weights=True`, where the
    weights are to be returned, attention is computed in floating point, as torch does.

    Paper: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, section 3.2.2.

    Args:
        embed_dim: channels E of the query and of the result. num_heads: H, a divisor of it.
        dropout: of the weights, in training mode; quantized attention then raises.
        bias: of all projections.
        kdim, vdim: channels of key and value; E by default.
        batch_first: [N, L, E] instead of [L, N, E].
        bits, precision: of `attention`.

    Raises:
        ValueError: embed_dim is no multiple of num_heads.
    """

    #: torch's layers read these to decide whether their native fast path may take the weights: it may not.
    in_proj_weight = None
    in_proj_bias = None
    bias_k = bias_v = None
    add_zero_attn = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        bits: Bits = "auto",
        precision: Precision = "int8",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(message(_NAME, "embed_dim", embed_dim, f"a multiple of num_heads = {num_heads}"))
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self._qkv_same_embed_dim = self.kdim == self.vdim == embed_dim
        self.dropout, self.batch_first = dropout, batch_first
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(self.kdim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(self.vdim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.attention = Int8Attention(bits, precision)

    @classmethod
    def from_torch(
        cls, mha: nn.MultiheadAttention, bits: Bits = "auto", precision: Precision = "int8", *, copy: bool = True
    ) -> Int8MultiheadAttention:
        """The same layer with float projections, to be compressed or not.

        Args:
            copy: of the weights; without it they stay views of the original's.

        Raises:
            TypeError: a subclass, which may compute something else. ValueError: `why_not_convertible`.
        """
        if type(mha) is not nn.MultiheadAttention:
            raise TypeError(message(_NAME, "mha", type(mha).__name__, "torch.nn.MultiheadAttention itself"))
        reason = why_not_convertible(mha)
        if reason is not None:
            raise ValueError(message(_NAME, "mha", f"one that cannot be converted ({reason})", "one that can"))
        ours = cls(
            mha.embed_dim,
            mha.num_heads,
            dropout=mha.dropout,
            bias=mha.in_proj_bias is not None,
            kdim=mha.kdim,
            vdim=mha.vdim,
            batch_first=mha.batch_first,
            bits=bits,
            precision=precision,
            device="meta",
        )
        separate = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
        weights = separate if mha.in_proj_weight is None else mha.in_proj_weight.detach().chunk(3)
        biases = (None,) * 3 if mha.in_proj_bias is None else mha.in_proj_bias.detach().chunk(3)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        parts = zip(names, (*weights, mha.out_proj.weight), (*biases, mha.out_proj.bias), strict=True)
        for name, weight, bias in parts:
            linear = ours.get_submodule(name)
            for key, tensor in (("weight", weight), ("bias", bias)):
                if tensor is not None:
                    values = tensor.detach().clone() if copy else tensor.detach()
                    linear.register_parameter(key, nn.Parameter(values, mha.out_proj.weight.requires_grad))
        return ours.train(mha.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """torch's arguments with torch's meaning.

        Args:
            query: [L, N, E], or [N, L, E] if batch_first, or [L, E]. key, value: the same with S tokens.
            key_padding_mask: [N, S] or [S]; bool, True hides a key, or float, added to the scores.
            need_weights: also return the weights, which computes them in floating point.
            attn_mask: [L, S] or [N·H, L, S]; bool, True hides, or float.
            average_attn_weights: return them averaged over the heads.
            is_causal: a hint that attn_mask, which must be there, is causal.

        Returns:
            The result in the query's shape; the weights [N, L, S], or [N, H, L, S] if not averaged, or None.

        Raises:
            TypeError: a mask that is neither bool nor float. ValueError: shapes that do not fit, nested tensors,
            is_causal without attn_mask, or dropout in training mode where attention is quantized.
        """
        batched = query.dim() == 3
        self._check(query, key, value, batched)
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        batch_first = self.batch_first or not batched
        q = self._split_heads(self.q_proj(query), batch_first)
        k = self._split_heads(self.k_proj(key), batch_first)
        v = self._split_heads(self.v_proj(value), batch_first)
        if is_causal and attn_mask is None:
            hint = "it is a hint about the mask; torch.nn.Transformer.generate_square_subsequent_mask makes one"
            raise ValueError(message(_NAME, "is_causal", "True without attn_mask", "attn_mask too", hint))
        weights: Tensor | None = None
        if need_weights:
            mask = self._merged(attn_mask, key_padding_mask, q, k)
            heads, weights = self._attend_with_weights(q, k, v, mask)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            causal = is_causal and key_padding_mask is None  # a merged mask is no longer causal, says torch
            mask = self._merged(None if causal else attn_mask, key_padding_mask, q, k)
            heads = self.attention(q, k, v, mask=mask, is_causal=causal, dropout=self.dropout)
        joined = heads.permute(0, 2, 1, 3) if batch_first else heads.permute(2, 0, 1, 3)
        y: Tensor = self.out_proj(joined.flatten(2))
        return y if batched else y[0], weights

    def extra_repr(self) -> str:
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"
        return text + (f", dropout={self.dropout}" if self.dropout else "")

    def _split_heads(self, x: Tensor, batch_first: bool) -> Tensor:
        """[N, S, E] or [S, N, E] -> [N, H, S, D], a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.permute(0, 2, 1, 3) if batch_first else x.permute(1, 2, 0, 3)

    def _attend_with_weights(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = (q / math.sqrt(self.head_dim)) @ k.mT
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(q.dtype)
        weights = scores.softmax(-1)
        # a query without keys: NaN in torch; here the weights are zero, as its result is
        weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
        weights = F.dropout(weights, self.dropout, self.training)
        return weights @ v, weights

    def _merged(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one, 4-D: bool, True for a visible key, or float."""
        (n, h, sq), skv = q.shape[:3], k.shape[2]
        parts = []
        if attn_mask is not None:
            mask = _visible_or_added("attn_mask", attn_mask)
            if attn_mask.shape == (sq, skv):
                parts.append(mask[None, None])
            elif attn_mask.shape == (n * h, sq, skv):
                parts.append(mask.view(n, h, sq, skv))
            else:
                expected = f"[L, S] = {[sq, skv]} or [N·H, L, S] = {[n * h, sq, skv]}"
                raise ValueError(message(_NAME, "attn_mask", list(attn_mask.shape), expected))
        if padding is not None:
            if padding.shape != (n, skv):
                raise ValueError(message(_NAME, "key_padding_mask", list(padding.shape), f"[N, S] = {[n, skv]}"))
            parts.append(_visible_or_added("key_padding_mask", padding)[:, None, None])
        if len(parts) < 2:
            return parts[0] if parts else None
        if all(p.dtype == torch.bool for p in parts):
            return parts[0] & parts[1]
        return sum(_added(p, q.dtype) for p in parts)  # type: ignore[return-value]

    def _check(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> None:
        if any(x.is_nested for x in (query, key, value)):
            raise ValueError(message(_NAME, "query", "a nested tensor", "padded tensors and key_padding_mask"))
        shapes = [list(x.shape) for x in (query, key, value)]
        fits = query.dim() == key.dim() == value.dim() and query.dim() in (2, 3)
        fits = fits and [s[-1] for s in shapes] == [self.embed_dim, self.kdim, self.vdim]
        batch = 0 if self.batch_first else 1
        if not fits or shapes[1][:-1] != shapes[2][:-1] or (batched and shapes[0][batch] != shapes[1][batch]):
            sizes = (("L", self.embed_dim), ("S", self.kdim), ("S", self.vdim))
            expected = ", ".join(f"[N, {t}, {size}]" if self.batch_first else f"[{t}, N, {size}]" for t, size in sizes)
            raise ValueError(message(_NAME, "query, key, value", shapes, f"{expected}, or without N"))


def why_not_convertible(mha: nn.MultiheadAttention) -> str | None:
    """The reason why a `torch.nn.MultiheadAttention` has no such form, or None."""
    if mha.bias_k is not None or mha.bias_v is not None:
        return "add_bias_kv: an extra learned key has no equivalent"
    if mha.add_zero_attn:
        return "add_zero_attn: an extra zero key has no equivalent"
    if not isinstance(mha.out_proj, nn.Linear):
        return f"its out_proj is {type(mha.out_proj).__name__}"
    return None


def _visible_or_added(name: str, mask: Tensor) -> Tensor:
    """torch's mask, in which True hides, in our form, in which True shows; a float mask as it is."""
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.is_floating_point():
        raise TypeError(message(_NAME, name, mask.dtype, "a bool or float mask"))
    return mask


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)
