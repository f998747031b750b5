"""The emulator's float instructions against exact fractions, rounded here by an independent function."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from ptx_samples import evaluate

F16, F32 = np.float16, np.float32
INF, NAN = math.inf, math.nan
#: name -> bits of the significand, smallest exponent of a normal number, largest finite value
FORMATS = {"f32": (24, -126, Fraction(2**24 - 1) * 2**104), "f16": (11, -14, Fraction(65504)), "bf16": (8, -126,
           Fraction(255) * 2**120)}  # fmt: skip
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    2.0**-126,
    -(2.0**-126),
    2.0**-149,
    -(2.0**-140),
    3.4028235e38,
    INF,
    -INF,
    NAN,
    0.5,
    1.5,
]


def rounded(x: Fraction, name: str) -> float:
    """To the nearest, half to even."""
    bits, low, largest = FORMATS[name]
    if x == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(x.numerator)) - math.log2(x.denominator)) - 1, low)
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - bits + 1)
    y = round(x / unit) * unit
    return math.copysign(INF, x) if abs(y) > largest else float(y)


def floats(seed: int, n: int = 512, near: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if near:
        return (rng.integers(2**23, 2**24, n) * 2.0 ** rng.integers(-30, -20, n)).astype(F32)
    x = rng.integers(0, 2**32, n, np.uint32).view(F32)
    x[: len(SPECIAL)] = rng.permutation(np.array(SPECIAL, F32))
    return x


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit, but for which NaN."""
    nan = np.isnan(expected)
    assert (np.isnan(got) == nan).all()
    raw = f"u{got.itemsize}"
    bad = (got.view(raw) != expected.astype(got.dtype).view(raw)) & ~nan
    assert not bad.any(), (got[bad][:4], expected[bad][:4])


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < F32(2.0**-126), np.copysign(F32(0), x), x)


@pytest.mark.parametrize("ftz", ["", ".ftz"])
@pytest.mark.parametrize(("op", "f"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div", np.divide)])
def test_arithmetic_is_rounded_once(op, f, ftz):
    a, b = floats(1), floats(2)
    with np.errstate(all="ignore"):
        x, y = (flushed(a), flushed(b)) if ftz else (a, b)
        # in float64, which has enough bits to round twice without a trace
        expected = f(x.astype(np.float64), y.astype(np.float64)).astype(F32)
        same(evaluate(f"{op}.rn{ftz}.f32 d, a, b;", [a, b], F32), flushed(expected) if ftz else expected)
        if op in ("add", "mul"):
            clamped = np.where(expected > 0, np.minimum(expected, F32(1)), F32(0))
            if not ftz:
                same(evaluate(f"{op}.sat.f32 d, a, b;", [a, b], F32), clamped)


def test_fma_is_rounded_once():
    a, b = floats(3, 4000, near=True), floats(4, 4000, near=True)
    # sums that come to lie close to the middle between two float32, on either side: there a second rounding shows
    product = a.astype(np.float64) * b
    c = (-product).astype(F32)
    c[::2] = (product[::2] * 2.0**-24).astype(F32)
    c[1::4] = np.spacing(product[1::4].astype(F32)) / 2 * (1 + F32(2.0**-22))
    c[3::8] = (a[3::8] * F32(2.0**-120)) * F32(2.0**-20)
    for start in range(0, 4000, 1000):
        part = slice(start, start + 1000)
        got = evaluate("fma.rn.f32 d, a, b, c;", [a[part], b[part], c[part]], F32)
        exact = [
            Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            for x, y, z in zip(a[part], b[part], c[part], strict=True)
        ]
        assert [float(g) for g in got] == [rounded(e, "f32") for e in exact]


def test_fma_of_subnormals():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(2**23, 2**24, 500) * 2.0**-90 for _ in range(2))
    a, b, c = a.astype(F32), b.astype(F32), (rng.integers(1, 2**20, 500) * 2.0**-149).astype(F32)
    got = evaluate("fma.rn.f32 d, a, b, c;", [a, b, c], F32)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert [float(g) for g in got] == [rounded(e, "f32") for e in exact]
    assert (evaluate("fma.rn.ftz.f32 d, a, b, c;", [a, b, c], F32) == 0).all()


@pytest.mark.parametrize("mode", ["rm", "rp", "rz"])
def test_fma_rounded_to_one_side(mode):
    a, b = floats(3, 500, near=True), floats(4, 500, near=True)
    c = (-a.astype(np.float64) * b).astype(F32)
    c[::3] = floats(5, 500, near=True)[::3] * F32(2.0**-20)
    b[::2] *= F32(-1)
    got = evaluate(f"fma.{mode}.f32 d, a, b, c;", [a, b, c], F32)
    for g, *xs in zip(got, a, b, c, strict=True):
        x, y, z = (Fraction(float(v)) for v in xs)
        low, high = (np.nextafter(g, F32(s * INF)) for s in (-1, 1))
        e, value = x * y + z, Fraction(float(g))
        side = mode if mode != "rz" else "rm" if e > 0 else "rp"
        if side == "rm":
            assert value <= e < Fraction(float(high))
        else:
            assert Fraction(float(low)) < e <= value


def test_fma_of_what_is_not_finite():
    a, b, c = (
        np.array([INF, 0, 1, 3e38, NAN], F32),
        np.array([1, INF, 1, 10, 1], F32),
        np.array([-INF, 1, INF, 0, 1], F32),
    )
    same(evaluate("fma.rn.f32 d, a, b, c;", [a, b, c], F32), np.array([NAN, NAN, INF, INF, NAN], F32))


def halves(seed: int, n: int = 512) -> np.ndarray:
    x = np.random.default_rng(seed).integers(0, 2**16, n).astype(np.uint16).view(F16)
    return np.where(np.isfinite(x), x, F16(1.25))


@pytest.mark.parametrize(
    ("op", "f"), [("add", lambda x, y: x + y), ("sub", lambda x, y: x - y), ("mul", lambda x, y: x * y)]
)
def test_float16(op, f):
    a, b = halves(1), halves(2)
    expected = np.array([rounded(f(Fraction(float(x)), Fraction(float(y))), "f16") for x, y in zip(a, b, strict=True)])
    got = evaluate(f"{op}.f16 d, a, b;", [a, b], F16)
    assert (got == expected).all()
    pairs = evaluate(f"{op}.f16x2 d, a, b;", [a.view(np.uint32), b.view(np.uint32)], np.uint32)
    assert (pairs.view(F16) == expected).all()


def test_fma_of_float16():
    a, b, c = halves(1), halves(2), halves(3)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    expected = np.array([rounded(e, "f16") for e in exact])
    assert (evaluate("fma.rn.f16 d, a, b, c;", [a, b, c], F16) == expected).all()
    packed = [x.view(np.uint32) for x in (a, b, c)]
    assert (evaluate("fma.rn.f16x2 d, a, b, c;", packed, np.uint32).view(F16) == expected).all()


def brains(seed: int, n: int = 512) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * 2.0 ** rng.integers(-20, 20, n)).astype(F32).view(np.uint32) >> 16


def value(bits: np.ndarray) -> list[Fraction]:
    return [Fraction(float(x)) for x in (bits.astype(np.uint32) << 16).view(F32)]


def test_bfloat16():
    a, b, c = (brains(i).astype(np.uint16) for i in range(3))
    got = evaluate("fma.rn.bf16 d, a, b, c;", [a, b, c], np.uint16)
    exact = [x * y + z for x, y, z in zip(value(a), value(b), value(c), strict=True)]
    assert value(got) == [Fraction(rounded(e, "bf16")) for e in exact]
    got = evaluate("mul.bf16 d, a, b;", [a, b], np.uint16)
    assert value(got) == [Fraction(rounded(x * y, "bf16")) for x, y in zip(value(a), value(b), strict=True)]


def test_pairs_of_float32():
    a, b, c = (np.random.default_rng(i).standard_normal(64).astype(F32) for i in range(3))
    packed = [x.view(np.uint64) for x in (a, b, c)]
    assert (evaluate("mul.rn.f32x2 d, a, b;", packed[:2], np.uint64).view(F32) == a * b).all()
    single = evaluate("fma.rn.f32 d, a, b, c;", [a, b, c], F32)
    assert (evaluate("fma.rn.f32x2 d, a, b, c;", packed, np.uint64).view(F32) == single).all()


def test_extremes_pass_nan_over_and_order_zeros():
    a = np.array([0.0, -0.0, NAN, 1, NAN, -INF, 3], F32)
    b = np.array([-0.0, 0.0, 2, NAN, NAN, INF, 2], F32)
    same(evaluate("max.f32 d, a, b;", [a, b], F32), np.array([0.0, 0.0, 2, 1, NAN, INF, 3], F32))
    same(evaluate("min.f32 d, a, b;", [a, b], F32), np.array([-0.0, -0.0, 2, 1, NAN, -INF, 2], F32))
    same(evaluate("max.NaN.f32 d, a, b;", [a, b], F32), np.array([0.0, 0.0, NAN, NAN, NAN, INF, 3], F32))
    c = np.array([5, -5, 1, 7, 1, NAN, 9], F32)
    same(evaluate("max.f32 d, a, b, c;", [a, b, c], F32), np.array([5, 0.0, 2, 7, 1, INF, 9], F32))


def test_signs():
    a = floats(5)
    bits = a.view(np.uint32)
    assert (evaluate("neg.f32 d, a;", [a], np.uint32) == bits ^ np.uint32(1 << 31)).all()
    assert (evaluate("abs.f32 d, a;", [a], np.uint32) == bits & ~np.uint32(1 << 31)).all()
    same(evaluate("abs.ftz.f32 d, a;", [a], F32), flushed(np.abs(a)))


def test_copied_signs_and_clamping():
    a, b = floats(5), floats(6)
    same(evaluate("copysign.f32 d, a, b;", [a, b], F32), np.copysign(b, a))
    with np.errstate(invalid="ignore"):
        clamped = np.where(a > 0, np.minimum(a, F32(1)), F32(0))
    same(evaluate("cvt.sat.f32.f32 d, a;", [a], F32), clamped)


def test_functions_against_float64():
    x = np.array([0.0, -0.0, 1, -1, 0.5, 3.7, -130, -148.5, -200, 127.9, 129, INF, -INF, NAN, 1e-40], F32)
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        same(evaluate("ex2.approx.f32 d, a;", [x], F32), np.exp2(wide).astype(F32))
        same(
            evaluate("ex2.approx.ftz.f32 d, a;", [x], F32), flushed(np.exp2(flushed(x).astype(np.float64)).astype(F32))
        )
        same(evaluate("lg2.approx.f32 d, a;", [x], F32), np.log2(wide).astype(F32))
        same(evaluate("rcp.rn.f32 d, a;", [x], F32), (1 / wide).astype(F32))
        same(evaluate("sqrt.rn.f32 d, a;", [x], F32), np.sqrt(wide).astype(F32))
        same(evaluate("rsqrt.approx.f32 d, a;", [x], F32), (1 / np.sqrt(wide)).astype(F32))
        same(evaluate("tanh.approx.f32 d, a;", [x], F32), np.tanh(wide).astype(F32))


COMPARISONS = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def test_comparisons_with_nan():
    a, b = floats(6), floats(7)
    b[::4] = a[::4]
    nan = np.isnan(a) | np.isnan(b)
    with np.errstate(all="ignore"):
        for name, sign in COMPARISONS.items():
            plain = eval(f"a {sign} b")
            assert (evaluate(f"setp.{name}.f32 d, a, b;", [a, b], bool) == plain).all()
            assert (evaluate(f"setp.{name}u.f32 d, a, b;", [a, b], bool) == (plain | nan)).all()
        assert (evaluate("setp.ne.f32 d, a, b;", [a, b], bool) == ((a != b) & ~nan)).all()
        assert (evaluate("setp.neu.f32 d, a, b;", [a, b], bool) == (a != b)).all()
    assert (evaluate("setp.nan.f32 d, a, b;", [a, b], bool) == nan).all()
    assert (evaluate("setp.num.f32 d, a, b;", [a, b], bool) == ~nan).all()


@pytest.mark.parametrize(("mode", "f"), [("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)])
@pytest.mark.parametrize("to", ["s8", "s16", "s32", "s64", "u8", "u16", "u32", "u64"])
def test_floats_to_integers_are_clamped(to, mode, f):
    x = np.array(
        [0, 0.5, 1.5, 2.5, -0.5, -1.5, 127.5, 128, 300, -129, 65535.4, 2**31, -(2**31), 1e10, 2**63, 1e30, -1e30], F32
    )
    bits = int(to[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    held = {8: 16}.get(bits, bits) // 8
    got = evaluate(f"cvt.{mode}.{to}.f32 d, a;", [x], np.dtype(f"{'i' if to[0] == 's' else 'u'}{held}"))
    assert got.tolist() == [min(max(f(float(v)), low), high) for v in x]
    assert evaluate(f"cvt.rzi.{to}.f32 d, a;", [np.array([NAN], F32)], np.dtype(f"u{held}"))[0] == (
        0 if bits < 64 else 1 << 63
    )


def test_integers_to_floats():
    x = np.random.default_rng(0).integers(-(2**31), 2**31, 500).astype(np.int32)
    expected = [rounded(Fraction(int(v)), "f32") for v in x]
    assert evaluate("cvt.rn.f32.s32 d, a;", [x], F32).tolist() == expected
    assert evaluate("cvt.rn.f32.u32 d, a;", [x.view(np.uint32)], F32).tolist() == [
        rounded(Fraction(int(v)), "f32") for v in x.view(np.uint32)
    ]


@pytest.mark.parametrize(("name", "dtype"), [("s16", np.int16), ("u16", np.uint16), ("s32", np.int32)])
def test_integers_to_narrow_floats(name, dtype):
    x = np.random.default_rng(0).integers(np.iinfo(dtype).min, np.iinfo(dtype).max, 500).astype(dtype)
    x[:250] //= dtype(2 ** (x.itemsize * 8 - 14))
    exact = [Fraction(int(v)) for v in x]
    with np.errstate(over="ignore"):
        assert evaluate(f"cvt.rn.f16.{name} d, a;", [x], F16).tolist() == [rounded(e, "f16") for e in exact]
    got = evaluate(f"cvt.rn.bf16.{name} d, a;", [x], np.uint16)
    assert (got.astype(np.uint32) << 16).view(F32).tolist() == [rounded(e, "bf16") for e in exact]


def test_floats_to_narrower_floats():
    x = floats(8)
    x = x[np.isfinite(x)]
    x[:100] = np.random.default_rng(1).standard_normal(100)
    exact = [Fraction(float(v)) for v in x]
    half, brain = ([rounded(e, name) for e in exact] for name in ("f16", "bf16"))
    with np.errstate(over="ignore"):
        got = evaluate("cvt.rn.f16.f32 d, a;", [x], F16)
    assert got.tolist() == half
    got = evaluate("cvt.rn.bf16.f32 d, a;", [x], np.uint16)
    assert (got.astype(np.uint32) << 16).view(F32).tolist() == brain
    pair = evaluate("cvt.rn.f16x2.f32 d, a, b;", [x, x[::-1].copy()], np.uint32).view(F16).reshape(-1, 2)
    assert pair[:, 1].tolist() == half
    assert pair[:, 0].tolist() == half[::-1]
    pair = evaluate("cvt.rn.bf16x2.f32 d, a, b;", [x, -x], np.uint32).view(np.uint16).reshape(-1, 2)
    assert (pair[:, 1].astype(np.uint32) << 16).view(F32).tolist() == brain


@pytest.mark.filterwarnings("ignore:invalid value")
def test_floats_to_wider_floats():
    h = halves(4)
    assert (evaluate("cvt.f32.f16 d, a;", [h], F32) == h.astype(F32)).all()
    b = brains(4).astype(np.uint16)
    assert (evaluate("cvt.f32.bf16 d, a;", [b], F32) == (b.astype(np.uint32) << 16).view(F32)).all()
    x = floats(9)
    same(evaluate("cvt.f64.f32 d, a;", [x], np.float64), x.astype(np.float64))


def test_rounding_to_whole_floats():
    x = np.array([0.5, 1.5, -0.5, 2.7, -2.7, 1e20, INF], F32)
    same(evaluate("cvt.rni.f32.f32 d, a;", [x], F32), np.rint(x))
    same(evaluate("cvt.rmi.f32.f32 d, a;", [x], F32), np.floor(x))
