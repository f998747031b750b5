"""A kernel to functions, once for all blocks of all launches; all of it is checked, also what never runs."""

from __future__ import annotations

import numpy as np

from . import isa  # noqa: F401  registers the instructions
from .errors import UnknownPtx
from .flow import basic_blocks, ends_block
from .isa.warp import bar_warp
from .machine import Decoded, Execute, Machine
from .operands import guard
from .program import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Modifiers,
    Not,
    Operand,
    Pair,
    Register,
    Vector,
)
from .registry import DECODERS
from .types import Mask


def _end_of_block(ins: Instruction) -> None:
    """Checks an instruction that `machine` runs itself."""
    mods = Modifiers(ins)
    if ins.opcode == "bra":
        mods.flag("uni")
        ins.expect(1)
    elif ins.opcode in ("ret", "exit"):
        ins.expect(0)
    elif ins.opcode in ("bar", "barrier"):
        mods.sequence("sync")
        mods.flag("aligned")
        (number,) = ins.expect(1)
        if not isinstance(number, Immediate) or number.value:
            raise ins.unknown("only barrier 0 of all threads is modelled")
        if ins.guard is not None:
            raise ins.unknown("a barrier with a guard is not modelled")
    else:
        raise ins.unknown(f"{ins.opcode} is not modelled")
    mods.end()


def _guarded(execute: Execute, ins: Instruction) -> Execute:
    condition = guard(ins)
    if condition is None:
        return execute

    def conditionally(m: Machine, mask: Mask) -> None:
        taking = condition(m) if mask is None else condition(m) & mask
        if taking.all():
            execute(m, None)
        elif taking.any():
            execute(m, taking)

    return conditionally


def _registers(operand: Operand) -> list[Register]:
    """All that an operand names."""
    if isinstance(operand, Register):
        return [operand]
    if isinstance(operand, Vector):
        return [r for item in operand.items for r in _registers(item)]
    if isinstance(operand, Pair):
        return _registers(operand.first) + _registers(operand.second)
    if isinstance(operand, Address):
        return _registers(operand.base)
    return [operand.operand] if isinstance(operand, Not) else []


def _of_products(kernel: Kernel) -> frozenset[int]:
    """Registers that products of warpgroups hold, and those from which a mov copies into one of them."""
    products = [ins for ins in kernel.instructions if ins.opcode == "wgmma" and ins.modifiers[:1] == ("mma_async",)]
    found = {r.index for ins in products for o in ins.operands[:2] if isinstance(o, Vector) for r in _registers(o)}
    copies = [(ins.operands[0].index, ins.operands[1].index) for ins in kernel.instructions if _is_copy(ins)]  # type: ignore[union-attr]
    size = -1
    while products and size != len(found):
        size = len(found)
        found |= {origin for to, origin in copies if to in found}
    return frozenset(found)


def _is_copy(ins: Instruction) -> bool:
    return ins.opcode == "mov" and len(ins.operands) == 2 and all(isinstance(o, Register) for o in ins.operands)


def _watched(execute: Execute, ins: Instruction, of_products: frozenset[int]) -> Execute:
    """`execute`, which tells what it does to registers of products."""
    used = [r.index for o in ins.operands for r in _registers(o)]
    kept = frozenset(used) & of_products
    if not kept or ins.opcode == "wgmma":
        return execute
    first = ins.operands[0]
    constant = ins.opcode == "mov" and isinstance(first, Register) and isinstance(ins.operands[1], Immediate)
    copy = constant or _is_copy(ins)
    origin = used[1] if copy and not constant else None

    def telling(m: Machine, mask: Mask) -> None:
        groups = range(len(m.warpgroups.state))
        if mask is not None:
            groups = sorted(set((np.flatnonzero(mask) // 128).tolist()))  # type: ignore[assignment]
        if copy:
            m.warpgroups.copy(groups, used[0], origin)
        else:
            m.warpgroups.touch(groups, kept)
        execute(m, mask)

    return telling


def _decode(ins: Instruction, kernel: Kernel, of_products: frozenset[int]) -> Execute:
    if ins.opcode in ("bar", "barrier"):
        mods = Modifiers(ins)
        mods.sequence("warp", "sync")
        mods.end()
        (members,) = ins.expect(1)
        return _guarded(bar_warp(ins, members), ins)
    decoder = DECODERS.get(ins.opcode)
    if decoder is None:
        raise ins.unknown(f"instruction {ins.opcode} is not modelled")
    return _guarded(_watched(decoder(ins, kernel), ins, of_products), ins)


def decode(kernel: Kernel) -> Decoded:
    """Raises `UnknownPtx` for the first word that is not modelled, with its line."""
    if not kernel.instructions:
        raise UnknownPtx(f"kernel {kernel.name}: no instructions")
    blocks = basic_blocks(kernel)
    of_products = _of_products(kernel)
    steps, guards = [], []
    for block in blocks:
        here: list[tuple[Execute, int]] = []
        ending = None
        for i in range(block.start, block.end):
            ins = kernel.instructions[i]
            if ends_block(ins):
                _end_of_block(ins)
                ending = guard(ins)
            else:
                here.append((_decode(ins, kernel, of_products), i))
        steps.append(here)
        guards.append(ending)
    return Decoded(kernel, blocks, steps, guards, any(ins.opcode == "wgmma" for ins in kernel.instructions))
