"""`int8_linear_static`: integers as those of its reference, results as those of the two ops that it joins."""

from __future__ import annotations

import cases
import oracle
import pytest
import torch

from tcompress import explain, ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["int8_linear_static"]
SCALE = torch.tensor(0.0213)


def zero_of(bits, symmetric):
    return None if symmetric else torch.tensor(2**bits // 3, dtype=torch.int32)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("shape", [s for s in cases.SHAPES if s.k <= 2049], ids=str)
def test_integers_equal_the_reference(shape, path):
    x, weight, scale, _ = cases.linear_operands(shape, torch.bfloat16)
    for bits, symmetric in ((8, True), (7, False), (4, True)):
        fixed, kind = (SCALE, zero_of(bits, symmetric)), (bits, symmetric)
        with use_backend("cpu"), use_cpu_path(path):
            got = ops.int8_linear_static(x, *fixed, weight, scale, None, None, *kind, out_dtype=torch.int32)
        assert torch.equal(got, OP.reference(x, *fixed, weight, scale, None, None, *kind, "none", torch.int32))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("name", cases.INPUTS)
def test_it_is_the_two_ops_in_one(name, path):
    """Bit for bit, with all that follows the sums: both end in the same code."""
    for m, n, k in ((1, 33, 20), (5, 17, 37), (33, 50, 71)):
        shape = cases.Shape("two", m, n, k)
        _, weight, scale, bias = cases.linear_operands(shape, torch.float32)
        packed = ops.int8_prepack(weight)
        for dtype in cases.DTYPES:
            x = cases.INPUTS[name](m, k, dtype)
            residual = torch.ones(m, n, dtype=dtype)
            for bits, symmetric in ((8, True), (7, False)):
                fixed = (SCALE, zero_of(bits, symmetric))
                with use_backend("cpu"), use_cpu_path(path):
                    q = ops.quantize_static(x, *fixed, bits, symmetric)
                    for activation in ("none", "gelu"):
                        rest = (weight, scale, bias, packed)
                        expected = ops.int8_linear_quantized(*q, *rest, activation, dtype, residual)
                        got = ops.int8_linear_static(x, *fixed, *rest, bits, symmetric, activation, None, residual)
                        assert oracle.same_bits(got, expected), (name, path, m, n, k, dtype, bits, activation)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_strides_do_not_matter(layout):
    _, weight, scale, bias = cases.linear_operands(cases.Shape("strides", 6, 18, 20), torch.float32)
    x = cases.LAYOUTS[layout](cases.INPUTS["normal"](6, 20, torch.float32))
    expected = ops.int8_linear_static(x.contiguous(), SCALE, None, weight, scale, bias)
    assert torch.equal(ops.int8_linear_static(x, SCALE, None, weight, scale, bias), expected)


def test_threads_give_the_same():
    x, weight, scale, bias = cases.linear_operands(cases.Shape("threads", 301, 64, 127), torch.float32)
    expected = ops.int8_linear_static(x, SCALE, None, weight, scale, bias)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(ops.int8_linear_static(x, SCALE, None, weight, scale, bias), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"input_scale": torch.ones(3)}, ValueError, r"input_scale: got \[3\], expected one number"),
        ({"input_zero_point": torch.tensor(1, dtype=torch.int32)}, TypeError, "input_zero_point: got a tensor"),
        ({"act_symmetric": False, "act_bits": 7}, TypeError, "input_zero_point: got None"),
        ({"act_bits": 9}, ValueError, "act_bits: got 9"),
        ({"weight": torch.ones(2, 4, dtype=torch.int8)}, ValueError, r"x, weight: got \[2, 3\], \[2, 4\]"),
        ({"activation": "tanh"}, ValueError, "activation: got 'tanh'"),
        ({"residual": torch.ones(2, 3)}, ValueError, r"residual: got \[2, 3\]"),
    ],
)
def test_wrong_arguments(changes, error, text):
    arguments = {
        "x": torch.ones(2, 3),
        "input_scale": torch.tensor(1.0),
        "input_zero_point": None,
        "weight": torch.ones(2, 3, dtype=torch.int8),
        "weight_scale": torch.ones(2),
    }
    with pytest.raises(error, match=f"int8_linear_static: {text}"):
        ops.int8_linear_static(**arguments | changes)


def test_explain():
    arguments = (torch.ones(2, 3), SCALE, None, torch.ones(2, 3, dtype=torch.int8), torch.ones(2))
    assert explain("int8_linear_static", *arguments).backend == "cpu"
