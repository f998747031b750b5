"""The kernel layout of weights with zeros: the reference and the kernel each against the drawing."""

import cases
import numpy as np
import pytest
import sparse_cases
import torch

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS
from tcompress.ops.sparse_prepack import parts

OP = OPS["sparse_prepack"]
HOSTILE_FLOATS = [0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e-45, -1e-45, 3e38, 1.0]


def by_index(weight, layout):
    """The layout drawn in csrc/cpu/sparse_layout.h, block by block."""
    n, k = weight.shape
    integers = weight.dtype == torch.int8
    height, width = sparse_cases.BLOCK_ROWS[layout], 4 if integers else 1
    rows, units = -(-n // height), -(-k // width)
    words = -(-units // 64)
    w = np.zeros((rows * height, units * width), np.int8 if integers else np.float32)
    w[:n, :k] = weight.numpy()
    w[w == 0] = 0  # -0
    bitmap, offsets, runs, values, positions = [], [0], [], [], []
    for row in range(rows):
        blocks = w[row * height : (row + 1) * height].reshape(height, units, width).transpose(1, 0, 2)
        for word in range(words):
            inside = blocks[word * 64 : (word + 1) * 64]
            kept = (inside != 0).any((1, 2))
            bitmap.append(sum(1 << u for u in np.flatnonzero(kept).tolist()))
            values.append(inside[kept])
            positions += [(word * 64 + u) % 256 for u in np.flatnonzero(kept).tolist()]
        runs.append(longest_run(blocks[(blocks != 0).any((1, 2))].astype(int)) if integers else 0)
        offsets.append(sum(map(len, values)))
    packed = np.array(bitmap, np.uint64).tobytes() + np.array(offsets, np.uint32).tobytes()
    if integers:
        sums = np.zeros(-(-n // 16) * 16, np.int32)
        sums[:n] = w[:n].sum(1, dtype=np.int64)
        packed += sums.tobytes() + bytes(runs)
    packed += bytes(-len(packed) % 64) + b"".join(v.tobytes() for v in values)
    packed += bytes(positions if height == 1 else []) + bytes(64)
    return torch.from_numpy(np.frombuffer(packed, np.int8).copy())


def longest_run(blocks):
    """Of a block row's kept blocks [B, height, 4], how many in a row can be added, wherever they begin, at most 64: no
    lane (two of the four k's) may reach a sum above 32767 in size with any activations in 0 … 127."""
    lanes = blocks.reshape(len(blocks), blocks.shape[1] * 2, 2)
    bounds = np.concatenate([127 * np.maximum(lanes, 0).sum(2), 127 * np.maximum(-lanes, 0).sum(2)], 1)
    sums = np.concatenate([np.zeros_like(bounds[:1]), bounds.cumsum(0)])
    for run in range(64, 1, -1):
        width = min(run, len(blocks))
        if width == 0 or (sums[width:] - sums[:-width]).max() <= 32767:
            return run
    return 1


def prepack(weight, layout, path):
    with use_backend("cpu"), use_cpu_path(path):
        return ops.sparse_prepack(weight, layout)


def assert_layout(weight, layout):
    expected = by_index(weight, layout)
    assert torch.equal(OP.reference(weight, layout), expected), "reference"
    for path in cases.CPU_PATHS:
        assert torch.equal(prepack(weight, layout, path), expected), path
    return expected


@pytest.mark.parametrize("pattern", sparse_cases.PATTERNS)
@pytest.mark.parametrize(("dtype", "layout"), sparse_cases.FORMS)
def test_layout(dtype, layout, pattern):
    for n, k in sparse_cases.SIZES:
        assert_layout(sparse_cases.weight(n, k, dtype, pattern), layout)


@pytest.mark.parametrize("layout", sparse_cases.LAYOUTS[torch.int8])
@pytest.mark.parametrize("name", cases.WEIGHTS)
def test_extreme_integers(layout, name):
    for n, k in ((17, 1030), (8, 256), (1, 4)):
        weight = cases.WEIGHTS[name](n, k)
        assert_layout(weight, layout)
        assert_layout(weight.masked_fill(~sparse_cases.PATTERNS["half"](n, k), 0), layout)


@pytest.mark.parametrize("layout", sparse_cases.LAYOUTS[torch.float32])
def test_special_floats(layout):
    """NaN, infinity and the smallest numbers are weights like others, with all their bits; -0 is none."""
    g = sparse_cases.generator("special")
    weight = torch.tensor(HOSTILE_FLOATS)[torch.randint(len(HOSTILE_FLOATS), (17, 130), generator=g)]
    weight[3] = -0.0
    weight[8:16] = -0.0
    weight[16, 5] = torch.tensor(0x7FA12345, dtype=torch.int32).view(torch.float32)  # a NaN with bits of its own
    packed = assert_layout(weight, layout)
    assert 0x7FA12345 in packed.view(torch.int32)
    assert -(2**31) not in packed[parts(17, 130, torch.float32, layout, 0)["values"] :].view(torch.int32)
    empty = assert_layout(torch.full((9, 70), -0.0), layout)
    assert empty.numel() == parts(9, 70, torch.float32, layout, 0)["bytes"]


def runs(weight, layout):
    n, k = weight.shape
    packed = ops.sparse_prepack(weight, layout).view(torch.uint8)
    where = parts(n, k, torch.int8, layout, 0)
    return packed[where["runs"] :][: -(-n // sparse_cases.BLOCK_ROWS[layout])].tolist()


@pytest.mark.parametrize("layout", sparse_cases.LAYOUTS[torch.int8])
def test_length_of_runs(layout):
    """Worked by hand: a lane takes 258 in all, two weights of it a unit."""
    rows = sparse_cases.BLOCK_ROWS[layout]
    for value, run in ((1, 64), (2, 64), (3, 43), (-3, 43), (21, 6), (43, 3), (44, 2), (64, 2), (65, 1), (-128, 1)):
        assert runs(torch.full((rows, 256), value, dtype=torch.int8), layout) == [run], value
    assert runs(torch.zeros(rows, 300, dtype=torch.int8), layout) == [64]
    weight = torch.full((rows, 600), 1, dtype=torch.int8)
    assert runs(weight, layout) == [64]
    weight[-1, 258] = 127  # one lane of one output decides for its block row
    assert runs(weight, layout) == [64]  # 127 + 1 + 63 * 2 and 4 to spare
    weight[-1, 512:] = 30
    assert runs(weight, layout) == [4]
    weight[-1, 260:264:2] = 127
    assert runs(weight, layout) == [3]  # 128 + 128 + 2 and no more
    kept_far_apart = torch.zeros(rows, 256, dtype=torch.int8)
    kept_far_apart[0, [0, 100, 255]] = 127
    assert runs(kept_far_apart, layout) == [64]  # the lanes of k 0, 1 and of k 2, 3 are different ones
    kept_far_apart[0, 252] = 5
    assert runs(kept_far_apart, layout) == [2]


def test_longest_row_sums_without_overflow():
    packed = ops.sparse_prepack(cases.WEIGHTS["all -128"](1, 65536), "1x4")
    sums = packed[parts(1, 65536, torch.int8, "1x4", 0)["column_sums"] :][:64].view(torch.int32)
    assert sums.tolist() == [-128 * 65536] + [0] * 15


@pytest.mark.parametrize(("dtype", "layout"), sparse_cases.FORMS)
def test_any_strides(dtype, layout):
    weight = sparse_cases.weight(22, 70, dtype)
    expected = by_index(weight, layout)
    wide = torch.ones(44, 144, dtype=dtype)
    wide[::2, 3:143:2] = weight
    unaligned = torch.cat([weight.new_ones(1), weight.reshape(-1)])[1:].view(22, 70)
    for view in (weight.t().contiguous().t(), wide[::2, 3:143:2], unaligned):
        assert torch.equal(ops.sparse_prepack(view, layout), expected)
        assert torch.equal(OP.reference(view, layout), expected)
    row = weight[:1]
    assert torch.equal(ops.sparse_prepack(row.expand(20, -1), layout), by_index(row.repeat(20, 1), layout))
    if dtype == torch.float32:
        negated = torch.complex(weight, -weight).conj().imag
        assert torch.equal(ops.sparse_prepack(negated, layout), expected)


@pytest.mark.parametrize(("dtype", "layout"), sparse_cases.FORMS)
def test_same_for_any_number_of_threads(dtype, layout):
    weight = sparse_cases.weight(301, 2049, dtype, "5 %")
    expected = OP.reference(weight, layout)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.sparse_prepack(weight, layout), expected), threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("weight", "layout", "error", "text"),
    [
        (torch.zeros(4, 4).half(), "8x4", TypeError, "weight: got torch.float16, expected float32 or int8"),
        (torch.zeros(4, 4, dtype=torch.uint8), "8x4", TypeError, "weight: got torch.uint8, expected float32 or int8"),
        (torch.zeros(4), "8x4", ValueError, "weight: got 1 dimensions, expected [N, K]"),
        (torch.zeros(1, 4, 4), "8x4", ValueError, "weight: got 3 dimensions, expected [N, K]"),
        (torch.zeros(4, 4), "1x4", ValueError, "layout: got '1x4', expected one of ('unstructured', '8x4') for "),
        (torch.zeros(4, 4).char(), "unstructured", ValueError, "layout: got 'unstructured', expected one of ('1x4', "),
        (torch.zeros(4, 4), "", ValueError, "layout: got '', expected one of "),
    ],
)
def test_errors(weight, layout, error, text):
    for backend in ("cpu", "reference"):
        with use_backend(backend), pytest.raises(error) as raised:
            ops.sparse_prepack(weight, layout)
        assert str(raised.value).startswith(f"sparse_prepack: {text}")
    with pytest.raises(RuntimeError, match=r"sparse_\w+: (weight|layout): expected "):
        torch.ops.tcompress.sparse_prepack(weight, layout)


def test_flops_and_bytes():
    assert OP.flops(torch.zeros(5, 8), "8x4") == 4 * 5 * 8
    assert OP.nbytes(torch.zeros(5, 8), "8x4") == 2 * 5 * 8 * 4
    assert OP.nbytes(torch.zeros(5, 8, dtype=torch.int8), "8x4") == 2 * 5 * 8
