"""`int4_sparse_prepack`: the same kernel layout from the extension and from the reference."""

import int4_sparse_cases as cases4
import pytest
import torch

from tcompress import ops
from tcompress.ops._registry import OPS

OP = OPS["int4_sparse_prepack"]


@pytest.mark.parametrize("kept", cases4.KEPT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_same_as_the_reference(kept, dtype):
    for n, k in cases4.SIZES:
        for group_size in cases4.GROUPS:
            w, scale = cases4.weight(n, k, kept), cases4.scales(n, k, group_size, dtype)
            assert torch.equal(ops.int4_sparse_prepack(w, scale, group_size), OP.reference(w, scale, group_size))


def test_size():
    """8x4 at 50 % takes at most 0.32 of the bytes of dense int8."""
    n, k = 768, 768
    packed = ops.int4_sparse_prepack(cases4.weight(n, k), cases4.scales(n, k, 128), 128)
    assert packed.numel() <= 0.32 * n * k


def test_strides_do_not_matter():
    w, scale = cases4.weight(40, 64), cases4.scales(40, 64, 32)
    wide = torch.zeros(40, 130, dtype=torch.int8)
    wide[:, ::2][:, :64] = w
    got = ops.int4_sparse_prepack(wide[:, ::2][:, :64], scale.t().contiguous().t(), 32)
    assert torch.equal(got, ops.int4_sparse_prepack(w, scale, 32))


W, S = torch.zeros(8, 64, dtype=torch.int8), torch.ones(8, 2, dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((W.float(), S, 32), TypeError, "weight: got torch.float32, expected int8"),
        ((W[0], S, 32), ValueError, "1 dimensions"),
        ((W + 8, S, 32), ValueError, "-8 to 7"),
        ((W - 9, S, 32), ValueError, "-8 to 7"),
        ((W, S.double(), 32), TypeError, "weight_scale: got torch.float64"),
        ((W, S[:, :1], 32), ValueError, "weight_scale"),
        ((W[:4], S, 32), ValueError, "weight_scale"),
        ((W, S, 48), ValueError, "group_size: got 48"),
    ],
)
def test_refused(arguments, error, text):
    with pytest.raises(error, match=f"int4_sparse_prepack: .*{text}"):
        ops.int4_sparse_prepack(*arguments)
