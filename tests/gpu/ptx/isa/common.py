"""What several decoders share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..machine import Execute, Machine
from ..operands import sink, source
from ..program import Instruction, Modifiers, Operand
from ..rounding import flush, narrow_bf16, widen_bf16
from ..types import TYPES, Array, Mask, PtxType

#: Two floats in one register: the type of each. (.f32x2: sm_100 and later)
PACKED = {"f16x2": TYPES["f16"], "bf16x2": TYPES["bf16"], "f32x2": TYPES["f32"]}


def scalar_type(ins: Instruction, name: str) -> PtxType:
    if name not in TYPES:
        raise ins.unknown(f"type .{name} is not modelled here")
    return TYPES[name]


def last_type(ins: Instruction, modifiers: Modifiers, kinds: str = "sub") -> PtxType:
    """The last modifier, a scalar type of one of `kinds`: s, u, b (integers), f (float and bfloat16)."""
    type_ = scalar_type(ins, modifiers.last())
    if (type_.kind[0] not in kinds and not (type_.kind == "bf" and "f" in kinds)) or (
        type_.kind == "bf" and "f" not in kinds
    ):
        raise ins.unknown(f"type .{type_.name} is not one of this instruction")
    return type_


def pointwise(
    ins: Instruction, type_: PtxType, compute: Callable[..., Array], operands: tuple[Operand, ...] | None = None
) -> Execute:
    """d = compute(a, b, …), all of one type."""
    operands = ins.operands if operands is None else operands
    write = sink(ins, operands[0], type_)
    reads = [source(ins, o, type_) for o in operands[1:]]
    if len(reads) == 1:
        (a,) = reads
        return lambda m, mask: write(m, compute(a(m)), mask)
    if len(reads) == 2:
        a, b = reads
        return lambda m, mask: write(m, compute(a(m), b(m)), mask)
    if len(reads) == 3:
        a, b, c = reads
        return lambda m, mask: write(m, compute(a(m), b(m), c(m)), mask)
    raise ins.unknown("operands: too many")


def widened(type_: PtxType, compute: Callable[..., Array]) -> Callable[..., Array]:
    """For 16-bit floats: `compute` in float32, rounded to the type. Sums and products of two are then rounded as if
    once: 24 bits are at least twice 11, and 2 more."""
    if type_.kind == "bf":
        return lambda *xs: narrow_bf16(compute(*(widen_bf16(x) for x in xs)))
    if type_.bits == 16:
        return lambda *xs: compute(*(x.astype(np.float32) for x in xs)).astype(np.float16)
    return compute


def both_halves(ins: Instruction, element: PtxType, compute: Callable[..., Array]) -> Execute:
    """`pointwise` on registers of two elements; `compute` takes and gives arrays of `element.dtype`."""
    container = TYPES[f"b{2 * element.bits}"]

    def both(*xs: Array) -> Array:
        halves = [np.atleast_1d(x).view(element.dtype).reshape(-1, 2) for x in xs]
        return np.ascontiguousarray(compute(*halves)).view(container.dtype).reshape(-1)

    return pointwise(ins, container, both)


def flushing(compute: Callable[..., Array], ftz: bool) -> Callable[..., Array]:
    """float32 with subnormal inputs and results as zero."""
    if not ftz:
        return compute
    return lambda *xs: flush(compute(*(flush(x) for x in xs)))


def saturating(compute: Callable[..., Array], sat: bool) -> Callable[..., Array]:
    """Results to [0, 1], NaN to 0."""
    if not sat:
        return compute
    one = np.float32(1)

    def clamp(*xs: Array) -> Any:
        y = compute(*xs)
        return np.where(y > 0, np.minimum(y, one), np.float32(0))

    return clamp


def no_operation(m: Machine, mask: Mask) -> None:
    """Of a fence or a hint: all is done in one order anyway."""
