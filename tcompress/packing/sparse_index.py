"""Which positions of a grid are kept, in bytes: a bitmap, or gaps where few are kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tcompress.errors import message

#: The byte of a gap that goes on: so many positions are dropped, and the next byte tells more.
LONG_GAP = 255


def encode_index(mask: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Encodes which positions of a flat grid are kept.

    ::

        "bitmap"   a bit a position, the lowest bit of a byte first, padded with zeros
        "delta"    a byte a kept position: how many dropped ones lie between it and the kept one before it (or the
                   start of the grid). 255 stands for 255 dropped positions and no kept one, so that a gap of 600 is
                   255, 255, 90, and one of 255 is 255, 0. Dropped positions at the end are not written.

    The shorter is taken, the bitmap if they are equal: gaps where less than about an eighth is kept.

    Args:
        mask: bool [length], True where kept.

    Returns:
        The index, uint8 1-D, and its kind.

    Raises:
        TypeError: not bool. ValueError: not one-dimensional.
    """
    if mask.dtype != torch.bool:
        raise TypeError(message("encode_index", "mask", mask.dtype, "bool"))
    if mask.dim() != 1:
        raise ValueError(message("encode_index", "mask", list(mask.shape), "[length]"))
    bitmap_bytes = -(-mask.numel() // 8)
    if int(mask.count_nonzero()) < bitmap_bytes:
        delta = _encode_delta(mask)
        if delta.numel() < bitmap_bytes:
            return delta, "delta"
    return pack_bits(mask), "bitmap"


def decode_index(index: torch.Tensor, kind: str, length: int) -> torch.Tensor:
    """The inverse of `encode_index`: bool [length].

    Raises:
        TypeError: not uint8. ValueError: an unknown kind, or bytes that no mask of this length gives.
    """
    check_index(index)
    if kind == "bitmap":
        return unpack_bits(index, length)
    if kind != "delta":
        raise ValueError(message("decode_index", "kind", repr(kind), '"bitmap" or "delta"'))
    if index.numel() and int(index[-1]) == LONG_GAP:
        raise ValueError(message("decode_index", "index", "a gap that goes on at the end", "a kept position"))
    kept = index != LONG_GAP
    ends = torch.cumsum(index.long() + kept, 0)
    if index.numel() and int(ends[-1]) > length:
        raise ValueError(message("decode_index", "index", f"position {int(ends[-1]) - 1}", f"less than {length}"))
    mask = torch.zeros(length, dtype=torch.bool, device=index.device)
    mask[ends[kept] - 1] = True
    return mask


def _encode_delta(mask: torch.Tensor) -> torch.Tensor:
    positions = mask.nonzero()[:, 0]
    gaps = torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
    ends = torch.cumsum(gaps // LONG_GAP + 1, 0)  # where each gap's bytes end
    delta = torch.full((int(ends[-1]) if ends.numel() else 0,), LONG_GAP, dtype=torch.uint8, device=mask.device)
    delta[ends - 1] = (gaps % LONG_GAP).to(torch.uint8)
    return delta


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """bool [count] -> uint8 [ceil(count/8)], the lowest bit first, padded with zeros."""
    eights = F.pad(bits, (0, -bits.numel() % 8)).view(torch.uint8).view(-1, 8)
    return (eights << _shifts(bits.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of `pack_bits`.

    Raises:
        ValueError: another number of bytes than `count` bits take, or a bit of the padding is set.
    """
    if packed.numel() != -(-count // 8):
        raise ValueError(message("decode_index", "index", f"{packed.numel()} bytes", f"{-(-count // 8)}"))
    bits = ((packed[:, None] >> _shifts(packed.device)) & 1).flatten().view(torch.bool)
    if bits[count:].any():
        raise ValueError(message("decode_index", "index", f"a bit set after the first {count}", "zeros"))
    return bits[:count]


def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def check_index(index: torch.Tensor) -> None:
    """Raises TypeError unless uint8, ValueError unless one-dimensional."""
    if index.dtype != torch.uint8:
        raise TypeError(message("decode_index", "index", index.dtype, "uint8"))
    if index.dim() != 1:
        raise ValueError(message("decode_index", "index", list(index.shape), "one dimension"))
