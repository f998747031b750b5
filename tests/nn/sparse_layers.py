"""Pruned linear layers, `SparseLinear` around them, and what they are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tcompress.nn import QuantizedLinear, SparseLinear
from tcompress.ops.sparse_prepack import LAYOUTS
from tcompress.prune import magnitude_mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES = (None, "W8A8", "W7A7")
PATTERNS = ("unstructured", "2:4", "1x4", "8x4", "16x16")
FLOATS = ("dense", *LAYOUTS[torch.float32])
INTEGERS = ("dense", *LAYOUTS[torch.int8])
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu}
#: Each layout of floats and integers.
KERNELS = [(None, layout) for layout in FLOATS] + [("W8A8", layout) for layout in INTEGERS]


def pruned(n=29, k=70, pattern="unstructured", sparsity=0.8, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    mask = magnitude_mask(linear.weight, pattern, None if ":" in pattern else sparsity)
    with torch.no_grad():
        linear.weight.mul_(mask)
    return linear


def sparse(linear=None, scheme=None, layout="dense", **kwargs):
    return SparseLinear.from_linear(pruned() if linear is None else linear, scheme, layout=layout, **kwargs)


def tokens(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_computes(module, linear, x):
    """The quantized layer's numbers bit for bit, or those of the float layer as near as torch comes to them itself."""
    y = module(x)
    assert (y.dtype, y.shape) == (x.dtype, (*x.shape[:-1], module.out_features))
    if module.scheme is not None:
        assert torch.equal(y, QuantizedLinear.from_linear(linear, module.scheme)(x))
        return
    bias = None if linear.bias is None else linear.bias.double()
    exact = F.linear(x.double(), linear.weight.double(), bias)
    same = F.linear(x, linear.weight.to(x.dtype), None if bias is None else linear.bias.to(x.dtype))
    theirs = (same.double() - exact).norm()
    assert (y.double() - exact).norm() <= 4 * theirs + 1e-6 * exact.norm()


def assert_same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key], b[key]), key
