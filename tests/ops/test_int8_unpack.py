"""`int8_unpack` is the inverse of `int8_prepack`, on every path and in the reference."""

import cases
import oracle
import pytest
import torch

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["int8_unpack"]
SIZES = sorted({(shape.n, shape.k) for shape in cases.SHAPES})
WEIGHT = cases.random_weight(50, 21)
PACKED = ops.int8_prepack(WEIGHT)
BACKENDS = ("cpu", "reference")


def unpack(rows, backend="cpu", packed=PACKED, n=50, k=21):
    with use_backend(backend):
        return ops.int8_unpack(packed, n, k, rows)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_inverse_of_prepack(n, k):
    weight = cases.random_weight(n, k)
    packed = ops.int8_prepack(weight)
    assert oracle.same_bits(OP.reference(packed, n, k), weight)
    for path in cases.CPU_PATHS:
        with use_cpu_path(path):
            assert oracle.same_bits(unpack(None, "cpu", packed, n, k), weight), path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rows", [[], [0], [49], [7, 7, 7], [49, 0, 48, 47, 15, 16, 15], list(range(50)), list(range(49, -1, -1)) * 3]
)
def test_rows_in_any_order_and_number(backend, rows):
    got = unpack(torch.tensor(rows, dtype=torch.int64), backend)
    assert oracle.same_bits(got, WEIGHT[rows])
    assert got.stride() == (21, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_any_strides(backend):
    rows = torch.tensor([3, -9, 49, 10**12, 0, 77])
    assert oracle.same_bits(unpack(rows[::2], backend), WEIGHT[[3, 49, 0]])
    assert oracle.same_bits(unpack(torch.tensor([5]).expand(4), backend), WEIGHT[[5] * 4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 5, 50])
@pytest.mark.parametrize("row", ["N", -1, -50, 2**31, 2**32, -(2**63), 2**63 - 1])
def test_a_row_that_is_not_there_raises(backend, n, row):
    packed = ops.int8_prepack(WEIGHT[:n])
    rows = torch.tensor([0, n if row == "N" else row])[1 if n == 0 else 0 :]
    with pytest.raises((RuntimeError, IndexError)):
        unpack(rows, backend, packed, n)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_inputs_and_no_outputs(backend):
    none = torch.tensor([], dtype=torch.int64)
    assert unpack(None, backend, ops.int8_prepack(WEIGHT[:0]), 0, 21).shape == (0, 21)
    assert unpack(none, backend, ops.int8_prepack(WEIGHT[:0]), 0, 21).shape == (0, 21)
    assert unpack(torch.tensor([4, 4, 1]), backend, ops.int8_prepack(WEIGHT[:, :0]), 50, 0).shape == (3, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_is_memory_of_its_own(backend):
    weight = cases.random_weight(1, 4)
    packed = ops.int8_prepack(weight)
    unpack(None, backend, packed, 1, 4).zero_()
    assert oracle.same_bits(unpack(None, backend, packed, 1, 4), weight)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_for_any_number_of_threads(threads):
    weight = cases.random_weight(301, 2049)
    rows = torch.randint(301, (400,), generator=cases.generator("rows"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        packed = ops.int8_prepack(weight)
        assert oracle.same_bits(unpack(None, "cpu", packed, 301, 2049), weight)
        assert oracle.same_bits(unpack(rows, "cpu", packed, 301, 2049), weight[rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"kernel_weight": PACKED.view(torch.uint8)}, TypeError, "kernel_weight: got torch.uint8, expected int8"),
        ({"kernel_weight": PACKED[1:]}, ValueError, "kernel_weight: got [1803], expected [1804] for N=50, K=21"),
        ({"kernel_weight": PACKED.repeat(2)}, ValueError, "kernel_weight: got [3608], expected [1804]"),
        ({"n": 65}, ValueError, "kernel_weight: got [1804], expected ["),
        ({"n": -1}, ValueError, "kernel_weight: got [1804], expected sizes of at least 0"),
        ({"k": 25}, ValueError, "kernel_weight: got [1804], expected ["),
        ({"k": -1}, ValueError, "kernel_weight: got [1804], expected sizes of at least 0"),
        ({"rows": torch.tensor([0], dtype=torch.int32)}, TypeError, "rows: got torch.int32, expected int64"),
        ({"rows": torch.tensor([0.0])}, TypeError, "rows: got torch.float32, expected int64"),
        ({"rows": torch.tensor(0)}, ValueError, "rows: got [], expected [R]"),
        ({"rows": torch.tensor([[0]])}, ValueError, "rows: got [1, 1], expected [R]"),
    ],
)
def test_errors(changed, error, text):
    arguments = {"kernel_weight": PACKED, "n": 50, "k": 21, "rows": None, **changed}
    for backend in BACKENDS:
        with use_backend(backend), pytest.raises(error) as raised:
            ops.int8_unpack(**arguments)
        assert str(raised.value).startswith(f"int8_unpack: {text}")
    with pytest.raises(RuntimeError):
        torch.ops.tcompress.int8_unpack(*arguments.values())


def test_flops_and_bytes():
    assert OP.flops(PACKED, 50, 21) == 0
    assert OP.nbytes(PACKED, 50, 21, None) == 2 * 50 * 21
    assert OP.nbytes(PACKED, 50, 21, torch.tensor([1, 1])) == 2 * 2 * 21
