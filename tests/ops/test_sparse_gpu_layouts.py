"""The layouts of GPUs' kernels, packed and read back on any device: byte by byte as they are drawn, and what the ops'
references compute with them."""

import cases
import int4_sparse_cases
import oracle
import pytest
import sparse_cases
import torch
from tcompress.kernels.triton import int4_sparse_layout, sparse_layout

from tcompress import explain, ops, use_backend
from tcompress.ops._registry import OPS
from tcompress.packing import pack_sparse

FORMS = (*sparse_cases.GPU_FORMS, (torch.int8, "mma-2:4"))
BLOCKS = [(dtype, layout) for dtype, layout in FORMS if "2:4" not in layout]
SIZES = ((17, 70), (0, 8), (16, 0), (1, 1), (49, 257), (33, 3), (64, 128))


def aligned(size):
    return -(-size // 64) * 64


@pytest.mark.parametrize(("dtype", "layout"), FORMS)
def test_there_and_back(dtype, layout):
    for n, k in SIZES:
        weight = sparse_cases.gpu_weight(n, k, dtype, layout)
        packed = ops.sparse_prepack(weight, layout)
        assert (packed.dtype, packed.dim()) == (torch.int8, 1)
        assert oracle.same_bits(ops.sparse_unpack(packed, n, k, dtype, layout), weight)
        wide = torch.ones(2 * n, k + 3, dtype=dtype)
        wide[::2, 3:] = weight
        assert torch.equal(ops.sparse_prepack(wide[::2, 3:], layout), packed)


@pytest.mark.parametrize(("dtype", "layout"), BLOCKS)
def test_blocks_lie_as_they_are_drawn(dtype, layout):
    pattern = layout.split("-")[1]
    r, c = map(int, pattern.split("x"))
    for n, k in SIZES:
        weight = sparse_cases.gpu_weight(n, k, dtype, layout)
        starts, columns, values = [0], [], []
        for first in range(0, n, r):
            for column in range(-(-k // c)):
                block = torch.zeros(r, c, dtype=dtype)
                part = weight[first : first + r, column * c : column * c + c]
                block[: part.shape[0], : part.shape[1]] = part
                if part.count_nonzero():
                    columns.append(column)
                    values.append(block.flatten())
            starts.append(len(columns))
        got = sparse_layout.parts(ops.sparse_prepack(weight, layout), n, k, dtype, pattern)
        assert got.start.tolist() == starts
        assert got.column.tolist() == columns
        assert oracle.same_bits(got.values, torch.cat([torch.empty(0, dtype=dtype), *values]))
        if dtype == torch.int8:
            assert got.total.tolist() == weight.long().sum(1).tolist()
        for part in got:
            assert part is None or part.storage_offset() * part.element_size() % 16 == 0


@pytest.mark.parametrize("dtype", sparse_cases.SUFFIXES)
def test_two_of_four_is_the_storage_layout(dtype):
    layout = f"gpu-2:4{sparse_cases.SUFFIXES[dtype]}"
    for n, k in SIZES:
        weight = sparse_cases.gpu_weight(n, k, dtype, layout)
        stored = pack_sparse(weight, "2:4", scale=torch.ones(n) if dtype == torch.int8 else None)
        got = sparse_layout.parts(ops.sparse_prepack(weight, layout), n, k, dtype, "2:4")
        assert oracle.same_bits(got.values, stored.values)
        assert torch.equal(got.places, stored.index)


def test_fragments_lie_as_they_are_drawn():
    n, k = 33, 130
    weight = sparse_cases.gpu_weight(n, k, torch.int8, "mma-2:4")
    stored = pack_sparse(weight, "2:4", scale=torch.ones(n))
    values = stored.values.view(n, -1)
    nibbles = torch.stack([stored.index & 15, stored.index >> 4], 1).flatten()[: n * 33].view(n, 33)
    units = ops.sparse_prepack(weight, "mma-2:4").view(3, 3, 640)
    for row in range(48):
        for kept in range(96):
            g, half, within = row % 8, row % 16 // 8, kept % 32
            lane, word = g * 4 + within % 16 // 4, within // 16 * 2 + half
            got = units[row // 16, kept // 32, lane * 16 + word * 4 + within % 4]
            assert got == (values[row, kept] if row < n and kept < 66 else 0)
        for quad in range(48):
            g, half, within = row % 8, row % 16 // 8, quad % 16
            lane = g * 4 + within // 8 * 2 + half
            byte = int(units[row // 16, quad // 16, 512 + lane * 4 + within % 8 // 2]) & 255
            assert byte >> (quad % 2 * 4) & 15 == (nibbles[row, quad] if row < n and quad < 33 else 4)


@pytest.mark.parametrize("layout", ["gpu-8x4", "gpu-2:4", "gpu-16x16-bfloat16", "gpu-2:4-float16"])
def test_special_floats(layout):
    """NaN and infinity are weights like others, with all their bits; -0 is none."""
    dtype = next(dtype for dtype, name in sparse_cases.GPU_FORMS if name == layout and dtype != torch.int8)
    weight = torch.zeros(17, 40, dtype=dtype)
    weight[3], weight[5, 4], weight[5, 7], weight[16, 39] = -0.0, torch.inf, -torch.inf, torch.finfo(dtype).tiny
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    weight.view(bits)[9, 8] = {2: 0x7FA1, 4: 0x7FA12345}[dtype.itemsize]  # a NaN with bits of its own
    got = ops.sparse_unpack(ops.sparse_prepack(weight, layout), 17, 40, dtype, layout)
    weight[3] = 0.0
    assert torch.equal(got.view(bits), weight.view(bits))


@pytest.mark.parametrize(("dtype", "layout"), FORMS)
def test_references_compute_the_dense_layer(dtype, layout):
    n, k = 33, 70
    weight, x = sparse_cases.gpu_weight(n, k, dtype, layout), cases.INPUTS["normal"](5, k, torch.float32)
    bias, packed = torch.randn(n, generator=sparse_cases.generator(layout)), ops.sparse_prepack(weight, layout)
    if dtype == torch.int8:
        scale = torch.rand(n, generator=sparse_cases.generator(n))
        got = ops.int8_sparse_linear(x, packed, scale, bias, layout)
        assert torch.equal(got, OPS["int8_linear"].reference(x, weight, scale, bias, None, 8, True, "none", None))
    else:
        got = ops.sparse_linear(x, packed, n, bias, layout)
        exact = x.double() @ weight.double().t() + bias
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", int4_sparse_cases.GPU_LAYOUTS)
def test_four_bits(layout):
    r, c = map(int, layout.removeprefix("gpu-").split("x"))
    for w, scale, group_size, name in int4_sparse_cases.GPU_SAMPLES["int4_sparse_prepack"]:
        if name != layout:
            continue
        n, k = w.shape
        packed = ops.int4_sparse_prepack(w, scale, group_size, layout)
        got = ops.int4_sparse_unpack(packed, n, k, group_size, scale.dtype, layout)
        assert torch.equal(got[0], w)
        assert torch.equal(got[1], scale)
        starts, values = [0], []
        for first in range(0, n, r):
            for group in range(0, k, group_size):
                for column in range(group, min(group + group_size, k), c):
                    part = w[first : first + r, column : column + c]
                    if part.count_nonzero():
                        block = torch.full((r, c), 8, dtype=torch.uint8)
                        block[: part.shape[0], : part.shape[1]] = part + 8
                        values.append(block[:, ::2] | block[:, 1::2] << 4)
                starts.append(len(values))
        found = int4_sparse_layout.parts(packed, n, k, group_size, scale.dtype, layout.removeprefix("gpu-"))
        assert found.start.tolist() == starts
        assert torch.equal(found.values, torch.cat([torch.empty(0, dtype=torch.uint8), *map(torch.flatten, values)]))
        for part in found:
            assert part.storage_offset() * part.element_size() % 16 == 0


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_the_cpu_says_why_not():
    weight, x = sparse_cases.gpu_weight(16, 32, torch.int8, "gpu-8x4"), torch.ones(2, 32)
    packed, floats = ops.sparse_prepack(weight, "gpu-8x4"), ops.sparse_prepack(weight.float(), "gpu-16x16")
    explanation = explain(ops.int8_sparse_linear, x, packed, torch.ones(16), layout="gpu-8x4")
    said = {candidate.name: candidate.reason for candidate in explanation.candidates}
    assert explanation.backend == "reference"
    assert said["cpu"] == "layout 'gpu-8x4': of the kernels for GPUs"
    with use_backend("cpu"):
        for call in (
            lambda: ops.sparse_prepack(torch.zeros_like(weight), "mma-2:4"),
            lambda: ops.sparse_unpack(packed, 16, 32, torch.int8, "gpu-8x4"),
            lambda: ops.sparse_linear(x, floats, 16, layout="gpu-16x16"),
            lambda: ops.int4_sparse_prepack(weight >> 4, torch.ones(16, 1), 32, "gpu-16x16"),
        ):
            with pytest.raises(RuntimeError, match="of the kernels for GPUs"):
                call()
    for op in ("sparse_prepack", "int4_sparse_prepack"):
        run, arguments = getattr(torch.ops.tcompress, op), cases.GPU_SAMPLES[op][0]
        with pytest.raises(RuntimeError, match="layout: expected 8x4"):
            run(*arguments)


@pytest.mark.parametrize(
    ("weight", "layout", "error", "text"),
    [
        (torch.ones(4, 8).char(), "gpu-2:4", ValueError, "weight: got more than two of four, expected at most two"),
        (torch.ones(4, 8), "gpu-2:4", ValueError, "weight: got more than two of four"),
        (torch.ones(4, 8).char(), "mma-2:4", ValueError, "weight: got more than two of four"),
        (torch.zeros(4, 8), "mma-2:4", ValueError, "layout: got 'mma-2:4', expected one of ('unstructured', '8x4') "),
        (torch.zeros(4, 8).half(), "gpu-8x4", ValueError, "layout: got 'gpu-8x4', expected one of ('gpu-2:4-float16',"),
        (torch.zeros(4, 8), "gpu-8x4-float16", ValueError, "layout: got 'gpu-8x4-float16', expected one of "),
        (torch.zeros(4, 8).char(), "gpu-8x4-float16", ValueError, "layout: got 'gpu-8x4-float16', expected one of "),
        (torch.zeros(4, 8).double(), "gpu-8x4", TypeError, "weight: got torch.float64, expected float32, float16, "),
        (torch.zeros(4, 8), "gpu-4x4", ValueError, "layout: got 'gpu-4x4', expected one of ("),
    ],
)
def test_errors(weight, layout, error, text):
    with pytest.raises(error) as raised:
        ops.sparse_prepack(weight, layout)
    assert str(raised.value).startswith(f"sparse_prepack: {text}")


@pytest.mark.parametrize("layout", ["gpu-8x4", "gpu-2:4", "mma-2:4"])
def test_sizes_that_no_weight_gives(layout):
    weight, x = sparse_cases.gpu_weight(17, 70, torch.int8, layout), torch.ones(2, 70)
    packed = ops.sparse_prepack(weight, layout)
    for wrong in (packed[1:], packed[None], packed[:0]):
        with pytest.raises(ValueError, match="int8_sparse_linear: kernel_weight: got"):
            ops.int8_sparse_linear(x, wrong, torch.ones(17), layout=layout)
    for n, k in ((-1, 70), (17, -1), (2**40, 70)):
        with pytest.raises(ValueError, match="sparse_unpack: kernel_weight: got"):
            ops.sparse_unpack(packed, n, k, torch.int8, layout)


def test_errors_of_four_bits():
    w, scale = torch.zeros(9, 40, dtype=torch.int8), torch.ones(9, 2)
    with pytest.raises(ValueError, match="int4_sparse_prepack: layout: got '16x16', expected one of"):
        ops.int4_sparse_prepack(w, scale, 32, "16x16")
    packed = ops.int4_sparse_prepack(w, scale, 32, "gpu-16x16")
    with pytest.raises(ValueError, match="int4_sparse_unpack: kernel_weight: got"):
        ops.int4_sparse_unpack(packed[4:], 9, 40, 32, torch.float32, "gpu-16x16")
    with pytest.raises(ValueError, match="int4_sparse_linear: kernel_weight: got"):
        ops.int4_sparse_linear(torch.ones(1, 40), packed[:-1], 9, None, 32, torch.float32, layout="gpu-16x16")
