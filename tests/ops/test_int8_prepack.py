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
    """The layout drawn in csrc/cpu/int8_linear.h, element by element."""
    n, k = weight.shape
    n_padded, k_padded = (n + 15) // 16 * 16, (k + 3) // 4 * 4
    w = np.zeros((n_padded, k_padded), np.int8)
    w[:n, :k] = weight.numpy()
    groups = np.zeros(n_padded * k_padded, np.int8)
    row, column = np.meshgrid(np.arange(n_padded), np.arange(k_padded), indexing="ij")
    width = np.minimum(48, n_padded - row // 48 * 48)  # of the row's group
    groups[row // 48 * 48 * k_padded + (column // 4) * width * 4 + row % 48 * 4 + column % 4] = w
    sums = w.astype(np.int64).sum(1).astype(np.int32).view(np.int8)
    schedules = [schedule(w[g : g + 48].astype(int)) for g in range(0, n_padded, 48)]
    packed = np.concatenate([groups, sums, np.array(schedules, np.uint8).reshape(-1).view(np.int8)])
    return np.pad(packed, (0, -packed.size % 4))


def schedule(w):
    """Run lengths of one group, greedily: no lane (two of the four k's of a step) may reach a sum above 32767 in size
    with any activations in 0 … 127."""
    steps = w.shape[1] // 4
    if w.shape[0] < 48:
        return [0] * steps
    lanes = w.reshape(48, steps, 2, 2)
    highest = 127 * np.maximum(lanes, 0).sum(3).transpose(1, 0, 2).reshape(steps, 96)
    lowest = 127 * np.maximum(-lanes, 0).sum(3).transpose(1, 0, 2).reshape(steps, 96)
    runs, start = [], 0
    for step in range(1, steps + 1):
        fits = step < steps and step - start < 255
        if not fits or max(highest[start : step + 1].sum(0).max(), lowest[start : step + 1].sum(0).max()) > 32767:
            runs.append(step - start)
            start = step
    if 3 * len(runs) > steps:
        runs = []
    return runs + [0] * (steps - len(runs))


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
    weight = cases.WEIGHTS[name](51, 4099)
    expected = torch.from_numpy(by_index(weight))
    assert oracle.same_bits(ops.int8_prepack(weight), expected)
    assert oracle.same_bits(OP.reference(weight), expected)


def test_longest_row_sums_without_overflow():
    weight = cases.WEIGHTS["all -128"](1, 65536)
    sums = ops.int8_prepack(weight)[16 * 65536 : 16 * 65536 + 64].view(torch.int32)
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
    assert OP.flops(weight) == 4 * 5 * 8  # the sum over K, and the two sums and the maximum of the schedule
    assert OP.nbytes(weight) == 2 * 5 * 8 + 4 * 5
