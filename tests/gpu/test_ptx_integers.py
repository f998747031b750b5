"""The emulator's integer instructions against Python's integers, with the formulas of the ISA."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ptx import InvalidOperand
from ptx_samples import evaluate

EDGES = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1]


def samples(dtype: type, seed: int, n: int = 256) -> np.ndarray:
    info = np.iinfo(dtype)
    rng = np.random.default_rng(seed)
    x = rng.integers(info.min, info.max, n, dtype, endpoint=True)
    edges = np.array([e & (1 << info.bits) - 1 for e in EDGES], np.uint64).astype(f"u{info.bits // 8}").view(dtype)
    x[: edges.size] = rng.permutation(edges)
    return x


def wrap(value: int, dtype: np.dtype | type) -> int:
    bits = 8 * np.dtype(dtype).itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if np.dtype(dtype).kind == "i" and value >> bits - 1 else value


def check(instruction: str, types: list[type], result: type, expected: Callable[..., int]) -> None:
    inputs = [samples(t, i) for i, t in enumerate(types)]
    got = evaluate(instruction, inputs, result)
    for i, values in enumerate(zip(*(x.tolist() for x in inputs), strict=True)):
        assert int(got[i]) == wrap(expected(*values), result), (instruction, values)


I16, I32, I64, U16, U32, U64 = np.int16, np.int32, np.int64, np.uint16, np.uint32, np.uint64
TYPES = {"s16": I16, "s32": I32, "s64": I64, "u16": U16, "u32": U32, "u64": U64}


@pytest.mark.parametrize("name", TYPES)
def test_sums_products_and_extremes(name):
    t = TYPES[name]
    bits = np.dtype(t).itemsize * 8
    check(f"add.{name} d, a, b;", [t, t], t, lambda a, b: a + b)
    check(f"sub.{name} d, a, b;", [t, t], t, lambda a, b: a - b)
    check(f"mul.lo.{name} d, a, b;", [t, t], t, lambda a, b: a * b)
    check(f"mul.hi.{name} d, a, b;", [t, t], t, lambda a, b: a * b >> bits)
    check(f"mad.lo.{name} d, a, b, c;", [t, t, t], t, lambda a, b, c: a * b + c)
    check(f"min.{name} d, a, b;", [t, t], t, min)
    check(f"max.{name} d, a, b;", [t, t], t, max)


@pytest.mark.parametrize(("name", "wide"), [("s16", I32), ("s32", I64), ("u16", U32), ("u32", U64)])
def test_wide_products(name, wide):
    t = TYPES[name]
    check(f"mul.wide.{name} d, a, b;", [t, t], wide, lambda a, b: a * b)
    check(f"mad.wide.{name} d, a, b, c;", [t, t, wide], wide, lambda a, b, c: a * b + c)


@pytest.mark.parametrize("name", TYPES)
def test_division_goes_towards_zero(name):
    t = TYPES[name]

    def quotient(a: int, b: int) -> int:
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)

    a, b = samples(t, 0), samples(t, 1)
    b[b == 0] = 3
    for instruction, expected in (("div", quotient), ("rem", lambda x, y: x - quotient(x, y) * y)):
        got = evaluate(f"{instruction}.{name} d, a, b;", [a, b], t)
        assert got.tolist() == [wrap(expected(x, y), t) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    with pytest.raises(InvalidOperand, match="zero"):
        evaluate(f"div.{name} d, a, b;", [a, b * 0], t)


@pytest.mark.parametrize("name", ["s16", "s32", "s64"])
def test_signs(name):
    t = TYPES[name]
    check(f"neg.{name} d, a;", [t], t, lambda a: -a)
    check(f"abs.{name} d, a;", [t], t, abs)


@pytest.mark.parametrize(("name", "t"), [("b16", U16), ("b32", U32), ("b64", U64)])
def test_bits(name, t):
    check(f"and.{name} d, a, b;", [t, t], t, lambda a, b: a & b)
    check(f"or.{name} d, a, b;", [t, t], t, lambda a, b: a | b)
    check(f"xor.{name} d, a, b;", [t, t], t, lambda a, b: a ^ b)
    check(f"not.{name} d, a;", [t], t, lambda a: ~a)
    bits = np.dtype(t).itemsize * 8
    check(f"shl.{name} d, a, b;", [t, U32], t, lambda a, b: a << b if b < bits else 0)


@pytest.mark.parametrize("name", TYPES)
def test_shifts_to_the_right(name):
    t = TYPES[name]
    check(f"shr.{name} d, a, b;", [t, U32], t, lambda a, b: a >> min(b, 80))


def test_funnel_shifts():
    t = [U32, U32, U32]
    check("shf.l.wrap.b32 d, a, b, c;", t, U32, lambda lo, hi, n: (hi << 32 | lo) << (n & 31) >> 32)
    check("shf.l.clamp.b32 d, a, b, c;", t, U32, lambda lo, hi, n: (hi << 32 | lo) << min(n, 32) >> 32)
    check("shf.r.wrap.b32 d, a, b, c;", t, U32, lambda lo, hi, n: (hi << 32 | lo) >> (n & 31))
    check("shf.r.clamp.b32 d, a, b, c;", t, U32, lambda lo, hi, n: (hi << 32 | lo) >> min(n, 32))


def test_lop3():
    table = 0b01101010

    def expected(a: int, b: int, c: int) -> int:
        bit = lambda i: table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1  # noqa: E731
        return sum(bit(i) << i for i in range(32))

    check(f"lop3.b32 d, a, b, c, {table:#x};", [U32] * 3, U32, expected)
    # the usual ones: 0xe8 is the majority, 0x96 the parity
    check("lop3.b32 d, a, b, c, 0xe8;", [U32] * 3, U32, lambda a, b, c: a & b | a & c | b & c)
    check("lop3.b32 d, a, b, c, 0x96;", [U32] * 3, U32, lambda a, b, c: a ^ b ^ c)


def permuted(a: int, b: int, selector: int) -> int:
    data = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    out = []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = data[nibble & 7]
        out.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(out), "little")


@pytest.mark.parametrize("selector", ["0x3210", "0x5410", "0x7632", "0x3340U", "0xB7A0", "0x8888"])
def test_prmt_with_a_fixed_selector(selector):
    check(f"prmt.b32 d, a, b, {selector};", [U32, U32], U32, lambda a, b: permuted(a, b, int(selector.rstrip("U"), 16)))


def test_prmt():
    check("prmt.b32 d, a, b, c;", [U32] * 3, U32, permuted)


def extracted(a: int, b: int, c: int, bits: int, signed: bool) -> int:
    """The ISA's pseudocode of bfe."""
    pos, length, msb = b & 0xFF, c & 0xFF, bits - 1
    a &= (1 << bits) - 1
    bit = lambda i: a >> i & 1  # noqa: E731
    sign = 0 if not signed or length == 0 else bit(min(pos + length - 1, msb))
    return sum((bit(pos + i) if i < length and pos + i <= msb else sign) << i for i in range(bits))


@pytest.mark.parametrize("name", ["u32", "s32", "u64", "s64"])
def test_bfe(name):
    t, bits = TYPES[name], int(name[1:])
    check(f"bfe.{name} d, a, b, c;", [t, U32, U32], t, lambda a, b, c: extracted(a, b, c, bits, name[0] == "s"))
    for pos, length in ((4, 1), (0, 8), (28, 8), (31, 1), (5, 0)):
        check(
            f"bfe.{name} d, a, {pos}, {length};", [t], t,
            lambda a, p=pos, n=length: extracted(a, p, n, bits, name[0] == "s"),
        )  # fmt: skip


@pytest.mark.parametrize(("name", "t"), [("b32", U32), ("b64", U64)])
def test_bfi(name, t):
    bits = int(name[1:])

    def inserted(a: int, b: int, c: int, d: int) -> int:
        pos, length = c & 0xFF, d & 0xFF
        for i in range(length):
            if pos + i < bits:
                b = b & ~(1 << pos + i) | (a >> i & 1 if i < bits else 0) << pos + i
        return b

    check(f"bfi.{name} d, a, b, c, e;", [t, t, U32, U32], t, inserted)
    check(f"bfi.{name} d, a, b, 7, 9;", [t, t], t, lambda a, b: inserted(a, b, 7, 9))


@pytest.mark.parametrize(("name", "t"), [("b32", U32), ("b64", U64)])
def test_counts(name, t):
    bits = int(name[1:])
    check(f"popc.{name} d, a;", [t], U32, lambda a: a.bit_count())
    check(f"clz.{name} d, a;", [t], U32, lambda a: bits - a.bit_length())
    check(f"brev.{name} d, a;", [t], t, lambda a: int(f"{a:0{bits}b}"[::-1], 2))


@pytest.mark.parametrize(("a_type", "b_type"), [("s32", "s32"), ("u32", "u32"), ("s32", "u32"), ("u32", "s32")])
def test_dp4a(a_type, b_type):
    def parts(x: int, name: str) -> list[int]:
        return [wrap(x >> 8 * i & 255, np.int8 if name == "s32" else np.uint8) for i in range(4)]

    result = U32 if (a_type, b_type) == ("u32", "u32") else I32
    check(
        f"dp4a.{a_type}.{b_type} d, a, b, c;", [U32, U32, result], result,
        lambda a, b, c: sum(x * y for x, y in zip(parts(a, a_type), parts(b, b_type), strict=True)) + c,
    )  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_comparisons(name):
    t = TYPES[name]
    a, b = samples(t, 0), samples(t, 1)
    b[::3] = a[::3]
    names = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    if name[0] == "u":
        names |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
    for comparison, sign in names.items():
        got = evaluate(f"setp.{comparison}.{name} d, a, b;", [a, b], bool)
        assert got.tolist() == [eval(f"x {sign} y") for x, y in zip(a.tolist(), b.tolist(), strict=True)]


def test_comparison_joined_with_a_predicate():
    a, b, c = samples(I32, 0), samples(I32, 1), np.arange(256) % 3 == 0
    for join, f in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        assert (evaluate(f"setp.lt.{join}.s32 d, a, b, c;", [a, b, c], bool) == f(a < b, c)).all()
        assert (evaluate(f"setp.lt.{join}.s32 d, a, b, !c;", [a, b, c], bool) == f(a < b, ~c)).all()
    both = evaluate(".reg .pred q; setp.lt.and.s32 q|d, a, b, c;", [a, b, c], bool)
    assert (both == (~(a < b) & c)).all()


def test_predicates_and_selection():
    p, q = np.arange(256) % 2 == 0, np.arange(256) % 3 == 0
    assert (evaluate("and.pred d, a, b;", [p, q], bool) == (p & q)).all()
    assert (evaluate("xor.pred d, a, b;", [p, q], bool) == (p ^ q)).all()
    assert (evaluate("not.pred d, a;", [p], bool) == ~p).all()
    assert evaluate("mov.pred d, -1;", [p], bool).all()
    x, y = samples(U16, 0), samples(U16, 1)
    assert (evaluate("selp.b16 d, a, b, c;", [x, y, q], U16) == np.where(q, x, y)).all()
    assert (evaluate("mov.b16 d, b; @a mov.b16 d, 7; @!a mov.b16 d, 9;", [p, x], U16) == np.where(p, 7, 9)).all()


@pytest.mark.parametrize("to", ["s8", "u8", *TYPES])
@pytest.mark.parametrize("origin", TYPES)
def test_conversions(origin, to):
    t = TYPES[origin]
    narrow = {"s8": np.int8, "u8": np.uint8} | TYPES
    # 8 bits lie in a register of 16, extended by their sign
    held = {"s8": I16, "u8": U16} | TYPES
    info = np.iinfo(narrow[to])
    check(f"cvt.{to}.{origin} d, a;", [t], held[to], lambda a: wrap(a, narrow[to]))
    check(f"cvt.sat.{to}.{origin} d, a;", [t], held[to], lambda a: min(max(a, info.min), info.max))


def test_packing_by_saturation():
    def clamp(x: int) -> int:
        return min(max(x, -128), 127) & 255

    check(
        "cvt.pack.sat.s8.s32.b32 d, a, b, c;", [I32, I32, U32], U32,
        lambda a, b, c: clamp(a) << 8 | clamp(b) | (c & 0xFFFF) << 16,
    )  # fmt: skip


def test_packing_and_unpacking():
    check("mov.b32 d, {a, b};", [U16, U16], U32, lambda a, b: a | b << 16)
    check("mov.b64 d, {a, b};", [U32, U32], U64, lambda a, b: a | b << 32)
    check(".reg .b16 x; mov.b32 {x, d}, a;", [U32], U16, lambda a: a >> 16)
    check(".reg .b32 x; mov.b64 {d, x}, a;", [U64], U32, lambda a: a & 0xFFFFFFFF)
    check("mov.b64 {d, _}, a;", [U64], U32, lambda a: a & 0xFFFFFFFF)
