"""Storage layout "int4": two 4-bit integers a byte."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tcompress.errors import message


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """Packs integers 0 … 15, [N, K], to uint8 [N, ceil(K/2)]: the even k in the low nibble.

    Raises:
        TypeError: not uint8. ValueError: not two-dimensional, or a value above 15.
    """
    if q.dtype != torch.uint8:
        raise TypeError(message("pack_int4", "q", q.dtype, "uint8"))
    if q.dim() != 2:
        raise ValueError(message("pack_int4", "q", list(q.shape), "[N, K]"))
    if q.numel() and int(q.max()) > 15:
        raise ValueError(message("pack_int4", "q", f"a value of {int(q.max())}", "0 to 15"))
    return join_nibbles(q)


def join_nibbles(q: torch.Tensor) -> torch.Tensor:
    """`pack_int4` of what is known to fit: nothing depends on the data, so that it can be compiled."""
    q = F.pad(q, (0, q.shape[1] % 2))
    return q[:, ::2] | (q[:, 1::2] << 4)


def unpack_int4(packed: torch.Tensor, k: int) -> torch.Tensor:
    """The inverse of `pack_int4`: uint8 [N, K]."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :k]
