"""Transformer encoder: one layer, and the stack of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcompress.nn.feed_forward import FeedForward, activation_name
from tcompress.nn.layer_norm import LayerNorm
from tcompress.nn.multihead_attention import MultiHeadAttention


class TransformerEncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual connection and a layer norm.

    post-norm (``norm_first=False``): ``h = norm1(x + self_attn(x))``, ``y = norm2(h + feed_forward(h))``
    pre-norm  (``norm_first=True``):  ``h = x + self_attn(norm1(x))``, ``y = h + feed_forward(norm2(h))``

    Papers: post-norm, Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, section 3.1; pre-norm,
    Xiong et al., "On Layer Normalization in the Transformer Architecture", arXiv 2002.04745, section 3.
    There is no dropout: the layer is made to be compressed and run.

    Args:
        n_head, d_model, d_head: see `MultiHeadAttention`.
        d_ff, activation: see `FeedForward`.
        norm_first: ``True`` is pre-norm.
        eps: of both layer norms.
        bias: ``False`` leaves out every bias, also that of the norms.

    Shapes:
        x ``[B, S, d_model]`` floating -> same shape and dtype.
        mask broadcastable to ``[B, n_head, S, S]``, 0 or False = blocked; see `MultiHeadAttention`.

    Raises:
        ValueError, TypeError: as `MultiHeadAttention`, `FeedForward` and `LayerNorm` do.
    """

    def __init__(
        self,
        n_head: int,
        d_model: int,
        d_head: int,
        d_ff: int,
        activation: str = "relu",
        norm_first: bool = False,
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.self_attn = MultiHeadAttention(n_head, d_model, d_head, bias=bias, device=device, dtype=dtype)
        self.feed_forward = FeedForward(d_model, d_ff, activation, bias=bias, device=device, dtype=dtype)
        self.norm1 = LayerNorm(d_model, eps, bias=bias, device=device, dtype=dtype)
        self.norm2 = LayerNorm(d_model, eps, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.norm_first:
            h = self.norm1(x)
            x = x + self.self_attn(h, h, h, mask)
            x = x + self.feed_forward(self.norm2(x))
        else:
            x = self.norm1(x + self.self_attn(x, x, x, mask))
            x = self.norm2(x + self.feed_forward(x))
        return x

    def extra_repr(self) -> str:
        return f"norm_first={self.norm_first}"

    @classmethod
    def from_torch(cls, layer: nn.TransformerEncoderLayer) -> TransformerEncoderLayer:
        """Copy a ``torch.nn.TransformerEncoderLayer``, with its device, dtype and training flag.

        The result is batch-first and takes the opposite mask, see `MultiHeadAttention.from_torch`.

        Raises:
            TypeError: the layer, or a part of it, is not exactly the torch class that torch builds it from.
            ValueError: dropout in training mode, an unknown activation, or unfit attention.
        """
        _check_layer(layer)
        attention = MultiHeadAttention.from_torch(layer.self_attn)
        ours = cls(
            attention.n_head,
            attention.d_model,
            attention.d_head,
            layer.linear1.out_features,
            activation=activation_name(layer.activation),
            norm_first=layer.norm_first,
            bias=layer.linear1.bias is not None,
            device="meta",
        )
        ours.self_attn = attention
        ours.norm1 = LayerNorm.from_torch(layer.norm1)
        ours.norm2 = LayerNorm.from_torch(layer.norm2)
        linears = {"linear1": layer.linear1, "linear2": layer.linear2}
        state = {f"{name}.{key}": t.clone() for name, lin in linears.items() for key, t in lin.state_dict().items()}
        ours.feed_forward.load_state_dict(state, assign=True)
        return ours.train(layer.training)


class TransformerEncoder(nn.Module):
    """``n_layer`` encoder layers in a row, then an optional layer norm.

    ``x_0 = x``, ``x_{l+1} = layer_l(x_l, mask)``, ``y = norm(x_{n_layer})``

    Paper: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, section 3.1. The final norm
    belongs to pre-norm stacks: Xiong et al., arXiv 2002.04745, section 3, table 1.

    Args:
        n_layer: number of layers, each with its own weights.
        final_norm: append a layer norm; usual with ``norm_first=True``.
        n_head, d_model, d_head, d_ff, activation, norm_first, eps, bias: see `TransformerEncoderLayer`;
            ``eps`` also holds for the final norm.

    Shapes:
        x ``[B, S, d_model]`` floating -> same shape and dtype.
        mask broadcastable to ``[B, n_head, S, S]``, 0 or False = blocked, the same for every layer.

    Raises:
        ValueError: ``n_layer < 1``, and as `TransformerEncoderLayer` does.
        TypeError: as `TransformerEncoderLayer` does.
    """

    def __init__(
        self,
        n_layer: int,
        n_head: int,
        d_model: int,
        d_head: int,
        d_ff: int,
        *,
        activation: str = "relu",
        norm_first: bool = False,
        eps: float = 1e-5,
        final_norm: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if n_layer < 1:
            raise ValueError(
                f"TransformerEncoder: n_layer: got {n_layer}, expected at least 1; it is a number of layers"
            )
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(
                n_head, d_model, d_head, d_ff, activation, norm_first, eps, bias, device=device, dtype=dtype
            )
            for _ in range(n_layer)
        )
        self.norm = LayerNorm(d_model, eps, bias=bias, device=device, dtype=dtype) if final_norm else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x if self.norm is None else self.norm(x)

    @classmethod
    def from_torch(cls, encoder: nn.TransformerEncoder) -> TransformerEncoder:
        """Copy a ``torch.nn.TransformerEncoder``, with its device, dtype and training flag.

        The result is batch-first and takes the opposite mask, see `MultiHeadAttention.from_torch`. Every
        token is computed: torch's nested-tensor fast path returns zeros for padded tokens, this does not.

        Raises:
            TypeError, ValueError: as `TransformerEncoderLayer.from_torch` and `LayerNorm.from_torch` do, and
                ValueError if there is no layer.
        """
        if type(encoder) is not nn.TransformerEncoder:
            raise TypeError(
                f"TransformerEncoder.from_torch: encoder: got {type(encoder).__name__}, expected "
                "torch.nn.TransformerEncoder itself; a subclass may compute something else"
            )
        layers = [TransformerEncoderLayer.from_torch(layer) for layer in encoder.layers]
        if not layers:
            raise ValueError(
                "TransformerEncoder.from_torch: encoder.layers: got none, expected at least 1; nothing to do"
            )
        attention, d_ff = layers[0].self_attn, layers[0].feed_forward.d_ff
        # On "meta" the placeholder layers cost no memory; all of them are replaced here.
        ours = cls(len(layers), attention.n_head, attention.d_model, attention.d_head, d_ff, device="meta")
        ours.layers = nn.ModuleList(layers)
        ours.norm = None if encoder.norm is None else LayerNorm.from_torch(encoder.norm)
        return ours.train(encoder.training)


def _check_layer(layer: nn.TransformerEncoderLayer) -> None:
    if type(layer) is not nn.TransformerEncoderLayer:
        raise TypeError(
            f"TransformerEncoderLayer.from_torch: layer: got {type(layer).__name__}, expected "
            "torch.nn.TransformerEncoderLayer itself; a subclass may compute something else"
        )
    for name in ("linear1", "linear2"):
        part = getattr(layer, name)
        if type(part) is not nn.Linear:
            raise TypeError(
                f"TransformerEncoderLayer.from_torch: layer.{name}: got {type(part).__name__}, expected "
                "torch.nn.Linear; convert before the layer is compressed"
            )
    for name, part in layer.named_modules():
        if isinstance(part, nn.Dropout) and part.training and part.p > 0:
            raise ValueError(
                f"TransformerEncoderLayer.from_torch: layer.{name}: got dropout {part.p} in training mode, "
                "expected 0; there is no dropout here, call .eval() first"
            )
