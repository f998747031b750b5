"""`int4_sparse_unpack` is the inverse of `int4_sparse_prepack`, on every path and in the reference."""

import cases
import int4_sparse_cases as cases4
import pytest
import torch

from tcompress import ops, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["int4_sparse_unpack"]


@pytest.mark.parametrize("kept", cases4.KEPT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_inverse_of_prepack(kept, dtype):
    for n, k in cases4.SIZES:
        for group_size in cases4.GROUPS:
            w, scale = cases4.weight(n, k, kept), cases4.scales(n, k, group_size, dtype)
            arguments = (ops.int4_sparse_prepack(w, scale, group_size), n, k, group_size, dtype)
            results = [OP.reference(*arguments)]
            for path in cases.CPU_PATHS:
                with use_cpu_path(path):
                    results.append(ops.int4_sparse_unpack(*arguments))
            for got, got_scale in results:
                assert torch.equal(got, w)
                assert torch.equal(got_scale, scale)


PACKED = ops.int4_sparse_prepack(cases4.weight(9, 70), cases4.scales(9, 70, 32), 32)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((PACKED.float(), 9, 70, 32, torch.float16), TypeError, "kernel_weight: got torch.float32"),
        ((PACKED[:-1], 9, 70, 32, torch.float16), ValueError, "kernel_weight"),
        ((PACKED[:20], 9, 70, 32, torch.float16), ValueError, "kernel_weight"),
        ((PACKED, -1, 70, 32, torch.float16), ValueError, "kernel_weight"),
        ((PACKED, 9, 70, 33, torch.float16), ValueError, "group_size: got 33"),
        ((PACKED, 9, 70, 32, torch.bfloat16), TypeError, "scale_dtype: got torch.bfloat16"),
    ],
)
def test_refused(arguments, error, text):
    with pytest.raises(error, match=f"int4_sparse_unpack: .*{text}"):
        ops.int4_sparse_unpack(*arguments)
