"""Opcodes and who decodes them."""

from __future__ import annotations

from collections.abc import Callable

from .machine import Execute
from .program import Instruction, Kernel

#: Takes an instruction and its kernel, checks every word of it, and gives the function that runs it.
Decoder = Callable[[Instruction, Kernel], Execute]

DECODERS: dict[str, Decoder] = {}


def opcode(*names: str) -> Callable[[Decoder], Decoder]:
    def register(decoder: Decoder) -> Decoder:
        for name in names:
            if name in DECODERS:
                raise ValueError(f"opcode {name} has two decoders")
            DECODERS[name] = decoder
        return decoder

    return register
