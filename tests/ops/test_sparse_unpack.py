"""`sparse_unpack` is the inverse of `sparse_prepack`, on every path and in the reference."""

import cases
import pytest
import sparse_cases
import torch

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["sparse_unpack"]
BACKENDS = ("cpu", "reference")
WEIGHT = sparse_cases.weight(9, 70, torch.float32)
PACKED = ops.sparse_prepack(WEIGHT, "8x4")


def same_bits(a, b):
    """Every bit, those of a NaN too."""
    integers = torch.int32 if a.dtype == torch.float32 else torch.int8
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


@pytest.mark.parametrize("pattern", sparse_cases.PATTERNS)
@pytest.mark.parametrize(("dtype", "layout"), sparse_cases.FORMS)
def test_inverse_of_prepack(dtype, layout, pattern):
    for n, k in sparse_cases.SIZES:
        weight = sparse_cases.weight(n, k, dtype, pattern)
        packed = ops.sparse_prepack(weight, layout)
        got = OP.reference(packed, n, k, dtype, layout)
        assert same_bits(got, weight)
        assert got.is_contiguous()
        for path in cases.CPU_PATHS:
            with use_backend("cpu"), use_cpu_path(path):
                assert same_bits(ops.sparse_unpack(packed, n, k, dtype, layout), weight), path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", sparse_cases.LAYOUTS[torch.float32])
def test_special_floats(backend, layout):
    weight = sparse_cases.weight(17, 130, torch.float32)
    weight[::2, ::3], weight[::3, 5], weight[4, 6:60:5], weight[5, 7] = -0.0, float("inf"), float("nan"), 1e-45
    weight[16, 129] = torch.tensor(-0x5EDCBB, dtype=torch.int32).view(torch.float32)  # a NaN with bits of its own
    assert weight[16, 129].isnan()
    with use_backend(backend):
        got = ops.sparse_unpack(ops.sparse_prepack(weight, layout), 17, 130, torch.float32, layout)
    assert same_bits(got, weight.masked_fill(weight == 0, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", cases.WEIGHTS)
def test_extreme_integers(backend, name):
    for n, k in ((51, 1030), (1, 3)):
        weight = cases.WEIGHTS[name](n, k)
        for layout in sparse_cases.LAYOUTS[torch.int8]:
            with use_backend(backend):
                got = ops.sparse_unpack(ops.sparse_prepack(weight, layout), n, k, torch.int8, layout)
            assert same_bits(got, weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_is_memory_of_its_own(backend):
    weight = torch.ones(1, 1)
    packed = ops.sparse_prepack(weight, "unstructured")
    with use_backend(backend):
        ops.sparse_unpack(packed, 1, 1, torch.float32, "unstructured").zero_()
        assert same_bits(ops.sparse_unpack(packed, 1, 1, torch.float32, "unstructured"), weight)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "layout"), sparse_cases.FORMS)
def test_same_for_any_number_of_threads(dtype, layout, threads):
    weight = sparse_cases.weight(301, 2049, dtype, "5 %")
    packed = ops.sparse_prepack(weight, layout)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same_bits(ops.sparse_unpack(packed, 301, 2049, dtype, layout), weight)
    finally:
        torch.set_num_threads(before)


ARGUMENTS = {"kernel_weight": PACKED, "n": 9, "k": 70, "dtype": torch.float32, "layout": "8x4"}
SIZE = PACKED.numel()


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        (
            {"kernel_weight": PACKED.view(torch.uint8)},
            TypeError,
            "kernel_weight: got torch.uint8, expected int8, from ",
        ),
        ({"kernel_weight": PACKED[1:]}, ValueError, f"kernel_weight: got [{SIZE - 1}], expected [128 + 32 a block] "),
        (
            {"kernel_weight": PACKED[:0]},
            ValueError,
            "kernel_weight: got [0], expected [128 + 32 a block] for N=9, K=70",
        ),
        ({"kernel_weight": PACKED[None]}, ValueError, f"kernel_weight: got [1, {SIZE}], expected [128 + "),
        ({"n": -1}, ValueError, f"kernel_weight: got [{SIZE}], expected ["),
        ({"k": -1}, ValueError, f"kernel_weight: got [{SIZE}], expected ["),
        ({"k": 2**40}, ValueError, f"kernel_weight: got [{SIZE}], expected ["),
        ({"dtype": torch.float16}, TypeError, "dtype: got torch.float16, expected float32 or int8"),
        ({"dtype": torch.int32}, TypeError, "dtype: got torch.int32, expected float32 or int8"),
        ({"layout": "1x4"}, ValueError, "layout: got '1x4', expected one of ('unstructured', '8x4') for "),
        ({"layout": "16x16"}, ValueError, "layout: got '16x16', expected one of "),
    ],
)
def test_errors(changed, error, text):
    arguments = {**ARGUMENTS, **changed}
    for backend in BACKENDS:
        with use_backend(backend), pytest.raises(error) as raised:
            ops.sparse_unpack(**arguments)
        assert str(raised.value).startswith(f"sparse_unpack: {text}")


LARGER = 2**31 - 1


@pytest.mark.parametrize(
    "changed",
    [
        {"kernel_weight": PACKED.view(torch.uint8)},
        {"kernel_weight": PACKED[:-1]},
        {"kernel_weight": PACKED[:-32]},  # a block less than it says
        {"kernel_weight": PACKED[:0]},
        {"kernel_weight": PACKED.repeat(2)[::2]},
        {"kernel_weight": torch.full_like(PACKED, -1)},
        {"n": 17},
        {"k": 129},
        {"n": -1},
        {"k": -1},
        {"n": LARGER},
        {"k": LARGER},
        {"n": LARGER, "k": LARGER},
        {"kernel_weight": torch.zeros(128, dtype=torch.int8), "n": 2**62, "k": 0, "layout": "unstructured"},
        {"n": 2**63 - 1},
        {"k": 2**63 - 1},
        {"dtype": torch.float16},
        {"dtype": torch.int8},
        {"layout": "unstructured"},
        {"layout": "1x4"},
    ],
)
def test_dispatcher_guards_memory_by_itself(changed):
    call = torch.ops.tcompress.sparse_unpack
    assert call(*ARGUMENTS.values()).shape == (9, 70)
    with pytest.raises(RuntimeError):
        call(*{**ARGUMENTS, **changed}.values())


def test_flops_and_bytes():
    assert OP.flops(PACKED, 9, 70, torch.float32, "8x4") == 0
    assert OP.nbytes(PACKED, 9, 70, torch.float32, "8x4") == SIZE + 9 * 70 * 4
