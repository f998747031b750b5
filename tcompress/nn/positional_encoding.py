"""Fixed sinusoidal position signal, added to token embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sinusoidal_table(length: int, d_model: int, device: torch.device | str | None = None) -> Tensor:
    """``PE`` of `PositionalEncoding` for positions ``0 .. length - 1`` -> float64 ``[length, d_model]``."""
    position = torch.arange(length, device=device, dtype=torch.float64)
    even_channel = torch.arange(0, d_model, 2, device=device, dtype=torch.float64)
    angle = torch.outer(position, 10000.0 ** (-even_channel / d_model))
    table = torch.empty(length, d_model, device=device, dtype=torch.float64)
    table[:, 0::2] = angle.sin()
    # An odd d_model ends on a sine: there is one cosine channel fewer.
    table[:, 1::2] = angle[:, : d_model // 2].cos()
    return table


class PositionalEncoding(nn.Module):
    """Add the sinusoidal position signal of the original Transformer.

    ``PE(pos, 2i)   = sin(pos / 10000^(2i / d_model))``
    ``PE(pos, 2i+1) = cos(pos / 10000^(2i / d_model))``
    ``y[b, s, :] = x[b, s, :] + PE(s, :)``

    Paper: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, section 3.5. The scaling by
    ``sqrt(d_model)`` before (section 3.4) and the dropout after (section 5.4) are left to the caller.

    The table is computed in float64 and rounded to the module's dtype; the result has ``x``'s dtype. Where
    the table is too narrow for ``x`` (float64 ``x``, float32 table), it is computed anew in float64, to be as
    exact as ``x``. The table is a non-persistent buffer: the state dict is empty.

    Args:
        d_model: channels; odd values work (the last channel is then a sine).
        max_len: longest sequence, in tokens.

    Shapes:
        x ``[B, S, d_model]`` floating, ``S <= max_len`` -> same shape and dtype.

    Raises:
        ValueError: ``d_model < 1``, ``max_len < 1``, another shape of ``x``, or ``S > max_len``.
        TypeError: ``x`` is not floating point.
    """

    pe: Tensor

    def __init__(
        self,
        d_model: int,
        max_len: int = 5000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("max_len", max_len)):
            if value < 1:
                raise ValueError(f"PositionalEncoding: {name}: got {value}, expected at least 1; it is a size")
        self.d_model = d_model
        self.max_len = max_len
        table = sinusoidal_table(max_len, d_model, device).to(dtype or torch.get_default_dtype())
        self.register_buffer("pe", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(
                f"PositionalEncoding: x: got {x.dtype}, expected a floating dtype; pass embeddings, not token ids"
            )
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"PositionalEncoding: x: got shape {tuple(x.shape)}, expected [B, S, {self.d_model}]; "
                "add a batch axis with x[None] if there is none"
            )
        length = x.shape[1]
        if length > self.max_len:
            raise ValueError(
                f"PositionalEncoding: x: got {length} tokens, expected at most max_len={self.max_len}; "
                "build the module with a larger max_len"
            )
        if torch.promote_types(x.dtype, self.pe.dtype) == self.pe.dtype:
            table = self.pe[:length]
        else:
            table = sinusoidal_table(length, self.d_model, x.device)
        return x + table.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_len={self.max_len}"
