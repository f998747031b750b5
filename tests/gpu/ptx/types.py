"""The scalar types of PTX, and the numpy types that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
#: Threads that take part; None: all of the block.
Mask = NDArray[np.bool_] | None

RAW: dict[int, np.dtype] = {n: np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)}


@dataclass(frozen=True)
class PtxType:
    """name: as in the ISA, without the dot. kind: s, u, b, f, bf (bfloat16) or p (predicate). bits: of a scalar.

    dtype: what arithmetic is done in; raw: how a register holds it. numpy has no bfloat16: its dtype is the raw one,
    and the instructions that take it widen it themselves.
    """

    name: str
    kind: str
    bits: int

    @property
    def dtype(self) -> np.dtype:
        if self.kind == "p":
            return np.dtype(bool)
        letter = {"s": "i", "u": "u", "b": "u", "f": "f", "bf": "u"}[self.kind]
        return np.dtype(f"{letter}{self.bits // 8}")

    @property
    def raw(self) -> np.dtype:
        return np.dtype(bool) if self.kind == "p" else RAW[self.bits]

    @property
    def is_integer(self) -> bool:
        return self.kind in "sub" and self.kind != "bf"

    @property
    def is_float(self) -> bool:
        return self.kind in ("f", "bf")


TYPES: dict[str, PtxType] = {f"{kind}{bits}": PtxType(f"{kind}{bits}", kind, bits) for kind in "sub" for bits in RAW}
TYPES |= {f"f{bits}": PtxType(f"f{bits}", "f", bits) for bits in (16, 32, 64)}
TYPES["bf16"] = PtxType("bf16", "bf", 16)
TYPES["pred"] = PtxType("pred", "p", 1)

B32, B64, U32, S32, F32, PRED = (TYPES[name] for name in ("b32", "b64", "u32", "s32", "f32", "pred"))
