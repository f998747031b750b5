"""Layout of the int8 key-value cache: what the kernels read, and what tokens are appended to.

Tokens lie in blocks of 64. A block of keys of one head, D padded to fours, and one of values, Dv padded to 16s::

    keys    [4 panels][D/4][16 tokens][4 channels]     t0: d0 d1 d2 d3 | t1: d0 d1 d2 d3 | … | t15
    values  [Dv/16][16 quads][16 channels][4 tokens]   d0: t0 t1 t2 t3 | d1: t0 t1 t2 t3 | … | d15

so that 64 bytes hold, for 16 results, the four integers that a dot product of bytes adds up. Padding is zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK = 64
PANEL = 16
QUAD = 4


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


def key_bytes(d: int) -> int:
    """Bytes of a block of keys with head dimension d; none is stored as one quad of zeros."""
    return BLOCK * round_up(max(d, 1), QUAD)


def value_bytes(d: int) -> int:
    """Bytes of a block of values with head dimension d; none is stored as one panel of zeros."""
    return BLOCK * round_up(max(d, 1), PANEL)


def pack_keys(k: torch.Tensor) -> torch.Tensor:
    """int8 [..., S, D] -> [..., ceil(S/64), key_bytes(D)]."""
    s, d = k.shape[-2:]
    k = F.pad(k, (0, round_up(max(d, 1), QUAD) - d, 0, -s % BLOCK))
    k = k.unflatten(-1, (-1, QUAD)).unflatten(-3, (-1, BLOCK // PANEL, PANEL))  # [..., blocks, panels, 16, D/4, 4]
    return k.transpose(-3, -2).flatten(-4).contiguous()


def unpack_keys(data: torch.Tensor, s: int, d: int) -> torch.Tensor:
    """The inverse, for the first s tokens: [..., s, d]."""
    k = data.unflatten(-1, (BLOCK // PANEL, -1, PANEL, QUAD)).transpose(-3, -2)
    return k.flatten(-2).flatten(-4, -2)[..., :s, :d].contiguous()


def pack_values(v: torch.Tensor) -> torch.Tensor:
    """int8 [..., S, Dv] -> [..., ceil(S/64), value_bytes(Dv)]."""
    s, d = v.shape[-2:]
    v = F.pad(v, (0, round_up(max(d, 1), PANEL) - d, 0, -s % BLOCK))
    v = v.unflatten(-1, (-1, PANEL)).unflatten(-3, (-1, BLOCK // QUAD, QUAD))  # [..., blocks, quads, 4, Dv/16, 16]
    return v.movedim(-2, -4).transpose(-2, -1).flatten(-4).contiguous()


def unpack_values(data: torch.Tensor, s: int, d: int) -> torch.Tensor:
    """The inverse, for the first s tokens: [..., s, d]."""
    v = data.unflatten(-1, (-1, BLOCK // QUAD, PANEL, QUAD)).transpose(-2, -1).movedim(-4, -2)
    return v.flatten(-2).flatten(-4, -2)[..., :s, :d].contiguous()
