"""Where a matrix of wgmma lies in shared memory.

ISA 9.7.15.5.1.2, "Shared Memory Matrix Layout". A descriptor has 64 bits:

    13–0 start address   29–16 leading dimension offset   45–32 stride dimension offset   51–49 base offset
    63–62 swizzle: 0 none, 1 of 128 bytes, 2 of 64, 3 of 32            addresses and offsets in units of 16 bytes

Both layouts are made of words of 16 bytes. With W the bytes of a swizzle and r a row (of A, or column of B):

    K along the words      word c of row r at        r % 8 · W + r / 8 · stride + 16 c          (none: W is 16, and the
                                                                                            second word is leading away)
    rows along the words   word r / 8 of product k   16 (r / 8 % (W / 16)) + r / 8 / (W / 16) · leading
                           at                        + k % 8 · W + k / 8 · stride               (none: not modelled)

A swizzle exchanges words: bits 4… of the address are xor-ed with bits 7…, one for 32 bytes, two for 64, three for 128.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..errors import InvalidOperand
from ..memory import Addresses

_FIELDS = 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62
_SWIZZLE_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}


@lru_cache(maxsize=4096)
def matrix_bytes(descriptor: int, rows: int, rows_first: bool) -> Addresses:
    """Addresses of its bytes: [rows, 32], 32 bytes of K a row; with `rows_first`, rows along the words, [16, 2 · rows]
    of 16-bit elements.

    Raises:
        InvalidOperand: a descriptor that the ISA does not define.
    """
    if descriptor & ~_FIELDS:
        raise InvalidOperand(f"descriptor {descriptor:#018x}: bits outside of its fields")
    start, leading, stride = (16 * (descriptor >> at & 0x3FFF) for at in (0, 16, 32))
    width = _SWIZZLE_BYTES[descriptor >> 62]
    if descriptor >> 49 & 7:
        raise InvalidOperand(f"descriptor {descriptor:#018x}: a base offset is not modelled")
    if width > 16 and start % (8 * width) >= width:
        raise InvalidOperand(
            f"descriptor {descriptor:#018x}: the start lies within a swizzle pattern, without a base offset"
        )
    words = width // 16
    if rows_first:
        if width == 16:
            raise InvalidOperand(
                f"descriptor {descriptor:#018x}: rows along the words without a swizzle is not modelled"
            )
        q, k = np.arange(rows // 8), np.arange(16)[:, None]
        at = start + 16 * (q % words) + q // words * leading + k % 8 * width + k // 8 * stride
    else:
        c, r = np.arange(2), np.arange(rows)[:, None]
        at = start + r % 8 * width + r // 8 * stride + c * (leading if width == 16 else 16)
    at = at ^ (at >> 7 & words - 1) << 4
    return (at[:, :, None] + np.arange(16)).reshape(at.shape[0], -1).astype(np.int64)
