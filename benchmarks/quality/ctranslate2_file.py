"""Variables out of a CTranslate2 `model.bin`.

Little-endian: version u32; spec, a string; revision u32; number of variables u32; each variable: name, a string; rank
u8; shape u32 × rank; dtype u8; bytes u32; values. Then number of aliases u32; each alias: two strings, itself and a
name. A string is its length u16, with the zero at its end, and its bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch

_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def read_variables(file: Path) -> dict[str, torch.Tensor]:
    """All variables and aliases, floating-point ones in float32.

    Raises:
        ValueError: a dtype that this does not read.
    """
    reader = _Reader(file.read_bytes())
    reader.number("I")
    reader.string()
    reader.number("I")
    found: dict[str, torch.Tensor] = {}
    for _ in range(reader.number("I")):
        name = reader.string()
        shape = [reader.number("I") for _ in range(reader.number("B"))]
        dtype = reader.number("B")
        if dtype not in _DTYPES:
            raise ValueError(f"ctranslate2: {name}: got dtype {dtype}, expected one of {sorted(_DTYPES)}")
        values = torch.from_numpy(np.frombuffer(reader.bytes(reader.number("I")), _DTYPES[dtype]).copy())
        found[name] = (values.float() if values.is_floating_point() else values).reshape(shape)
    for _ in range(reader.number("I")):
        alias = reader.string()
        found[alias] = found[reader.string()]
    return found


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def bytes(self, n: int) -> bytes:
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, kind: str) -> int:
        (value,) = struct.unpack("<" + kind, self.bytes(struct.calcsize("<" + kind)))
        return int(value)

    def string(self) -> str:
        return self.bytes(self.number("H"))[:-1].decode()
