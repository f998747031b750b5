"""Multi-head scaled dot-product attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcompress.nn.int8_attention import Int8Attention


class MultiHeadAttention(nn.Module):
    """Attend with ``n_head`` heads, concatenate them, and project back to ``d_model``.

    ``head_h = softmax(Q_h K_h^T / sqrt(d_head) + M) V_h``
    ``y = concat(head_0, ..., head_{n_head-1}) W_O^T + b_O``

    ``M`` is 0 where the mask allows and -inf elsewhere. ``Q_h, K_h, V_h`` are columns ``h * d_head`` to
    ``(h + 1) * d_head`` of ``q_proj(q), k_proj(k), v_proj(v)``.

    Paper: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, sections 3.2.1 and 3.2.2.

    Args:
        n_head: number of heads.
        d_model: channels of q, k, v and of the result.
        d_head: channels of one head; need not be ``d_model / n_head``.
        bias: ``False`` leaves out the bias of all four projections.

    Shapes (B batch, Sq and Skv tokens):
        q ``[B, Sq, d_model]``, k and v ``[B, Skv, d_model]``, floating -> ``[B, Sq, d_model]``, same dtype.
        ``q_proj, k_proj, v_proj`` weights ``[n_head * d_head, d_model]``, ``o_proj`` the transpose of that.

    Mask: 0 or False blocks a key, 1 or True allows it. (``torch.nn.MultiheadAttention`` means the opposite:
    pass ``~mask``.) It is broadcast to ``[B, n_head, Sq, Skv]`` from

    - 4-D: as it is; key padding ``[B, Skv]`` is passed as ``mask[:, None, None, :]``;
    - 3-D: ``[B, Sq, Skv]``, a head axis is inserted, ``mask[:, None]``;
    - 2-D or fewer: the last axes, ``[Sq, Skv]``, the same for every sequence and head.

    Integers allow where nonzero. A floating mask must hold only 0 and 1. This is checked, because an additive
    0/-inf mask means the opposite. The check reads values, so ``torch.compile(fullgraph=True)`` needs a bool
    or integer mask.

    A query with no allowed key (all blocked, or ``Skv == 0``) attends to nothing: its heads are zero, so its
    row of the result is ``o_proj``'s bias, and no gradient flows through its attention. NaN and inf in k
    and v reach every other query of the sequence as in torch, also from blocked keys (``0 * NaN`` is NaN).

    There is no dropout.

    ``attention`` is the `Int8Attention` between the projections, in floating point until its ``precision`` is set to
    "int8" (`tcompress.compress` with an attention step does so).

    Raises:
        ValueError: a size below 1, shapes that do not fit, or a floating mask that is not 0/1.
        TypeError: q, k or v not a floating tensor, mask not a real tensor.
    """

    def __init__(
        self,
        n_head: int,
        d_model: int,
        d_head: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("n_head", n_head), ("d_model", d_model), ("d_head", d_head)):
            if value < 1:
                raise ValueError(f"MultiHeadAttention: {name}: got {value}, expected at least 1; it is a size")
        self.n_head = n_head
        self.d_model = d_model
        self.d_head = d_head
        d_inner = n_head * d_head
        self.q_proj = nn.Linear(d_model, d_inner, bias=bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(d_model, d_inner, bias=bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(d_model, d_inner, bias=bias, device=device, dtype=dtype)
        self.o_proj = nn.Linear(d_inner, d_model, bias=bias, device=device, dtype=dtype)
        self.attention = Int8Attention(precision="float")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        self._check_inputs(q, k, v)
        query = self._split_heads(self.q_proj(q))
        key = self._split_heads(self.k_proj(k))
        value = self._split_heads(self.v_proj(v))
        if mask is not None:
            mask = _canonical_mask(mask, (q.shape[0], self.n_head, q.shape[1], k.shape[1]))
        heads = self.attention(query, key, value, mask=mask)
        y: Tensor = self.o_proj(heads.transpose(1, 2).flatten(2))
        return y

    def extra_repr(self) -> str:
        return f"n_head={self.n_head}, d_model={self.d_model}, d_head={self.d_head}"

    def _split_heads(self, x: Tensor) -> Tensor:
        """``[B, S, n_head * d_head]`` -> ``[B, n_head, S, d_head]``, a view."""
        return x.unflatten(-1, (self.n_head, self.d_head)).transpose(1, 2)

    def _check_inputs(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"MultiHeadAttention: {name}: got {got}, expected a floating tensor; pass embeddings")
            if x.dim() != 3 or x.shape[-1] != self.d_model:
                raise ValueError(
                    f"MultiHeadAttention: {name}: got shape {tuple(x.shape)}, expected [B, S, {self.d_model}]"
                    "; the batch comes first, add it with x[None] if there is none"
                )
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"MultiHeadAttention: k: got batch {k.shape[0]}, expected {q.shape[0]} as in q; expand the smaller one"
            )
        if v.shape != k.shape:
            raise ValueError(
                f"MultiHeadAttention: v: got shape {tuple(v.shape)}, expected {tuple(k.shape)} as k; "
                "every key has one value"
            )

    @classmethod
    def from_torch(cls, mha: nn.Module) -> MultiHeadAttention:
        """Copy a ``torch.nn.MultiheadAttention``, with its device, dtype and training flag.

        The result is called differently: it is always batch-first (whatever ``mha.batch_first``), returns the
        output only, and takes the opposite mask (see the class). It has no dropout, so it stays the eval-mode
        function also after ``.train()``.

        Raises:
            TypeError: not exactly ``torch.nn.MultiheadAttention`` (a subclass may compute something else).
            ValueError: ``add_bias_kv``, ``add_zero_attn``, ``kdim`` or ``vdim`` other than ``embed_dim``, or
                dropout in training mode.
        """
        if type(mha) is not nn.MultiheadAttention:
            raise TypeError(
                f"MultiHeadAttention.from_torch: mha: got {type(mha).__name__}, expected "
                "torch.nn.MultiheadAttention itself; a subclass may compute something else"
            )
        if not isinstance(mha.out_proj, nn.Linear):
            raise TypeError(
                f"MultiHeadAttention.from_torch: mha.out_proj: got {type(mha.out_proj).__name__}, expected "
                "torch.nn.Linear; convert before the module is compressed"
            )
        _check_convertible(mha)
        ours = cls(mha.num_heads, mha.embed_dim, mha.head_dim, bias=mha.in_proj_bias is not None, device="meta")
        state = {f"o_proj.{name}": t.clone() for name, t in mha.out_proj.state_dict().items()}
        if mha.in_proj_weight is not None:
            weights: tuple[Tensor, ...] = mha.in_proj_weight.detach().chunk(3)
        else:
            weights = (mha.q_proj_weight.detach(), mha.k_proj_weight.detach(), mha.v_proj_weight.detach())
        names = ("q_proj", "k_proj", "v_proj")
        state |= {f"{name}.weight": w.clone() for name, w in zip(names, weights, strict=True)}
        if mha.in_proj_bias is not None:
            biases = mha.in_proj_bias.detach().chunk(3)
            state |= {f"{name}.bias": b.clone() for name, b in zip(names, biases, strict=True)}
        ours.load_state_dict(state, assign=True)
        return ours.train(mha.training)


def _check_convertible(mha: nn.MultiheadAttention) -> None:
    def refuse(argument: str, got: object, expected: object, hint: str) -> None:
        raise ValueError(f"MultiHeadAttention.from_torch: mha.{argument}: got {got}, expected {expected}; {hint}")

    if mha.bias_k is not None or mha.bias_v is not None:
        refuse("add_bias_kv", True, False, "an extra learned key has no equivalent here")
    if mha.add_zero_attn:
        refuse("add_zero_attn", True, False, "an extra zero key has no equivalent here")
    for name in ("kdim", "vdim"):
        if getattr(mha, name) != mha.embed_dim:
            refuse(name, getattr(mha, name), f"embed_dim={mha.embed_dim}", "q, k and v have one size here")
    if mha.training and mha.dropout > 0:
        refuse("dropout", mha.dropout, "0 in training mode", "there is no dropout here, call .eval() first")


def _canonical_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Any mask that `MultiHeadAttention` accepts -> bool, 4-D, broadcastable to ``shape``, True = allowed."""
    if not isinstance(mask, Tensor) or mask.is_complex():
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"MultiHeadAttention: mask: got {got}, expected a bool tensor; pass mask.bool()")
    given = tuple(mask.shape)
    if mask.dim() == 3:
        mask = mask[:, None]
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dim() != 4 or any(m not in (1, s) for m, s in zip(mask.shape, shape, strict=True)):
        raise ValueError(
            f"MultiHeadAttention: mask: got shape {given}, expected one that broadcasts to [B, n_head, Sq, "
            f"Skv] = {list(shape)}; 2-D is [Sq, Skv], 3-D is [B, Sq, Skv], key padding is [B, 1, 1, Skv]"
        )
    if mask.is_floating_point() and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            "MultiHeadAttention: mask: got a floating mask with other values, expected only 0 (blocked) and "
            "1 (allowed); for an additive mask pass mask == 0"
        )
    return mask.bool()
