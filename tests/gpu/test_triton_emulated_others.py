"""The other Triton kernels as compiled for 8.0 and 9.0, run in the PTX emulator: tests of their meaning, which
elsewhere go through Triton's interpreter, on the compiled code and with the emulator's checks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton_cases

triton_cases.require()

import test_triton_decode as decode  # noqa: E402
import test_triton_int4 as int4  # noqa: E402
import test_triton_quantize_fused as fused  # noqa: E402
import test_triton_sparse as sparse  # noqa: E402
from emulated import emulated  # noqa: E402

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
#: A tile's rows behind the last token are what memory holds: they are multiplied and not stored.
DROPS_ROWS = {"block_sparse", "int4_block_sparse"}

CASES: dict[str, tuple[int, str, Callable[[], None]]] = {  # where it is quick, the kernel, the test
    "decode": (80, "decode_split", lambda: decode.test_shapes(decode.SHAPES[4], BF16)),
    "decode in parts": (90, "decode_reduce", lambda: decode.test_splits_masks_and_softcap(3, 2.0, "bool")),
    "int4, few tokens, A7": (
        80, "int4_narrow", lambda: int4.test_sums_of_integers_are_exact((5, 40, 257, 64), 7, False, True),
    ),
    "int4, many tokens, A8": (
        90, "int4_wide", lambda: int4.test_sums_of_integers_are_exact((65, 70, 127, 512), 8, True, False),
    ),
    "int4, one token, A16": (80, "int4_narrow", lambda: int4.test_scales_and_types((1, 33, 100, 32), None, F16)),
    "int4, many tokens, A16": (90, "int4_wide", lambda: int4.test_scales_and_types((33, 33, 300, 128), None, BF16)),
    "2:4": (80, "two_four", lambda: sparse.test_sums_are_exact((17, 33, 131), "2:4", 7, False)),
    "2:4, floats": (90, "two_four", lambda: sparse.test_floats((40, 16, 258), "2:4", BF16, BF16)),
    "blocks": (90, "block_sparse", lambda: sparse.test_sums_are_exact((70, 40, 96), "16x16", 8, True)),
    "small blocks": (80, "block_sparse", lambda: sparse.test_sums_are_exact((5, 17, 64), "8x4", 7, False)),
    "few tokens": (80, "block_sparse_narrow", lambda: sparse.test_sums_are_exact((3, 17, 64), "8x4", 7, False)),
    "blocks, floats": (90, "block_sparse", lambda: sparse.test_floats((40, 16, 258), "16x16", F16, F16)),
    "blocks, int4": (80, "int4_block_sparse", lambda: sparse.test_sparse_int4((17, 33, 131, 32), "16x16", 8, True)),
    "norm": (80, "normalize_and_quantize", lambda: fused.test_norms((4, 300), 7, False, True, BF16)),
    "norm, long": (90, "normalize_and_quantize", lambda: fused.test_norms((2, 9001), 8, True, False, F32)),
    "rotary": (80, "rotate_and_quantize", lambda: fused.test_rotary((1, 2, 17, 80, 20), False, BF16)),
    "rotary, interleaved": (90, "rotate_and_quantize", lambda: fused.test_rotary((2, 3, 5, 64, 64), True, F16)),
}  # fmt: skip
RUNS = [
    pytest.param(name, architecture, marks=[] if architecture == quick else pytest.mark.slow)
    for name, (quick, *_) in CASES.items()
    for architecture in (80, 90)
]


@pytest.mark.parametrize(("name", "architecture"), RUNS)
def test_compiled_code(name, architecture):
    _, kernel, check = CASES[name]
    with emulated(architecture, reads_unwritten=DROPS_ROWS) as gpu:
        check()
    assert kernel in [launch.kernel for launch in gpu.launched]
