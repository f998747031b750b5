"""fma, and the functions: ex2, lg2, rcp, sqrt, rsqrt, tanh.

ISA 9.7.3, 9.7.4. The .approx forms are taken as rounded correctly. The hardware's differ: ex2 by 2 units in the last
place, lg2 by 2^-22 absolute, rcp by 1 unit, rsqrt by 2^-22.9 relative, tanh by 2^-11 relative (ISA 8.x), so a kernel
that needs more than those bounds allow is not found out here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..machine import Execute
from ..program import Instruction, Kernel, Modifiers
from ..registry import opcode
from ..rounding import fma_f16, fma_f32, fma_f32_directed, narrow_bf16_from_f64, round_to_odd_sum, widen_bf16
from ..types import F32, Array
from .common import PACKED, both_halves, flushing, pointwise, saturating, scalar_type


def _fma_bf16(a: Array, b: Array, c: Array) -> Array:
    a, b, c = (widen_bf16(x).astype(np.float64) for x in (a, b, c))
    return narrow_bf16_from_f64(round_to_odd_sum(*np.broadcast_arrays(a * b, c)))


_FMA: dict[str, Callable[..., Array]] = {"f32": fma_f32, "f16": fma_f16, "bf16": _fma_bf16}


@opcode("fma")
def _fma(ins: Instruction, kernel: Kernel) -> Execute:
    ins.expect(4)
    mods = Modifiers(ins)
    name = mods.last()
    rounding = mods.one_of("rn", "rm", "rp", "rz") if name == "f32" else mods.one_of("rn")
    if name == "f32":
        ftz, sat = mods.flag("ftz"), mods.flag("sat")
        mods.end()
        compute = fma_f32 if rounding == "rn" else fma_f32_directed(rounding)
        return pointwise(ins, F32, saturating(flushing(compute, ftz), sat))
    element = PACKED.get(name) or scalar_type(ins, name)
    ftz = name == "f32x2" and mods.flag("ftz")
    mods.end()
    if element.name not in _FMA:
        raise ins.unknown(f"type .{name} is not modelled here")
    compute = flushing(_FMA[element.name], ftz)
    return both_halves(ins, element, compute) if name in PACKED else pointwise(ins, element, compute)


def _in_f64(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


#: name -> function, and the modifiers of which one has to be there
_FUNCTIONS: dict[str, tuple[Callable[[Array], Array], tuple[str, ...]]] = {
    "ex2": (_in_f64(np.exp2), ("approx",)),
    "lg2": (_in_f64(np.log2), ("approx",)),
    "rcp": (lambda x: np.float32(1) / x, ("rn", "approx")),
    "sqrt": (np.sqrt, ("rn", "approx")),
    "rsqrt": (_in_f64(lambda x: 1 / np.sqrt(x)), ("approx",)),
    "tanh": (_in_f64(np.tanh), ("approx",)),
}


@opcode(*_FUNCTIONS)
def _function(ins: Instruction, kernel: Kernel) -> Execute:
    ins.expect(2)
    mods = Modifiers(ins)
    if mods.last() != "f32":
        raise ins.unknown("type: only .f32 is modelled here")
    compute, forms = _FUNCTIONS[ins.opcode]
    mods.one_of(*forms)
    ftz = ins.opcode != "tanh" and mods.flag("ftz")
    mods.end()
    return pointwise(ins, F32, flushing(compute, ftz))


@opcode("copysign")
def _copysign(ins: Instruction, kernel: Kernel) -> Execute:
    """The sign of a on the value of b."""
    ins.expect(3)
    mods = Modifiers(ins)
    mods.sequence("f32")
    mods.end()
    return pointwise(ins, F32, lambda a, b: np.copysign(b, a))
