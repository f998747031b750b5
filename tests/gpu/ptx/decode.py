"""A kernel to functions, once for all blocks of all launches; all of it is checked, also what never runs."""

from __future__ import annotations

from . import isa  # noqa: F401  registers the instructions
from .errors import UnknownPtx
from .flow import basic_blocks, ends_block
from .isa.warp import bar_warp
from .machine import Decoded, Execute, Machine
from .operands import guard
from .program import Immediate, Instruction, Kernel, Modifiers
from .registry import DECODERS
from .types import Mask
from .watch import of_products, watched


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


def _decode(ins: Instruction, kernel: Kernel, held: frozenset[int]) -> Execute:
    if ins.opcode in ("bar", "barrier"):
        mods = Modifiers(ins)
        mods.sequence("warp", "sync")
        mods.end()
        (members,) = ins.expect(1)
        return _guarded(bar_warp(ins, members), ins)
    decoder = DECODERS.get(ins.opcode)
    if decoder is None:
        raise ins.unknown(f"instruction {ins.opcode} is not modelled")
    return _guarded(watched(decoder(ins, kernel), ins, held), ins)


def decode(kernel: Kernel) -> Decoded:
    """Raises `UnknownPtx` for the first word that is not modelled, with its line."""
    if not kernel.instructions:
        raise UnknownPtx(f"kernel {kernel.name}: no instructions")
    blocks = basic_blocks(kernel)
    held = of_products(kernel)
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
                here.append((_decode(ins, kernel, held), i))
        steps.append(here)
        guards.append(ending)
    return Decoded(kernel, blocks, steps, guards, any(ins.opcode == "wgmma" for ins in kernel.instructions))
