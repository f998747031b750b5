"""`int4_unpack` is the inverse of `int4_prepack`, on every path and in the reference."""

import cases
import oracle
import pytest
import torch

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["int4_unpack"]
NS = (0, 1, 15, 16, 17, 47, 48, 49, 97)
KS = (0, 1, 2, 7, 31, 32, 33, 64, 65, 131, 513)


def bits(scale):
    return scale.view(torch.int16 if scale.dtype == torch.float16 else torch.int32)


def assert_parts(got, w):
    weight, scale, zero_point = got
    assert torch.equal(weight, w.weight)
    assert scale.dtype == w.scale.dtype
    assert torch.equal(bits(scale), bits(w.scale))
    assert oracle.same_bits(zero_point, torch.empty(0, 0, dtype=torch.uint8) if w.zero_point is None else w.zero_point)
    assert all(part.is_contiguous() for part in got)


def arguments_of(w):
    """Of the unpacking of what `w` was packed to."""
    n, k = w.q.shape
    packed = ops.int4_prepack(*w.operands, k, w.group_size)
    return packed, n, k, w.group_size, w.scale.dtype, w.zero_point is not None


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("k", KS)
def test_inverse_of_prepack(n, k):
    for group_size in cases.GROUP_SIZES:
        for dtype, zeros in ((torch.float16, None), (torch.float32, "random"), (torch.float16, "random")):
            w = cases.int4_weight(cases.random_int4(n, k), group_size, dtype, zeros)
            arguments = arguments_of(w)
            assert_parts(OP.reference(*arguments), w)
            for path in cases.CPU_PATHS:
                with use_backend("cpu"), use_cpu_path(path):
                    assert_parts(ops.int4_unpack(*arguments), w)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("n", "k"), [(17, 33), (31, 63), (18, 40), (32, 64)])
def test_padding_does_not_come_back(backend, n, k):
    """Whatever it holds: the high nibble after an odd K is 0."""
    full = cases.int4_weight(cases.random_int4(32, 64), 64, torch.float16, "random")
    inside = cases.int4_weight(full.q[:n, :k], 64, torch.float16, "random")
    inside = cases.Int4Weight(inside.q, inside.weight, full.scale[:n], full.zero_point[:n], 64)
    packed, _, _, *others = arguments_of(full)
    with use_backend(backend):
        assert_parts(ops.int4_unpack(packed, n, k, *others), inside)


def test_scales_keep_every_bit():
    w = cases.int4_weight(cases.random_int4(3, 4), 32)
    for scale in (
        torch.tensor([[float("nan")], [-0.0], [float("-inf")]]),
        torch.tensor([[0x7FA00001], [1], [-1]], dtype=torch.int32).view(torch.float32),
        torch.tensor([[0x7C01], [1], [-1]], dtype=torch.int16).view(torch.float16),
    ):
        w = cases.Int4Weight(w.q, w.weight, scale, None, 32)
        assert_parts(OP.reference(*arguments_of(w)), w)
        assert_parts(ops.int4_unpack(*arguments_of(w)), w)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_for_any_number_of_threads(threads):
    w = cases.int4_weight(cases.random_int4(301, 2049), 128, torch.float16, "random")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_parts(ops.int4_unpack(*arguments_of(w)), w)
    finally:
        torch.set_num_threads(before)


W = cases.int4_weight(cases.random_int4(5, 70), 32, zeros="random")
NAMES = ("kernel_weight", "n", "k", "group_size", "scale_dtype", "has_zero_points")
ARGUMENTS = dict(zip(NAMES, arguments_of(W), strict=True))
PACKED = ARGUMENTS["kernel_weight"]


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        (
            {"kernel_weight": PACKED.view(torch.uint8)},
            TypeError,
            "kernel_weight: got torch.uint8, expected int8, or int32 ",
        ),
        ({"kernel_weight": PACKED[:-1]}, ValueError, "kernel_weight: got [1007], expected [1008] for N=5, K=70"),
        ({"kernel_weight": PACKED[None]}, ValueError, "kernel_weight: got [1, 1008], expected "),
        ({"kernel_weight": PACKED.repeat(2)}, ValueError, "kernel_weight: got [2016], expected "),
        ({"n": 17}, ValueError, "kernel_weight: got "),
        ({"n": -1}, ValueError, "kernel_weight: got "),
        ({"k": 97}, ValueError, "kernel_weight: got "),
        ({"k": -1}, ValueError, "kernel_weight: got "),
        ({"group_size": 64}, ValueError, "kernel_weight: got "),
        ({"group_size": 33}, ValueError, "group_size: got 33, expected one of (32, 64, 128, 256, 512), or at least K"),
        ({"group_size": 0}, ValueError, "group_size: got 0, expected "),
        ({"scale_dtype": torch.float16}, ValueError, "kernel_weight: got "),
        ({"scale_dtype": torch.bfloat16}, TypeError, "scale_dtype: got torch.bfloat16, expected float16 or float32"),
        ({"has_zero_points": False}, ValueError, "kernel_weight: got "),
    ],
)
def test_errors(changed, error, text):
    arguments = {**ARGUMENTS, **changed}
    for backend in ("cpu", "reference"):
        with use_backend(backend), pytest.raises(error) as raised:
            ops.int4_unpack(**arguments)
        assert str(raised.value).startswith(f"int4_unpack: {text}")
    if arguments["kernel_weight"].dim() == 1:
        with pytest.raises(RuntimeError):
            torch.ops.tcompress.int4_unpack(*arguments.values())


def test_strided_kernel_weight_is_refused_by_the_kernel():
    strided = torch.stack([PACKED, ~PACKED], 1)[:, 0]
    with use_backend("reference"):
        assert_parts(ops.int4_unpack(**{**ARGUMENTS, "kernel_weight": strided}), W)
    with use_backend("cpu"), pytest.raises(RuntimeError, match="kernel_weight: expected the result of int4_prepack"):
        ops.int4_unpack(**{**ARGUMENTS, "kernel_weight": strided})


def test_flops_and_bytes():
    assert OP.flops(*ARGUMENTS.values()) == 0
    assert OP.nbytes(*ARGUMENTS.values()) == 2 * PACKED.numel()
