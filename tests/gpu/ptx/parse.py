"""PTX text to `Kernel`s: statements, scopes of registers, variables in shared memory, operands.

ISA: PTX 8.x, chapters 4 (syntax), 5 (state spaces, types, variables) and 7.2 (operands).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from .errors import UnknownPtx
from .program import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Not,
    Operand,
    Pair,
    Parameter,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)  # fmt: skip
from .types import TYPES

_SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%(laneid|warpid|nwarpid|lanemask_(eq|lt|le|gt|ge)|smid|nsmid)\Z"
)
#: Directives within a body or before it that say nothing about what is computed.
_IGNORED = (".loc", ".file", ".pragma", ".maxntid", ".reqntid", ".minnctapersm", ".maxnreg", ".noreturn")
_NAME = r"[A-Za-z_$%][\w$.]*"


def _without_comments(text: str) -> str:
    """Comments become spaces, so that lines keep their numbers."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)


def _statements(body: str, line: int) -> Iterator[tuple[int, str]]:
    """(line, statement): braces of scopes and labels are statements of their own, vectors stay whole."""
    current: list[str] = []
    start = line
    depth = 0
    for i, c in enumerate(body):
        if c == "\n":
            line += 1
        text = "".join(current).strip()
        if not text:
            start = line
        if c == "{" and not text:
            yield line, "{"
            current = []
        elif c == "}" and depth == 0:
            if text:
                raise UnknownPtx(f"a statement without ; before a brace; line {start}: {text}")
            yield line, "}"
            current = []
        elif c == ";":
            yield start, " ".join(text.split())
            current = []
        elif c == ":" and body[i + 1 : i + 2] != ":" and re.fullmatch(_NAME, text):
            yield start, text + ":"
            current = []
        elif c == "\n" and text.startswith((".loc", ".file", ".section")):
            current = []
        else:
            depth += (c in "{[(") - (c in "}])")
            current.append(c)
    if "".join(current).strip():
        raise UnknownPtx(f"a statement without ;; line {start}: {''.join(current).strip()}")


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += c
    if current.strip() or parts:
        parts.append(current.strip())
    return parts


def _integer(text: str) -> int | None:
    m = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text)
    if not m:
        return None
    digits = m.group(2)
    octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    return int(digits, 8 if octal else 0) * (-1 if m.group(1) else 1)


class _Body:
    """A kernel's statements in order, with the registers in scope."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[dict[str, Register]] = [{}]
        self.shared_end = 0

    def statement(self, line: int, text: str) -> None:
        if text == "{":
            self.scopes.append({})
        elif text == "}":
            self.scopes.pop()
            if not self.scopes:
                raise UnknownPtx(f"a brace too many; line {line}")
        elif text.endswith(":"):
            if text[:-1] in self.kernel.labels:
                raise UnknownPtx(f"label {text[:-1]} twice; line {line}")
            self.kernel.labels[text[:-1]] = len(self.kernel.instructions)
        elif text.startswith(".reg"):
            self._registers(line, text)
        elif text.startswith(".shared"):
            self.shared(line, text)
        elif text.startswith("."):
            if text.split()[0] not in _IGNORED:
                raise UnknownPtx(f"directive is not modelled; line {line}: {text}")
        elif text:
            self.kernel.instructions.append(self._instruction(line, text))

    def _registers(self, line: int, text: str) -> None:
        m = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text)
        if not m or m.group(1) not in TYPES:
            raise UnknownPtx(f"register type is not modelled; line {line}: {text}")
        for name in _split(m.group(2)):
            many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            names = [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [name]
            for n in names:
                register = Register(len(self.kernel.register_types), TYPES[m.group(1)], n)
                self.kernel.register_types.append(register.type)
                self.scopes[-1][n] = register

    def shared(self, line: int, text: str) -> None:
        m = re.fullmatch(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)((?:\[\d*\])*)", text)
        if not m or m.group(2) not in TYPES:
            raise UnknownPtx(f"shared variable is not modelled; line {line}: {text}")
        size = TYPES[m.group(2)].bits // 8
        align = int(m.group(1) or size)
        dims = re.findall(r"\[(\d*)\]", m.group(4))
        if "" in dims:
            self.kernel.shared[m.group(3)] = -align  # placed behind the others once they are known
            return
        for dim in dims:
            size *= int(dim)
        self.shared_end = -(-self.shared_end // align) * align
        self.kernel.shared[m.group(3)] = self.shared_end
        self.shared_end += size

    def _instruction(self, line: int, text: str) -> Instruction:
        m = re.fullmatch(r"(?:@(!?)(\S+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
        if not m:
            raise UnknownPtx(f"not an instruction; line {line}: {text}")
        guard = None
        if m.group(2):
            operand = self._operand(m.group(2), line, text)
            if not isinstance(operand, Register) or operand.type.kind != "p":
                raise UnknownPtx(f"guard {m.group(2)} is no predicate; line {line}: {text}")
            guard = operand
        opcode, *modifiers = m.group(3).split(".")
        operands = tuple(self._operand(o, line, text) for o in _split(m.group(4)))
        return Instruction(line, text, opcode, tuple(modifiers), operands, guard, bool(m.group(1)))

    def _operand(self, o: str, line: int, text: str) -> Operand:
        if o.startswith("{") and o.endswith("}"):
            return Vector(tuple(self._operand(x, line, text) for x in _split(o[1:-1])))
        if o.startswith("[") and o.endswith("]"):
            return self._address(o[1:-1], line, text)
        if "|" in o:
            first, second = (self._operand(x.strip(), line, text) for x in o.split("|"))
            return Pair(first, second)
        if o == "_":
            return Sink()
        if o.startswith("!"):
            inner = self._operand(o[1:].strip(), line, text)
            if isinstance(inner, Register):
                return Not(inner)
        for scope in reversed(self.scopes):
            if o in scope:
                return scope[o]
        if _SPECIAL.fullmatch(o):
            return Special(o[1:])
        if o == "WARP_SZ":
            return Immediate(32)
        value = _integer(o)
        if value is not None:
            return Immediate(value)
        m = re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", o)
        if m:
            return Immediate(int(m.group(1) or m.group(2), 16), 32 if m.group(1) else 64)
        if re.fullmatch(r"-?\d+\.\d*(?:[eE][+-]?\d+)?", o):
            return Immediate(int.from_bytes(struct.pack("<d", float(o)), "little"), 64, True)
        if re.fullmatch(r"[A-Za-z_$][\w$]*", o):
            return Symbol(o)
        raise UnknownPtx(f"operand {o!r} is not modelled; line {line}: {text}")

    def _address(self, inside: str, line: int, text: str) -> Address:
        m = re.fullmatch(r"\s*([^\s+]+?)\s*(?:\+\s*(-?\w+)|(-\d+))?\s*", inside)
        offset = _integer(m.group(2) or m.group(3) or "0") if m else None
        if not m or offset is None:
            raise UnknownPtx(f"address [{inside}] is not modelled; line {line}: {text}")
        base = self._operand(m.group(1), line, text)
        if not isinstance(base, Register | Symbol | Immediate):
            raise UnknownPtx(f"address [{inside}] is not modelled; line {line}: {text}")
        return Address(base, offset)

    def close(self) -> None:
        # dynamic shared memory begins behind the static variables; 1024 is the largest alignment a swizzle asks for
        self.kernel.dynamic = -(-self.shared_end // 1024) * 1024
        for name, offset in self.kernel.shared.items():
            if offset < 0:
                self.kernel.shared[name] = self.kernel.dynamic


def _parameters(text: str, name: str) -> list[Parameter]:
    out: list[Parameter] = []
    for part in _split(text):
        m = re.fullmatch(
            r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+)?(?:\.global\s+)?(?:\.align\s+\d+\s+)?([\w$]+)"
            r"(?:\[(\d+)\])?",
            part,
        )
        if not m or m.group(1) not in TYPES:
            raise UnknownPtx(f"kernel {name}: parameter is not modelled: {part}")
        type_ = TYPES[m.group(1)]
        size = int(m.group(3) or 1) * type_.bits // 8
        # 16: no alignment of a parameter is more
        offset = -(-(out[-1].offset + out[-1].size) // 16) * 16 if out else 0
        out.append(Parameter(m.group(2), None if m.group(3) else type_, size, offset))
    return out


def parse(text: str) -> dict[str, Kernel]:
    """The kernels (`.entry`) of a PTX module, by name.

    Functions (`.func`) and variables in the global or constant space are not modelled: they raise where a kernel names
    them.
    """
    text = _without_comments(text)
    target = re.search(r"\.target\s+(\w+)", text)
    found = []
    outside, done = "", 0
    for m in re.finditer(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{};]*)\{", text, flags=re.S):
        end, depth = m.end(), 1
        while depth:
            if end >= len(text):
                raise UnknownPtx(f"kernel {m.group(1)}: no closing brace")
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        found.append((m, end - 1))
        outside, done = outside + text[done : m.start()], end
    outside += text[done:]
    kernels: dict[str, Kernel] = {}
    for m, end in found:
        kernel = Kernel(m.group(1), _parameters(m.group(2) or "", m.group(1)))
        kernel.target = target.group(1) if target else ""
        body = _Body(kernel)
        for declaration in re.findall(r"(\.shared\s[^;]*);", outside):
            body.shared(0, " ".join(declaration.split()))
        for line, statement in _statements(text[m.end() : end], text[: m.end()].count("\n") + 1):
            body.statement(line, statement)
        body.close()
        kernels[kernel.name] = kernel
    if not kernels:
        raise UnknownPtx("no .entry in the text")
    return kernels
