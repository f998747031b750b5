"""Small modules through which channels and heads pass."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Fused(nn.Module):
    """Gate and values in one layer, one after the other or in turn."""

    def __init__(self, in_turn: bool) -> None:
        super().__init__()
        self.both, self.down, self.in_turn = nn.Linear(6, 20), nn.Linear(10, 6), in_turn

    def forward(self, x):
        both = self.both(x)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.in_turn else both.chunk(2, -1)
        return self.down(F.gelu(gate) * up)


class Attention(nn.Module):
    """Several heads share keys and values."""

    def __init__(self, heads: int = 6, shared: int = 2, size: int = 4, fused: bool = False) -> None:
        super().__init__()
        self.heads, self.shared, self.size, self.fused = heads, shared, size, fused
        if fused:
            self.qkv = nn.Linear(8, 3 * heads * size)
        else:
            self.q, self.k, self.v = (nn.Linear(8, n * size) for n in (heads, shared, shared))
        self.o = nn.Linear(heads * size, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.unflatten(-1, (-1, self.size)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return x + self.o(y.transpose(1, 2).flatten(2))
