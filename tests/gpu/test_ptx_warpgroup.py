"""Products of a warpgroup against numpy, their operands laid out by the ISA's formulas written out per element; and
each fence, wait and barrier that they need, missing."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import AsyncNotWaited, DivergentWarp, InvalidOperand, MissingFence, OutOfBounds, Race, UnknownPtx, load
from ptx_samples import entry, run

U32, F32 = np.uint32, np.float32
WIDTH = {0: 16, 1: 128, 2: 64, 3: 32}
#: Where B begins.
B_AT = 1 << 15


def swizzled(offset: int, mode: int) -> int:
    """Swizzle<b, 4, 3> of CuTe."""
    bits = {0: 0, 3: 1, 2: 2, 1: 3}[mode]
    return offset ^ (offset >> 3 & ((1 << bits) - 1) << 4)


def descriptor(start: int, leading: int, stride: int, mode: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def along_k(x: np.ndarray, start: int, mode: int, image: np.ndarray, step: int = 0) -> int:
    """Puts rows x [R, 32 bytes] of K into shared memory; the descriptor. step: which 32 bytes of a swizzle's width."""
    rows, width = len(x), WIDTH[mode]
    raw = x.view(np.uint8).reshape(rows, 32)
    leading = 0 if mode else rows * 16
    for r in range(rows):
        for b in range(32):
            word = b // 16 * leading + b % 16 if mode == 0 else b + 32 * step
            image[swizzled(start + r // 8 * 8 * width + r % 8 * width + word, mode)] = raw[r, b]
    return descriptor(start + 32 * step, leading, 8 * width, mode)


def along_rows(x: np.ndarray, start: int, mode: int, image: np.ndarray) -> int:
    """Puts x [R, 16], two bytes an element, there with the rows along the words: ((8, w, m), (8, 2))."""
    rows, width = len(x), WIDTH[mode]
    raw = x.view(np.uint16)
    for r in range(rows):
        for k in range(16):
            chunk = r // 8 % (width // 16) * 16 + r // (width // 2) * 16 * width
            at = swizzled(start + chunk + k // 8 * 8 * width + k % 8 * width + r % 8 * 2, mode)
            image[at : at + 2] = np.array([raw[r, k]], np.uint16).view(np.uint8)
    return descriptor(start, 16 * width, 8 * width, mode)


COPY = """mul.wide.u32 %d9, %r0, 16;
add.s64 %d9, %d9, %d1;
shl.b32 %r5, %r0, 4;
{each}"""
FENCES = "fence.proxy.async;\nbar.sync 0;\nwgmma.fence.sync.aligned;\n"
WAIT = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"


def copy(size: int, threads: int = 128) -> str:
    each = "".join(
        f"ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d9+{at}];\nst.shared.v4.b32 [%r5+{at}], {{%r1, %r2, %r3, %r4}};\n"
        for at in range(0, size, 16 * threads)
    )
    return COPY.format(each=each)


def names(n: int, letter: str = "x") -> str:
    return "{" + ", ".join(f"{letter}{i}" for i in range(n)) + "}"


def registers(n: int, letter: str = "x", start: int | None = None) -> str:
    """Declared, and set to a constant."""
    values = "" if start is None else "".join(f"mov.b32 {letter}{i}, {start};\n" for i in range(n))
    return f".reg .b32 {letter}<{n}>;\n{values}"


def results(n: int) -> str:
    stores = "".join(f"st.global.b32 [%d8+{4 * i}], x{i};\n" for i in range(n // 2))
    return f"mul.wide.u32 %d8, %r0, {2 * n};\nadd.s64 %d8, %d8, %d0;\n{stores}"


def matrix_of(out: np.ndarray, n: int) -> np.ndarray:
    """Registers [threads, n / 2] to D [64 a warpgroup, n], by the ISA's figure."""
    d = np.zeros((len(out) // 2, n), out.dtype)
    for thread, held in enumerate(out):
        warp, lane = divmod(thread, 32)
        for i, value in enumerate(held):
            d[16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2] = value
    return d


def wgmma(words: str, n: int, a: str, b: int, more: str = "", scale: str = "%p1") -> str:
    return f"wgmma.mma_async.sync.aligned.{words} {names(n // 2)}, {a}, {b}, {scale}{more};\n"


TRUE = "setp.eq.u32 %p1, %r0, %r0;\n"


def values(name: str, *shape: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """As stored, and exact."""
    rng = np.random.default_rng(seed)
    if name in ("s8", "u8"):
        x = rng.integers(-128, 128, shape).astype(np.int8).view({"s8": np.int8, "u8": np.uint8}[name])
        return x, x.astype(np.float64)
    x = rng.standard_normal(shape).astype(F32)
    if name == "f16":
        return x.astype(np.float16), x.astype(np.float16).astype(np.float64)
    bits = (x.view(U32) >> 16).astype(np.uint16)
    return bits, (bits.astype(U32) << 16).view(F32).astype(np.float64)


def in_shared(x: np.ndarray, start: int, mode: int, image: np.ndarray, transposed: bool, step: int = 0) -> str:
    bits = along_rows(x, start, mode, image) if transposed else along_k(x, start, mode, image, step)
    # as a number with a sign, as compilers write it
    return str(bits - (1 << 64) if bits >> 63 else bits)


CASES = [  # types of A and B, n, swizzle of A and B, transposed or not
    ("s8", "s8", 64, 1, 1, False, False), ("u8", "s8", 8, 2, 3, False, False), ("s8", "u8", 32, 3, 2, False, False),
    ("u8", "u8", 256, 0, 0, False, False), ("f16", "f16", 64, 1, 1, False, True),
    ("f16", "f16", 128, 2, 2, True, False), ("bf16", "bf16", 24, 0, 1, False, False),
    ("bf16", "bf16", 80, 3, 3, True, True), ("f16", "f16", 256, 1, 2, True, True),
]  # fmt: skip


@pytest.mark.parametrize(("a_type", "b_type", "n", "a_mode", "b_mode", "trans_a", "trans_b"), CASES)
def test_both_in_shared_memory(a_type, b_type, n, a_mode, b_mode, trans_a, trans_b):
    integer = a_type[-1] == "8"
    k = 32 if integer else 16
    (a, a_exact), (b, b_exact) = values(a_type, 64, k), values(b_type, n, k, seed=1)
    image = np.zeros(1 << 16, np.uint8)
    step = 1 if a_mode in (1, 2) and not trans_a else 0
    at_a, at_b = in_shared(a, 0, a_mode, image, trans_a, step), in_shared(b, B_AT, b_mode, image, trans_b)
    more = "" if integer else f", 1, -1, {int(trans_a)}, {int(trans_b)}"
    words = f"m64n{n}k{k}.s32.{a_type}.{b_type}" if integer else f"m64n{n}k{k}.f32.{a_type}.{b_type}"
    out = np.zeros((128, n // 2), np.int32 if integer else F32)
    start = "7" if integer else "0f40E00000"
    run(copy(1 << 16) + TRUE + registers(n // 2) + "".join(f"mov.b32 x{i}, {start};\n" for i in range(n // 2)) + FENCES
        + wgmma(words, n, at_a, at_b, more) + WAIT + results(n), out, image, threads=128, shared=1 << 16,
        target="sm_90a")  # fmt: skip
    expected = a_exact @ b_exact.T * (1 if integer else -1) + 7
    if integer:
        assert (matrix_of(out, n) == expected).all()
    else:
        np.testing.assert_allclose(matrix_of(out, n), expected, rtol=2**-23, atol=1e-12)


@pytest.mark.parametrize("name", ["s8", "f16", "bf16"])
def test_a_in_registers_and_two_products_in_a_row(name):
    """Two warpgroups, each with an A of its own; the first product takes no old values, the second adds."""
    integer, n = name == "s8", 16
    k = 32 if integer else 16
    e = k // 8
    (a, a_exact), (b, b_exact) = values(name, 128, k), values(name, n, k, seed=1)
    image = np.zeros(1 << 16, np.uint8)
    at_b = in_shared(b, B_AT, 2, image, False)
    held = np.zeros((256, 4 * e), a.dtype)
    for thread in range(256):
        warp, lane = divmod(thread, 32)
        for i in range(4 * e):
            register = i // e
            row = 16 * warp + lane // 4 + 8 * (register % 2)
            held[thread, i] = a[row, lane % 4 * e + i % e + 4 * e * (register // 2)]
    out = np.zeros((256, n // 2), np.int32 if integer else F32)
    words = f"m64n{n}k{k}.{'s32' if integer else 'f32'}.{name}.{name}"
    more = "" if integer else ", 1, 1, 0"
    body = (
        copy(1 << 16, 256) + TRUE + "setp.ne.u32 %p2, %r0, %r0;\n" + registers(n // 2) + registers(4, "y")
        + "mul.wide.u32 %d9, %r0, 16;\nadd.s64 %d9, %d9, %d2;\nld.global.v4.b32 {y0, y1, y2, y3}, [%d9];\n" + FENCES
        + wgmma(words, n, names(4, "y"), at_b, more, "%p2") + wgmma(words, n, names(4, "y"), at_b, more) + WAIT
        + results(n)
    )  # fmt: skip
    run(body, out, image, held.view(np.uint8), threads=256, shared=1 << 16, target="sm_90a")
    expected = 2 * (a_exact @ b_exact.T)
    np.testing.assert_allclose(matrix_of(out, n), expected, rtol=0 if integer else 2**-22, atol=0 if integer else 1e-6)


def test_integers_wrap_or_saturate():
    image = np.zeros(1 << 16, np.uint8)
    full = np.full((64, 32), 127, np.int8)
    at_a, at_b = in_shared(full, 0, 1, image, False), in_shared(full[:8], B_AT, 1, image, False)
    for words, expected in (
        ("m64n8k32.s32.s8.s8", 2**31 - 100 + 32 * 127 * 127 - 2**32), ("m64n8k32.satfinite.s32.s8.s8", 2**31 - 1)
    ):  # fmt: skip
        out = np.zeros((128, 4), np.int32)
        run(copy(1 << 16) + TRUE + registers(4, "x", 2**31 - 100) + FENCES + wgmma(words, 8, at_a, at_b) + WAIT
            + results(8), out, image, threads=128, shared=1 << 16, target="sm_90a")  # fmt: skip
        assert (out == expected).all()


#: A product of 64 x 8, with a name for each of its parts.
PARTS = {
    "copy": "st.shared.v4.b32 [%r5], {{0, 0, 0, 0}};\nst.shared.v4.b32 [%r5+2048], {{0, 0, 0, 0}};\n",
    "proxy": "fence.proxy.async;\n", "barrier": "bar.sync 0;\n", "fence": "wgmma.fence.sync.aligned;\n",
    "product": "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {d}, {a}, {b}, %p1, 1, 1, 0;\n",
    "commit": "wgmma.commit_group.sync.aligned;\n", "wait": "wgmma.wait_group.sync.aligned 0;\n",
    "end": "add.f32 x0, x0, x0;\n",
}  # fmt: skip


def planted(threads: int = 128, **changes: str) -> None:
    text = registers(4, "x", 0) + registers(4, "y") + "".join(f"mov.b32 y{i}, %r0;\n" for i in range(4))
    text += TRUE + "shl.b32 %r5, %r0, 4;\n"
    body = text + "".join((PARTS | changes).values())
    body = body.replace("AGAIN", PARTS["product"]).format(d=names(4), a=names(4, "y"), b=descriptor(0, 128, 256, 0))
    run(body, np.zeros(4, F32), threads=threads, shared=1 << 13, target="sm_90a")


def test_nothing_is_missing():
    planted()
    # the fence may stand on either side of the barrier
    planted(proxy="", barrier="bar.sync 0;\nfence.proxy.async.shared::cta;\n")
    # an accumulator goes on, products of one shape are in order
    planted(commit=PARTS["commit"] + "AGAIN" + PARTS["commit"])
    # copies and constants stay behind the fence, as compilers leave them
    planted(fence=PARTS["fence"] + "mov.b32 x1, 0f3F800000;\nmov.b32 y1, %r0;\n")


MISSING = [
    ({"wait": ""}, AsyncNotWaited),
    ({"wait": "wgmma.wait_group.sync.aligned 1;\n"}, AsyncNotWaited),
    ({"commit": ""}, AsyncNotWaited),
    # the second group is not waited for
    ({"commit": PARTS["commit"] + "AGAIN" + PARTS["commit"], "wait": "wgmma.wait_group.sync.aligned 1;\n"},
     AsyncNotWaited),
    ({"proxy": ""}, MissingFence),
    ({"copy": PARTS["proxy"] + PARTS["copy"], "proxy": ""}, MissingFence),
    # not of the warp that wrote
    ({"proxy": "setp.ge.u32 %p2, %r0, 32;\n@%p2 fence.proxy.async;\n"}, MissingFence),
    # of half of each warp
    ({"proxy": "and.b32 %r6, %r0, 31;\nsetp.lt.u32 %p2, %r6, 16;\n@%p2 fence.proxy.async;\n"}, MissingFence),
    ({"barrier": ""}, Race),
    ({"fence": ""}, MissingFence),
    ({"fence": PARTS["fence"] + "add.f32 x1, x1, x1;\n"}, MissingFence),
    ({"fence": PARTS["fence"] + "add.s32 y2, %r0, 1;\n"}, MissingFence),
    ({"fence": PARTS["fence"] + ".reg .b32 z;\nadd.s32 z, %r0, 1;\nmov.b32 y2, z;\n"}, MissingFence),
    # reads and writes of what a product holds
    ({"commit": PARTS["commit"] + "mov.b32 y0, 0;\n"}, AsyncNotWaited),
    ({"commit": PARTS["commit"] + "mov.b32 %r9, x0;\n"}, AsyncNotWaited),
    ({"commit": PARTS["commit"] + "st.shared.b32 [%r5], 1;\n"}, AsyncNotWaited),
    ({"commit": PARTS["commit"] + "bar.sync 0;\ncp.async.ca.shared.global [%r5], [%d0], 4;\n"}, AsyncNotWaited),
    # waited for by these warps, perhaps not by the others
    ({"wait": PARTS["wait"] + "st.shared.b32 [%r5], 1;\n"}, Race),
    # the accumulator and A change places
    ({"commit": PARTS["product"].replace("{d}, {a}", "{a}, {d}") + PARTS["commit"]}, AsyncNotWaited),
    ({"copy": PARTS["copy"] + "cp.async.ca.shared.global [%r5], [%d0], 4;\n"}, AsyncNotWaited),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error"), MISSING, ids=range(len(MISSING)))
def test_what_is_missing_is_reported(changes, error):
    with pytest.raises(error, match="line"):
        planted(**changes)


def test_memory_is_free_after_the_wait_and_a_barrier():
    planted(wait=PARTS["wait"] + "bar.sync 0;\nst.shared.b32 [%r5], 1;\n")


def test_a_register_has_to_be_free_of_another_shape():
    other = "wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {d}, {a}, {b}, %p1;\n"
    with pytest.raises(AsyncNotWaited, match="another wgmma"):
        planted(commit=PARTS["fence"] + other + PARTS["commit"])


@pytest.mark.parametrize(("b", "error"), [
    (descriptor(0, 128, 256, 0) | 1 << 50, InvalidOperand), (descriptor(0, 128, 256, 0) | 1 << 14, InvalidOperand),
    (descriptor(128, 128, 256, 1), InvalidOperand), (descriptor(1 << 13, 128, 256, 0), OutOfBounds),
])  # fmt: skip
def test_descriptors(b, error):
    with pytest.raises(error):
        planted(product=PARTS["product"].replace("{b}", str(b)))


def test_all_threads_of_a_warpgroup_have_to_agree():
    apart = "cvt.u64.u32 %d9, %r0;\n" + PARTS["product"].replace("{b}", "%d9")
    with pytest.raises(InvalidOperand, match="agree"):
        planted(product=apart)
    with pytest.raises(DivergentWarp, match="warpgroup 0"):
        planted(fence="setp.lt.u32 %p2, %r0, 96;\n@%p2 wgmma.fence.sync.aligned;\n")
    with pytest.raises(DivergentWarp, match="not whole"):
        planted(threads=96)


@pytest.mark.parametrize("instruction", [
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 %D, %d1, %d2, %p1;",
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 %D, %d1, %d2, %p1, 1, 1, 0;",
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 %D, %d1, %d2, %p1, 1, 2, 0, 0;",
    "wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 %D, %d1, %d2, %p1, 1, 1, 0, 0;",
    "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 %D, %d1, %d2, %p1, 1, 1;",
    "wgmma.mma_async.sync.aligned.m64n40k32.s32.s8.s8 %D, %d1, %d2, %p1;",
    "wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8 %D, %d1, %d2, %p1;",
    "wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%r1, %r2, %r3, %r1}, %d1, %d2, %p1;",
    "wgmma.mma_async.sp.sync.aligned.m64n8k64.s32.s8.s8 %D, %d1, %d2, %r9, 0, %p1;",
    "wgmma.wait_group.sync.aligned %r1;", "wgmma.fence.aligned;", "fence.proxy.alias;",
    "cp.async.bulk.commit_group;",
])  # fmt: skip
def test_forms_that_are_not_modelled(instruction):
    text = entry("ret;\n" + instruction.replace("%D", "{%r1, %r2, %r3, %r4}"), target="sm_90a")
    with pytest.raises(UnknownPtx, match="line"):
        load(text)
