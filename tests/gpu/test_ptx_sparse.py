"""mma.sp against numpy: its metadata written out per row, and placed in threads by the ISA's figures."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import InvalidOperand
from ptx_samples import run
from test_ptx_warp import gathered, place_a, place_b, place_c

U32, I32, F32 = np.uint32, np.int32, np.float32
#: type, k, selectors
FORMS = [
    ("s8", 64, 0),
    ("u8", 32, 0),
    ("s8", 32, 1),
    ("f16", 32, 0),
    ("bf16", 32, 1),
    *[("f16", 16, s) for s in range(4)],
]


def values(name: str, *shape: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """As stored, none of them zero, and exact."""
    rng = np.random.default_rng(seed)
    if name in ("s8", "u8"):
        x = rng.integers(1, 256, shape).astype(np.uint8).view({"s8": np.int8, "u8": np.uint8}[name])
        return x, x.astype(np.float64)
    x = rng.standard_normal(shape).astype(F32)
    if name == "f16":
        return x.astype(np.float16), x.astype(np.float16).astype(np.float64)
    bits = (x.view(U32) >> 16).astype(np.uint16)
    return bits, (bits.astype(U32) << 16).view(F32).astype(np.float64)


def sparse_a(name: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    kept = (np.argsort(np.random.default_rng(8).random((16, k // 4, 4)), axis=2) < 2).reshape(16, k)
    stored, exact = values(name, 16, k)
    return np.where(kept, stored, stored.dtype.type(0)), np.where(kept, exact, 0)


def kept_of(dense: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """A [16, k] with 2 of 4 columns to its kept elements [16, k / 2], and four bits for each 4 columns of a row."""
    k = dense.shape[1]
    kept, nibbles = np.zeros((16, k // 2), dense.dtype), [[0] * (k // 4) for _ in range(16)]
    for row in range(16):
        for chunk in range(k // 4):
            four = dense[row, 4 * chunk : 4 * chunk + 4]
            first, second = np.flatnonzero(four)
            kept[row, 2 * chunk : 2 * chunk + 2] = four[first], four[second]
            nibbles[row][chunk] = int(first) | int(second) << 2
    return kept, nibbles


def joined(nibbles: list[int]) -> int:
    return sum(n << 4 * i for i, n in enumerate(nibbles))


def metadata(nibbles: list[list[int]], name: str, k: int, selector: int) -> np.ndarray:
    """A word for each lane; what the selector does not mean is no metadata."""
    words = np.zeros(32, U32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        if name in ("s8", "u8"):
            within = t - 2 * selector if k == 32 else t
            if within in range(4 if k == 64 else 2):
                words[lane] = joined(nibbles[g + 8 * (within % 2)][within // 2 * 8 :][:8])
        else:
            within = t - (2 * selector if k == 32 else selector)
            if within in range(k // 16):
                low, high = (joined(nibbles[row][4 * within :][:4]) for row in (g, g + 8))
                words[lane] = low | high << 16
    return words


def sparse_product(
    kept: np.ndarray, words: np.ndarray, b: np.ndarray, c: np.ndarray, name: str, selector: int, ordered: str = ""
) -> np.ndarray:
    k, integer = len(b), name in ("s8", "u8")
    e = 4 if integer else 2
    n = k // (4 * e)
    block = np.stack([*gathered(kept, place_a, n, e), *gathered(b, place_b, n, e), *c.view(U32), words])
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%d9+{128 * i}];\n" for i in range(len(block)))
    stores = "".join(f"st.global.b32 [%d9+{128 * i}], %r{30 + i};\n" for i in range(4))
    names = [f"%r{10 + i}" for i in range(len(block))]
    d, a, right, old = (
        "{" + ", ".join(x) + "}"
        for x in (["%r30", "%r31", "%r32", "%r33"], names[:n], names[n : 2 * n], names[2 * n : -1])
    )
    types = f"s32.{name}.s8.s32" if integer else f"f32.{name}.{name}.f32"
    out = np.zeros((4, 32), c.dtype)
    run(f"mad.wide.u32 %d9, %r0, 4, %d1;\n{loads}mma.sp{ordered}.sync.aligned.m16n8k{k}.row.col.{types} {d}, {a}, "
        f"{right}, {old}, {names[-1]}, {selector};\nmad.wide.u32 %d9, %r0, 4, %d0;\n{stores}", out, block)  # fmt: skip
    return out


@pytest.mark.parametrize("ordered", ["", "::ordered_metadata"])
@pytest.mark.parametrize(("name", "k", "selector"), FORMS)
def test_sparse_mma(name, k, selector, ordered):
    integer = name in ("s8", "u8")
    dense, exact = sparse_a(name, k)
    b, b_exact = values("s8" if integer else name, k, 8, seed=1)
    c = np.random.default_rng(9).integers(-(2**20), 2**20, (4, 32)).astype(I32 if integer else F32)
    kept, nibbles = kept_of(dense)
    got = sparse_product(kept, metadata(nibbles, name, k, selector), b, c, name, selector, ordered)
    product = exact @ b_exact
    for lane in range(32):
        for i in range(4):
            expected = product[place_c(lane, i)] + c[i, lane]
            assert got[i, lane] == (expected if integer else F32(expected))


@pytest.mark.parametrize("pair", [0b0000, 0b0101, 0b0001, 0b0110, 0b1111])
@pytest.mark.parametrize(("name", "k", "selector"), FORMS[:4])
def test_positions_that_are_equal_or_out_of_order(name, k, selector, pair):
    kept, nibbles = kept_of(sparse_a(name, k)[0])
    nibbles[11][k // 4 - 1] = pair
    integer = name in ("s8", "u8")
    b, c = np.zeros((k, 8), kept.dtype), np.zeros((4, 32), I32 if integer else F32)
    with pytest.raises(InvalidOperand, match="metadata"):
        sparse_product(kept, metadata(nibbles, name, k, selector), b, c, name, selector)


@pytest.mark.parametrize(("name", "k"), [("s8", 64), ("f16", 32)])
def test_metadata_is_in_the_order_that_torch_gives_cutlass(name, k):
    """There the words of a quad's threads follow one another: ColumnMajorInterleaved<2> of pairs of columns. Of 16 bits
    it orders 32 rows together, two products, the second with the selector 1."""
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    torch = pytest.importorskip("torch")
    dense = sparse_a(name, k)[0]
    rows = np.concatenate([dense, dense[::-1]]) if name == "f16" else dense
    kept, stored = conversions.sparse_semi_structured_from_dense_cutlass(torch.from_numpy(rows.copy()))
    expected_kept, nibbles = kept_of(dense)
    assert (kept.numpy()[:16] == expected_kept).all()
    by_lane = metadata(nibbles, name, k, 0)
    if name == "f16":
        by_lane |= metadata(kept_of(rows[16:])[1], name, k, 1)
    assert stored.numpy().reshape(-1).view(U32).tolist() == by_lane.tolist()
