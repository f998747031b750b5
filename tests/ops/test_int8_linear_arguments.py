"""What `int8_linear` refuses and how it says so; what the dispatcher refuses when it is called directly."""

import cases
import pytest
import torch

from tcompress import ops, use_backend
from tcompress.ops._registry import OPS

OP = OPS["int8_linear"]
X, WEIGHT, SCALE, BIAS = cases.linear_operands(cases.Shape("arguments", 3, 5, 8), torch.float32)
PACKED = ops.int8_prepack(WEIGHT)
LONG = torch.zeros(1, 65537)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"x": [1.0]}, TypeError, "int8_linear: x: got list, expected a tensor"),
        ({"x": X.double()}, TypeError, "int8_linear: x: got torch.float64, expected float32, bfloat16 or float16"),
        ({"x": X.int()}, TypeError, "int8_linear: x: got torch.int32, expected "),
        ({"x": torch.tensor(1.0)}, ValueError, "int8_linear: x: got a 0-d tensor, expected [..., K]"),
        ({"weight": WEIGHT.float()}, TypeError, "int8_linear: weight: got torch.float32, expected int8; "),
        ({"weight": WEIGHT.to(torch.uint8)}, TypeError, "int8_linear: weight: got torch.uint8, expected int8; "),
        ({"weight": WEIGHT[0]}, ValueError, "int8_linear: x, weight: got [3, 8], [8], expected [..., K], [N, K]"),
        ({"x": X[:, :7]}, ValueError, "int8_linear: x, weight: got [3, 7], [5, 8], expected "),
        ({"x": LONG, "weight": LONG.char()}, ValueError, "int8_linear: K: got 65537, expected at most 65536; "),
        ({"weight_scale": SCALE.double()}, TypeError, "int8_linear: weight_scale: got torch.float64, expected float32"),
        ({"weight_scale": SCALE.half()}, TypeError, "int8_linear: weight_scale: got torch.float16, expected float32"),
        ({"weight_scale": SCALE[:4]}, ValueError, "int8_linear: weight_scale: got [4], expected [5]"),
        ({"weight_scale": SCALE[:, None]}, ValueError, "int8_linear: weight_scale: got [5, 1], expected [5]"),
        ({"bias": BIAS.int()}, TypeError, "int8_linear: bias: got torch.int32, expected a float tensor"),
        ({"bias": BIAS[:1]}, ValueError, "int8_linear: bias: got [1], expected [5]"),
        ({"act_bits": 1}, ValueError, "int8_linear: act_bits: got 1, expected 2 to 8"),
        ({"act_bits": 9}, ValueError, "int8_linear: act_bits: got 9, expected 2 to 8"),
        ({"act_bits": 8, "act_symmetric": False}, ValueError, "int8_linear: act_bits: got 8, expected 2 to 7"),
        ({"activation": "GELU"}, ValueError, "int8_linear: activation: got 'GELU', expected one of "),
        ({"activation": ""}, ValueError, "int8_linear: activation: got '', expected one of "),
        ({"out_dtype": torch.float64}, TypeError, "int8_linear: out_dtype: got torch.float64, expected "),
        ({"out_dtype": torch.int8}, TypeError, "int8_linear: out_dtype: got torch.int8, expected "),
    ],
)
def test_errors(changed, error, text):
    arguments = {"x": X, "weight": WEIGHT, "weight_scale": SCALE, "bias": BIAS, **changed}
    for backend in ("cpu", "reference"):
        with use_backend(backend), pytest.raises(error) as raised:
            ops.int8_linear(**arguments)
        assert str(raised.value).startswith(text)


DEFAULTS = {  # in the order of the schema
    "x": X,
    "weight": WEIGHT,
    "weight_scale": SCALE,
    "bias": BIAS,
    "kernel_weight": PACKED,
    "act_bits": 8,
    "act_symmetric": True,
    "activation": "none",
    "out_dtype": None,
}


@pytest.mark.parametrize(
    "changed",
    [
        {"x": X.double()},
        {"x": X.int()},
        {"x": torch.tensor(1.0)},
        {"x": X[:, :7]},
        {"x": X[:, :0]},
        {"weight": WEIGHT.float()},
        {"weight": WEIGHT[0]},
        {"weight": WEIGHT[:4]},
        {"weight": WEIGHT[None]},
        {"x": LONG, "weight": LONG.char(), "weight_scale": torch.ones(1), "bias": None, "kernel_weight": None},
        {"weight_scale": SCALE.double()},
        {"weight_scale": SCALE[:4]},
        {"weight_scale": SCALE[:0]},
        {"bias": BIAS[:4]},
        {"bias": BIAS[:0]},
        {"kernel_weight": PACKED[:-1]},
        {"kernel_weight": PACKED[:0]},
        {"kernel_weight": PACKED.repeat(2)[::2]},
        {"kernel_weight": PACKED.to(torch.uint8)},
        {"kernel_weight": PACKED.int()},
        {"kernel_weight": ops.int8_prepack(cases.random_weight(17, 8))},
        {"act_bits": 0},
        {"act_bits": 9},
        {"act_bits": -(2**40)},
        {"act_bits": 2**32 + 8},
        {"act_symmetric": False},  # with 8 bits
        {"activation": "tanh"},
        {"out_dtype": torch.float64},
        {"out_dtype": torch.int8},
        {"out_dtype": torch.bool},
        {"out_dtype": torch.complex64},
    ],
)
def test_dispatcher_guards_memory_by_itself(changed):
    call = torch.ops.tcompress.int8_linear
    assert call(*DEFAULTS.values()).shape == (3, 5)
    with pytest.raises(RuntimeError):
        call(*{**DEFAULTS, **changed}.values())


def test_a_weight_packed_for_another_shape_is_refused():
    with use_backend("cpu"), pytest.raises(RuntimeError, match="int8_linear: kernel_weight: expected the result of"):
        ops.int8_linear(X, WEIGHT, SCALE, kernel_weight=ops.int8_prepack(cases.random_weight(17, 8)))


def test_flops_and_bytes():
    """2 x 3 tokens of 8 bfloat16 to 5 outputs."""
    x = torch.zeros(2, 3, 8, dtype=torch.bfloat16)
    arguments = (x, WEIGHT, SCALE, BIAS, None, 8, True, "none", None)
    assert OP.flops(*arguments) == 2 * 6 * 5 * 8
    # int8 weight, float32 scale and bias, bfloat16 in and out
    assert OP.nbytes(*arguments) == 5 * 8 + 5 * (4 + 4) + (6 * 8 + 6 * 5) * 2
    assert OP.flops(torch.zeros(3, 0), torch.zeros(5, 0, dtype=torch.int8), SCALE) == 0
