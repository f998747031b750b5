"""What `sparse_linear` and `int8_sparse_linear` refuse and how they say so; what the dispatcher refuses when it is
called directly."""

import cases
import pytest
import sparse_cases
import torch

from tcompress import ops, use_backend
from tcompress.ops._registry import OPS
from tcompress.ops.sparse_prepack import parts

FLOAT, INT8 = OPS["sparse_linear"], OPS["int8_sparse_linear"]
X, _, SCALE, BIAS = cases.linear_operands(cases.Shape("arguments", 3, 9, 70), torch.float32)
WEIGHTS = {dtype: sparse_cases.weight(9, 70, dtype) for dtype in sparse_cases.LAYOUTS}
PACKED = ops.sparse_prepack(WEIGHTS[torch.float32], "8x4")
PACKED_INT8 = ops.sparse_prepack(WEIGHTS[torch.int8], "8x4")
RESIDUAL = torch.zeros(3, 9)
LONG = torch.zeros(1, 65537)

BOTH = (
    ({"x": [1.0]}, TypeError, "x: got list, expected a tensor"),
    ({"x": X.double()}, TypeError, "x: got torch.float64, expected float32, bfloat16 or float16"),
    ({"x": X.int()}, TypeError, "x: got torch.int32, expected "),
    ({"x": torch.tensor(1.0)}, ValueError, "x: got a 0-d tensor, expected [..., K]"),
    ({"x": torch.zeros(3, 65536)}, ValueError, "kernel_weight: got ["),
    ({"kernel_weight": PACKED.view(torch.uint8)}, TypeError, "kernel_weight: got torch.uint8, expected int8, from "),
    ({"kernel_weight": PACKED[:-1]}, ValueError, f"kernel_weight: got [{PACKED.numel() - 1}], expected ["),
    ({"kernel_weight": PACKED[:0]}, ValueError, "kernel_weight: got [0], expected ["),
    ({"kernel_weight": PACKED[None]}, ValueError, "kernel_weight: got [1, "),
    ({"bias": BIAS.int()}, TypeError, "bias: got torch.int32, expected a float tensor"),
    ({"bias": BIAS[:1]}, ValueError, "bias: got [1], expected [9]"),
    ({"layout": "16x16"}, ValueError, "layout: got '16x16', expected one of "),
    ({"activation": "GELU"}, ValueError, "activation: got 'GELU', expected one of "),
    ({"out_dtype": torch.float64}, TypeError, "out_dtype: got torch.float64, expected "),
    ({"out_dtype": torch.int8}, TypeError, "out_dtype: got torch.int8, expected "),
    ({"residual": RESIDUAL.half()}, TypeError, "residual: got torch.float16, expected torch.float32, the type of "),
    ({"residual": RESIDUAL[:2]}, ValueError, "residual: got [2, 9], expected [3, 9]"),
    ({"residual": RESIDUAL[:1]}, ValueError, "residual: got [1, 9], expected [3, 9]"),
)


def assert_refused(op, arguments, error, text):
    for backend in ("cpu", "reference"):
        with use_backend(backend), pytest.raises(error) as raised:
            getattr(ops, op)(**arguments)
        assert str(raised.value).startswith(f"{op}: {text}")


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        *BOTH,
        ({"layout": "1x4"}, ValueError, "layout: got '1x4', expected one of ('unstructured', '8x4') for torch.float32"),
        ({"out_features": 1700}, ValueError, "kernel_weight: got ["),
        ({"out_features": -1}, ValueError, "kernel_weight: got ["),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype: got torch.int32, expected float32, bfloat16 or float16"),
    ],
)
def test_errors_of_floats(changed, error, text):
    arguments = {"x": X, "kernel_weight": PACKED, "out_features": 9, "bias": BIAS, "layout": "8x4", **changed}
    assert_refused("sparse_linear", arguments, error, text)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        *BOTH,
        (
            {"layout": "unstructured"},
            ValueError,
            "layout: got 'unstructured', expected one of ('1x4', '8x4', '2:4') for ",
        ),
        ({"weight_scale": SCALE.double()}, TypeError, "weight_scale: got torch.float64, expected float32"),
        ({"weight_scale": SCALE[:, None]}, ValueError, "weight_scale: got [9, 1], expected [N]"),
        ({"weight_scale": torch.ones(1700), "bias": None}, ValueError, "kernel_weight: got ["),
        ({"act_bits": 1}, ValueError, "act_bits: got 1, expected 2 to 8"),
        ({"act_bits": 9}, ValueError, "act_bits: got 9, expected 2 to 8"),
        ({"act_symmetric": False}, ValueError, "act_bits: got 8, expected 2 to 7"),
        (
            {"out_dtype": torch.int32, "residual": RESIDUAL.int()},
            ValueError,
            "residual: got a tensor, expected None with out_dtype=torch.int32",
        ),
    ],
)
def test_errors_of_integers(changed, error, text):
    arguments = {"x": X, "kernel_weight": PACKED_INT8, "weight_scale": SCALE, "bias": BIAS, "layout": "8x4", **changed}
    assert_refused("int8_sparse_linear", arguments, error, text)


def test_a_sum_that_could_leave_int32_is_refused():
    packed = ops.sparse_prepack(LONG.char(), "1x4")
    text = "K: got 65537, expected at most 65536; a longer sum could leave int32"
    assert_refused(
        "int8_sparse_linear", {"x": LONG, "kernel_weight": packed, "weight_scale": SCALE[:1]}, ValueError, text
    )
    with pytest.raises(RuntimeError, match="sparse_linear: K: expected at most 65536"):
        torch.ops.tcompress.int8_sparse_linear(LONG, packed, SCALE[:1], None, "1x4", 8, True, "none", None)
    packed = ops.sparse_prepack(LONG, "unstructured")
    assert ops.sparse_linear(LONG, packed, 1).tolist() == [[0.0]]  # of floats, any


# ---- the dispatcher by itself ----------------------------------------------------------------------------------------

FLOATS = {
    "x": X,
    "kernel_weight": PACKED,
    "out_features": 9,
    "bias": BIAS,
    "layout": "8x4",
    "activation": "none",
    "out_dtype": None,
    "residual": None,
}
INTEGERS = {
    "x": X,
    "kernel_weight": PACKED_INT8,
    "weight_scale": SCALE,
    "bias": BIAS,
    "layout": "8x4",
    "act_bits": 8,
    "act_symmetric": True,
    "activation": "none",
    "out_dtype": None,
    "residual": None,
}


def number_of_blocks(packed, dtype):
    """Its last offset, as a view."""
    where = parts(9, 70, dtype, "8x4", 0)
    return packed[where["offsets"] : where["column_sums"]].view(torch.int32)[2:]


def claims_another_number_of_blocks(packed):
    lying = packed.clone()
    number_of_blocks(lying, torch.float32 if packed is PACKED else torch.int8).sub_(1)
    return lying


CHANGED = (
    {"x": X.double()},
    {"x": X.int()},
    {"x": torch.tensor(1.0)},
    {"x": X[:, :0]},
    {"x": torch.zeros(3, 1700)},
    {"bias": BIAS[:8]},
    {"bias": BIAS[:0]},
    {"layout": "16x16"},
    {"activation": "tanh"},
    {"out_dtype": torch.float64},
    {"out_dtype": torch.int8},
    {"out_dtype": torch.bool},
    {"residual": RESIDUAL.half()},
    {"residual": RESIDUAL[:2]},
    {"out_dtype": torch.int32, "residual": RESIDUAL.int()},
)


@pytest.mark.parametrize(
    ("op", "arguments", "changed"),
    [("sparse_linear", FLOATS, c) for c in CHANGED]
    + [("int8_sparse_linear", INTEGERS, c) for c in CHANGED]
    + [
        (op, arguments, {"kernel_weight": wrong(arguments["kernel_weight"])})
        for op, arguments in (("sparse_linear", FLOATS), ("int8_sparse_linear", INTEGERS))
        for wrong in (
            lambda p: p[:-1],
            lambda p: p[:-32],
            lambda p: p[:0],
            lambda p: p.repeat(2)[::2],
            lambda p: p.view(torch.uint8),
            lambda p: torch.full_like(p, -1),
            lambda p: torch.zeros_like(p),
            claims_another_number_of_blocks,
        )
    ]
    + [
        ("sparse_linear", FLOATS, {"x": X[:, :64]}),  # a word less
        ("sparse_linear", FLOATS, {"kernel_weight": PACKED_INT8}),
        ("sparse_linear", FLOATS, {"layout": "unstructured"}),
        ("sparse_linear", FLOATS, {"layout": "1x4"}),
        ("sparse_linear", FLOATS, {"out_dtype": torch.int32}),
        ("sparse_linear", FLOATS, {"out_features": 17, "bias": None}),
        ("sparse_linear", FLOATS, {"out_features": -1, "bias": None}),
        ("sparse_linear", FLOATS, {"out_features": 2**62, "bias": None}),
        ("sparse_linear", FLOATS, {"out_features": 2**63 - 1, "bias": None}),
        ("int8_sparse_linear", INTEGERS, {"kernel_weight": PACKED}),
        ("int8_sparse_linear", INTEGERS, {"layout": "1x4"}),
        ("int8_sparse_linear", INTEGERS, {"layout": "unstructured"}),
        ("int8_sparse_linear", INTEGERS, {"weight_scale": SCALE.double()}),
        ("int8_sparse_linear", INTEGERS, {"weight_scale": SCALE[:, None]}),
        ("int8_sparse_linear", INTEGERS, {"weight_scale": torch.ones(17), "bias": None}),
        ("int8_sparse_linear", INTEGERS, {"weight_scale": SCALE[:0], "bias": None}),
        ("int8_sparse_linear", INTEGERS, {"act_bits": 0}),
        ("int8_sparse_linear", INTEGERS, {"act_bits": 9}),
        ("int8_sparse_linear", INTEGERS, {"act_bits": 2**32 + 8}),
        ("int8_sparse_linear", INTEGERS, {"act_symmetric": False}),  # with 8 bits
    ],
)
def test_dispatcher_guards_memory_by_itself(op, arguments, changed):
    call = getattr(torch.ops.tcompress, op)
    assert call(*arguments.values()).shape == (3, 9)
    with pytest.raises(RuntimeError):
        call(*{**arguments, **changed}.values())


@pytest.mark.parametrize(
    ("op", "arguments", "dtype"),
    [("sparse_linear", FLOATS, torch.float32), ("int8_sparse_linear", INTEGERS, torch.int8)],
)
def test_anything_that_fits_is_computed_without_harm(op, arguments, dtype):
    """Of random bytes with the right number of blocks no more is asked than that nothing is touched beside them."""
    g = sparse_cases.generator("bytes")
    good = arguments["kernel_weight"]
    for m in (1, 7, 33):
        for _ in range(20):
            packed = torch.randint(-128, 128, good.shape, dtype=torch.int8, generator=g)
            number_of_blocks(packed, dtype).copy_(number_of_blocks(good, dtype))
            x = torch.randn(m, 70, generator=g)
            y = getattr(torch.ops.tcompress, op)(*{**arguments, "x": x, "kernel_weight": packed}.values())
            assert y.shape == (m, 9)


def test_flops_and_bytes():
    """3 tokens in bfloat16; what is not kept costs nothing."""
    x = X.bfloat16()
    assert FLOAT.flops(x, PACKED, 9) == 2 * 3 * (PACKED.nbytes // 4)
    assert FLOAT.nbytes(x, PACKED, 9) == PACKED.nbytes + (3 * 70 + 3 * 9) * 2
    assert INT8.flops(x, PACKED_INT8) == 2 * 3 * PACKED_INT8.nbytes
    assert INT8.nbytes(x, PACKED_INT8, SCALE) == PACKED_INT8.nbytes + 8 * 9 + (3 * 70 + 3 * 9) * 2
    assert FLOAT.flops(torch.zeros(3, 0), PACKED, 9) == 0
