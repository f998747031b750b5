"""What the parser makes of a kernel: operands, instructions, parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import UnknownPtx
from .types import PtxType


@dataclass(frozen=True)
class Register:
    index: int
    type: PtxType
    name: str


@dataclass(frozen=True)
class Special:
    """%tid.x and the like."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """value: an integer, or the bits of a float if `float_bits` is 32 or 64 rather than 0. decimal: the float was
    written in decimals and takes the type it is used with."""

    value: int
    float_bits: int = 0
    decimal: bool = False


@dataclass(frozen=True)
class Symbol:
    """A name of a variable or a label."""

    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Pair:
    """d|p: a value and a predicate."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Not:
    """!p"""

    operand: Register


#: `_`, a result that nobody wants.
@dataclass(frozen=True)
class Sink:
    pass


Operand = Register | Special | Immediate | Symbol | Vector | Address | Pair | Not | Sink


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None = None
    guard_negated: bool = False

    def where(self) -> str:
        return f"line {self.line}: {self.text}"

    def unknown(self, what: str) -> UnknownPtx:
        return UnknownPtx(f"{what}; {self.where()}")

    def expect(self, *counts: int) -> tuple[Operand, ...]:
        """The operands, if there are as many as one of `counts`."""
        if len(self.operands) not in counts:
            expected = " or ".join(map(str, counts))
            raise self.unknown(f"operands: got {len(self.operands)}, expected {expected}")
        return self.operands


@dataclass(frozen=True)
class Parameter:
    """size: in bytes. type: of a scalar; None for a structure. offset: where it lies among a kernel's parameters."""

    name: str
    type: PtxType | None
    size: int
    offset: int


@dataclass
class Kernel:
    """shared: offset of each variable in shared memory. dynamic: where the launch's own shared memory begins."""

    name: str
    parameters: list[Parameter]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    register_types: list[PtxType] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)
    dynamic: int = 0
    target: str = ""


class Modifiers:
    """The words after an opcode, each of which a decoder has to take: what is left over is an error."""

    def __init__(self, ins: Instruction) -> None:
        self.ins = ins
        self.left = list(ins.modifiers)

    def flag(self, *names: str) -> bool:
        """Whether one of `names` comes next or later; it is taken."""
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return True
        return False

    def one_of(self, *names: str) -> str:
        found = self.any_of(*names)
        if found is None:
            raise self.ins.unknown(f"modifier: expected one of {', '.join(names)}")
        return found

    def any_of(self, *names: str) -> str | None:
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return name
        return None

    def sequence(self, *names: str) -> None:
        for name in names:
            if not self.left or self.left[0] != name:
                raise self.ins.unknown(f"modifier: expected .{name} next, got {self.left[:1]}")
            self.left.pop(0)

    def last(self) -> str:
        if not self.left:
            raise self.ins.unknown("type: none")
        return self.left.pop()

    def end(self) -> None:
        if self.left:
            raise self.ins.unknown(f"modifier .{self.left[0]} is not modelled here")
