"""The layout of the CUDA kernel in plain torch: the words that its drawing asks for, and back."""

import cases
import pytest
import test_int4_unpack
import torch

from tcompress.ops import int4_cuda_layout as layout
from tcompress.ops import int4_prepack, int4_unpack
from tcompress.ops._registry import OPS


def packed(w):
    return layout.pack(*w.operands, w.q.shape[1], w.group_size)


def test_words_are_as_drawn():
    """Word by word, from the drawing in csrc/cuda/int4_linear.h."""
    n, k, group = 37, 70, 32
    w = cases.int4_weight(cases.random_int4(n, k), group, torch.float16, "random")
    memory = packed(w).view(torch.uint8)
    steps, columns, groups = 3, 64, 3
    words = memory[: columns * steps * 16].view(torch.int32).view(columns // 32, steps, 32, 4)
    for block in range(columns // 32):
        for step in range(steps):
            for lane in range(32):
                for tile in range(4):
                    column = block * 32 + tile * 8 + lane // 4
                    for i in range(8):
                        at = step * 32 + lane % 4 * 2 + i % 4 * 8 + i // 4
                        inside = column < n and at < k
                        expected = int(w.q[column, at]) if inside else 0
                        assert words[block, step, lane, tile].item() >> (4 * i) & 15 == expected
    scale = memory[columns * steps * 16 :][: 4 * groups * columns].view(torch.float32).view(groups, columns)
    assert torch.equal(scale[:, :n], w.scale.float().t())
    assert not scale[:, n:].any()
    zeros = memory[-groups * columns :].view(groups, columns)
    assert torch.equal(zeros[:, :n], w.zero_point.t())
    assert (zeros[:, n:] == 8).all()


@pytest.mark.parametrize(("n", "k"), [(0, 8), (1, 1), (16, 0), (31, 33), (32, 64), (33, 131), (97, 513)])
def test_back_again(n, k):
    for group in cases.GROUP_SIZES:
        for dtype, zeros in ((torch.float16, None), (torch.float32, "random")):
            w = cases.int4_weight(cases.random_int4(n, k), group, dtype, zeros)
            kernel_weight = packed(w)
            assert kernel_weight.shape == (layout.kernel_words(n, k, group),)
            arguments = (kernel_weight, n, k, group, dtype, zeros is not None)
            test_int4_unpack.assert_parts(OPS["int4_unpack"].reference(*arguments), w)
            test_int4_unpack.assert_parts(int4_unpack(*arguments), w)


def test_the_reference_of_the_product_reads_it():
    w = cases.int4_weight(cases.random_int4(33, 70), 64, torch.float16, "random")
    x = torch.randn(3, 70)
    reference = OPS["int4_linear"].reference
    options = (64, None, True, "none", None)
    expected = reference(x, *w.operands, None, None, *options)
    assert torch.equal(reference(x, None, *w.operands[1:], None, packed(w), *options), expected)


def test_the_cpu_kernels_say_that_they_cannot_read_it():
    from tcompress import explain, ops

    w = cases.int4_weight(cases.random_int4(33, 70), 64, torch.float16, "random")
    x, kernel_weight = torch.randn(3, 70), packed(w)
    arguments = (x, None, *w.operands[1:], None, kernel_weight, 64, None)
    explanation = explain(ops.int4_linear, *arguments)
    assert explanation.backend == "reference"
    assert "the layout of the CUDA kernels" in str(explanation)
    assert torch.equal(ops.int4_linear(*arguments), OPS["int4_linear"].reference(*arguments, True, "none", None))
    several = ops.int4_multi_linear(x, [None], [w.scale], [w.zero_point], [None], [kernel_weight], 64, None)
    assert torch.equal(several[0], ops.int4_linear(*arguments))
    with pytest.raises(ValueError, match=r"int4_linear: kernel_weight: got \[\d+\], expected \[\d+\] for N=33, K=70"):
        ops.int4_linear(x, None, *w.operands[1:], None, kernel_weight[:-1], 64, None)
    assert int4_prepack(*w.operands, 70, 64).dtype == torch.int8
