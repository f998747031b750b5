import cases
import numpy as np
import oracle
import pytest
import torch

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["int8_prepack"]
SIZES = [*sorted({(shape.n, shape.k) for shape in cases.SHAPES}), (300, 2049)]  # the last on two threads


def by_index(weight):
    """The layout drawn in csrc/cpu/int8_linear.h, element by element: [N/16][K/4][16][4], then the sums of the rows."""
    n, k = weight.shape
    n_padded, k_padded = (n + 15) // 16 * 16, (k + 3) // 4 * 4
    w = np.zeros((n_padded, k_padded), np.int8)
    w[:n, :k] = weight.numpy()
    panels = np.zeros(n_padded * k_padded, np.int8)
    row, column = np.meshgrid(np.arange(n_padded), np.arange(k_padded), indexing="ij")
    panels[(row // 16) * 16 * k_padded + (column // 4) * 64 + row % 16 * 4 + column % 4] = w
    return np.concatenate([panels, w.astype(np.int64).sum(1).astype(np.int32).view(np.int8)])


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_layout(n, k):
    """One layout for all paths; the reference and the kernel each against the drawing."""
    weight = cases.random_weight(n, k)
    expected = torch.from_numpy(by_index(weight))
    assert oracle.same_bits(OP.reference(weight), expected)
    for path in cases.CPU_PATHS:
        with use_backend("cpu"), use_cpu_path(path):
            assert oracle.same_bits(ops.int8_prepack(weight), expected), path


@pytest.mark.parametrize("name", cases.WEIGHTS)
def test_extreme_weights(name):
    weight = cases.WEIGHTS[name](19, 4099)
    expected = torch.from_numpy(by_index(weight))
    assert oracle.same_bits(ops.int8_prepack(weight), expected)
    assert oracle.same_bits(OP.reference(weight), expected)


def test_longest_row_sums_without_overflow():
    weight = cases.WEIGHTS["all -128"](1, 65536)
    sums = ops.int8_prepack(weight)[-64:].view(torch.int32)
    assert sums.tolist() == [-128 * 65536] + [0] * 15


def test_any_strides():
    weight = cases.random_weight(22, 18)
    wide = torch.zeros(44, 40, dtype=torch.int8)
    wide[::2, 3:39:2] = weight
    expected = torch.from_numpy(by_index(weight))
    for view in (weight.t().contiguous().t(), wide[::2, 3:39:2], weight.clone()):
        assert oracle.same_bits(ops.int8_prepack(view), expected)
        assert oracle.same_bits(OP.reference(view), expected)
    row = weight[:1]
    assert oracle.same_bits(ops.int8_prepack(row.expand(20, -1)), torch.from_numpy(by_index(row.repeat(20, 1))))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_for_any_number_of_threads(threads, torch_threads):
    weight = cases.random_weight(301, 2049)
    torch_threads(threads)
    assert oracle.same_bits(ops.int8_prepack(weight), OP.reference(weight))


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("weight", "error", "text"),
    [
        (torch.zeros(4, 4), TypeError, "int8_prepack: weight: got torch.float32"),
        (torch.zeros(4, 4, dtype=torch.uint8), TypeError, "int8_prepack: weight: got torch.uint8"),
        (torch.zeros(4, dtype=torch.int8), ValueError, "int8_prepack: weight: got 1 dimensions"),
        (torch.zeros(1, 4, 4, dtype=torch.int8), ValueError, "int8_prepack: weight: got 3 dimensions"),
    ],
)
def test_errors(weight, error, text):
    with pytest.raises(error) as raised:
        ops.int8_prepack(weight)
    assert str(raised.value).startswith(text)
    assert ", expected " in str(raised.value)
    with pytest.raises(RuntimeError, match="int8_prepack: weight"):
        torch.ops.tcompress.int8_prepack(weight)


def test_flops_and_bytes():
    weight = torch.zeros(5, 8, dtype=torch.int8)
    assert OP.flops(weight) == 5 * 8  # one addition an element, for the sums
    assert OP.nbytes(weight) == 2 * 5 * 8 + 4 * 5
