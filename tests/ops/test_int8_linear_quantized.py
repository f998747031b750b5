"""`int8_linear_quantized` against its reference; its place behind `int8_linear_requantize` is tested there."""

import cases
import pytest
import torch

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["int8_linear_quantized"]


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("shape", [s for s in cases.SHAPES if s.k <= 2049], ids=str)
def test_integers_equal_the_reference(shape, path):
    x, weight, scale, _ = cases.linear_operands(shape, torch.bfloat16)
    for scheme in ((8, True), (7, False)):
        q = ops.quantize_per_token(x, *scheme)
        with use_backend("cpu"), use_cpu_path(path):
            got = ops.int8_linear_quantized(*q, weight, scale, out_dtype=torch.int32)
        assert torch.equal(got, OP.reference(*q, weight, scale, None, None, "none", torch.int32, None))


def test_strides_do_not_matter():
    x, weight, scale, bias = cases.linear_operands(cases.Shape("strides", 6, 20, 32), torch.float32)
    q, s, z = ops.quantize_per_token(x)
    strided = q.t().contiguous().t()
    expected = ops.int8_linear_quantized(q, s, z, weight, scale, bias)
    assert torch.equal(ops.int8_linear_quantized(strided, s, z, weight, scale, bias), expected)
    expanded = s[:1].expand(6, 1), z[:1].expand(6, 1)
    dense = tuple(t.contiguous() for t in expanded)
    same = [ops.int8_linear_quantized(q, *parts, weight, scale, bias) for parts in (expanded, dense)]
    assert torch.equal(*same)
