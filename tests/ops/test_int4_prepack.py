import cases
import numpy as np
import oracle
import pytest
import torch

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS
from tcompress.ops.int4_prepack import kernel_bytes

OP = OPS["int4_prepack"]
NS = (0, 1, 15, 16, 17, 47, 48, 49, 97)
KS = (0, 1, 2, 7, 31, 32, 33, 64, 65, 131, 513)
SCALE_TYPES = (torch.float16, torch.float32)


def parts(n, k, group_size, scale_dtype, with_zeros):
    """Operands of which every bit is random: the high nibble after an odd K, and scales that are NaN, too."""
    g = cases.generator((n, k, group_size))
    groups = cases.group_count(k, group_size)

    def random_bytes(*shape):
        return torch.randint(256, shape, dtype=torch.uint8, generator=g)

    scale = random_bytes(n, groups, scale_dtype.itemsize).view(scale_dtype).view(n, groups)
    return random_bytes(n, (k + 1) // 2), scale, random_bytes(n, groups) if with_zeros else None


def kinds(n, k):
    """(operands, group size) of every kind."""
    for group_size in cases.GROUP_SIZES:
        for scale_dtype in SCALE_TYPES:
            for with_zeros in (False, True):
                yield parts(n, k, group_size, scale_dtype, with_zeros), group_size


def place(rows, inner):
    """[N, S, inner bytes] to where the drawing in csrc/cpu/int4_linear.h has them, element by element."""
    n, s, _ = rows.shape
    n_padded = (n + 15) // 16 * 16
    memory = np.zeros(n_padded * s * inner, np.uint8)
    row, column, byte = np.meshgrid(np.arange(n), np.arange(s), np.arange(inner), indexing="ij")
    width = np.minimum(48, n_padded - row // 48 * 48)  # of the row's group
    memory[(row // 48 * 48 * s + column * width + row % 48) * inner + byte] = rows
    return memory


def as_bytes(x):
    size = x.element_size()
    return np.frombuffer(x.contiguous().numpy().tobytes(), np.uint8).reshape(*x.shape, size), size


def by_index(weight, scale, zero_point, k):
    n, k_padded = len(weight), (k + 31) // 32 * 32
    q = np.zeros((n, k_padded), np.uint8)
    for even in (0, 1):
        columns = np.arange(even, k, 2)
        q[:, columns] = (weight.numpy() >> (4 * even))[:, columns // 2] & 15
    both = np.zeros((n, k_padded // 8, 4), np.uint8)
    for column in range(k_padded):
        both[:, column // 8, column % 4] |= q[:, column] << (4 * (column % 8 // 4))
    memory = [place(both, 4), place(*as_bytes(scale))]
    if zero_point is not None:
        memory.append(place(*as_bytes(zero_point)))
    return torch.from_numpy(np.concatenate(memory).view(np.int8))


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("k", KS)
def test_layout(n, k):
    """One layout for all paths; the reference and the kernel each against the drawing."""
    for (weight, scale, zero_point), group_size in kinds(n, k):
        what = (group_size, scale.dtype, zero_point is not None)
        expected = by_index(weight, scale, zero_point, k)
        assert len(expected) == kernel_bytes(n, k, group_size, scale.element_size(), zero_point is not None), what
        assert oracle.same_bits(OP.reference(weight, scale, zero_point, k, group_size), expected), what
        for path in cases.CPU_PATHS:
            with use_backend("cpu"), use_cpu_path(path):
                got = ops.int4_prepack(weight, scale, zero_point, k, group_size)
                assert oracle.same_bits(got, expected), (path, *what)


def test_by_hand():
    """The first bytes of the drawing: k0|k4 k1|k5 k2|k6 k3|k7 of output 0, then of output 1."""
    q = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 0]], dtype=torch.uint8)
    w = cases.int4_weight(q, scale=1.0, zeros=5)
    packed = ops.int4_prepack(*w.operands, 8, 32).view(torch.uint8)
    assert packed[:8].tolist() == [0x51, 0x62, 0x73, 0x84, 0xD9, 0xEA, 0xFB, 0x0C]
    assert not packed[8:256].any()  # 16 outputs, 32 k's
    assert packed[256:320].view(torch.float32).tolist() == [1.0, 1.0] + [0.0] * 14
    assert packed[320:].tolist() == [5, 5] + [0] * 14


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_any_strides(backend):
    weight, scale, zero_point = parts(22, 66, 32, torch.float16, True)
    expected = by_index(weight, scale, zero_point, 66)
    wide = torch.zeros(44, 70, dtype=torch.uint8)
    wide[::2, 3:69:2] = weight
    scales, zeros = scale.t().contiguous().t(), zero_point.repeat_interleave(2, 1)[:, ::2]
    with use_backend(backend):
        for view in (weight.t().contiguous().t(), wide[::2, 3:69:2]):
            assert oracle.same_bits(ops.int4_prepack(view, scales, zeros, 66, 32), expected)
        row, one = weight[:1].expand(20, -1), scale[:1, :1].expand(20, 3)
        repeated = by_index(row.contiguous(), one.contiguous(), None, 66)
        assert oracle.same_bits(ops.int4_prepack(row, one, None, 66, 32), repeated)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_for_any_number_of_threads(threads, torch_threads):
    weight, scale, zero_point = parts(301, 2049, 128, torch.float16, True)
    torch_threads(threads)
    packed = ops.int4_prepack(weight, scale, zero_point, 2049, 128)
    assert oracle.same_bits(packed, OP.reference(weight, scale, zero_point, 2049, 128))


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


W = cases.int4_weight(cases.random_int4(5, 70), 32, zeros="random")
ARGUMENTS = {"weight": W.weight, "weight_scale": W.scale, "zero_point": W.zero_point, "k": 70, "group_size": 32}


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"weight": W.weight.char()}, TypeError, "weight: got torch.int8, expected uint8; "),
        ({"weight": W.weight[0]}, ValueError, "weight: got [35], expected [N, ceil(K/2)] = [5, 35]"),
        ({"weight": W.weight[:4]}, ValueError, "weight: got [4, 35], expected "),
        ({"k": 71}, ValueError, "weight: got [5, 35], expected [N, ceil(K/2)] = [5, 36]"),
        ({"group_size": 64}, ValueError, "weight_scale: got [5, 3], expected [N, ceil(K/g)] = [5, 2]"),
        ({"group_size": 48}, ValueError, "group_size: got 48, expected one of (32, 64, 128, 256, 512), or at least K"),
        ({"group_size": 0}, ValueError, "group_size: got 0, expected "),
        ({"group_size": -32}, ValueError, "group_size: got -32, expected "),
        ({"group_size": 69}, ValueError, "group_size: got 69, expected "),
        ({"weight_scale": W.scale.double()}, TypeError, "weight_scale: got torch.float64, expected float16 or float32"),
        ({"weight_scale": W.scale.bfloat16()}, TypeError, "weight_scale: got torch.bfloat16, expected "),
        ({"weight_scale": W.scale[:, :2]}, ValueError, "weight_scale: got [5, 2], expected "),
        ({"zero_point": W.zero_point.char()}, TypeError, "zero_point: got torch.int8, expected uint8"),
        ({"zero_point": W.zero_point[:, :2]}, ValueError, "zero_point: got [5, 2], expected [5, 3]"),
        ({"zero_point": W.zero_point[:4]}, ValueError, "zero_point: got [4, 3], expected [5, 3]"),
        (
            {"weight": torch.zeros(5, 32769, dtype=torch.uint8), "k": 65537},
            ValueError,
            "K: got 65537, expected at most",
        ),
    ],
)
def test_errors(changed, error, text):
    arguments = {**ARGUMENTS, **changed}
    for backend in ("cpu", "reference"):
        with use_backend(backend), pytest.raises(error) as raised:
            ops.int4_prepack(**arguments)
        assert str(raised.value).startswith(f"int4_prepack: {text}")
    with pytest.raises(RuntimeError):
        torch.ops.tcompress.int4_prepack(*arguments.values())


def test_flops_and_bytes():
    arguments = (W.weight, W.scale, W.zero_point, 70, 32)
    assert OP.flops(*arguments) == 0
    assert OP.nbytes(*arguments) == 2 * (5 * 35 + 5 * 3 * 4 + 5 * 3)
