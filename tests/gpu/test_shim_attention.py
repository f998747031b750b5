"""csrc/cuda/attention.cuh on the CPU, thread by thread: integers bit for bit, the result against float64."""

from __future__ import annotations

import math

import pytest
import shim_library
import torch
from shim_library import ORDERS, Library, caught

from tcompress.ops import attention_numbers as numbers

pytestmark = pytest.mark.skipif(shim_library.compiler() is None, reason="g++ is not installed")

BLOCK = 64


@pytest.fixture(scope="module")
def lib() -> Library:
    return shim_library.library()


def heads(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def visible(sq: int, skv: int, causal: bool, bottom_right: bool, left: int, right: int) -> torch.Tensor:
    position = torch.arange(sq)[:, None] + (skv - sq if bottom_right else 0)
    key, right = torch.arange(skv), 0 if causal else right
    seen = torch.ones(sq, skv, dtype=torch.bool)
    if left >= 0:
        seen &= key >= position - left
    if right >= 0:
        seen &= key <= position + right
    return seen


def softmax(s: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, seen: torch.Tensor) -> tuple:
    s = s.masked_fill(~seen, -math.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.double()
    lse = torch.logsumexp(s, -1)
    return torch.exp(s - lse[..., None]).nan_to_num(0) @ v, lse


def exact(q, k, v, mask=None, scale=None, **window) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logarithm of the denominator, in float64."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(groups, 1) for t in (k, v))
    s = q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return softmax(s, v, mask, visible(q.shape[2], k.shape[2], **options(**window)))


def options(causal=False, bottom_right=False, left=-1, right=-1) -> dict:
    return {"causal": causal, "bottom_right": bottom_right, "left": left, "right": right}


def model(got: shim_library.Attention, v: torch.Tensor, sq: int, skv: int, mask=None, **window) -> torch.Tensor:
    """The attention of the integers that the kernel has used, in float64: what is left is the rounding of P."""
    groups = got.heads[1] // got.heads[2]
    q, q_scale = got.queries()
    k, k_scale, _ = got.keys()
    s = q[:, :, :sq].double() @ k[:, :, :skv].double().repeat_interleave(groups, 1).mT
    scale = k_scale.repeat_interleave(BLOCK, 2)[:, :, :skv].repeat_interleave(groups, 1)
    s = s * (q_scale[:, :, :sq, None] * scale[:, :, None]).double() * math.log(2)
    return softmax(s, v.double().repeat_interleave(groups, 1), mask, visible(sq, skv, **options(**window)))[0]


def relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out.double() - expected).abs().sum() / expected.abs().sum().clamp_min(1e-300)).item()


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_accuracy_on_normal_inputs(lib, causal, d):
    lib.order = "forward"
    q, k, v = (heads(1, 2, 256, d, seed=i) for i in range(3))
    got = lib.attention(q, k, v, causal=causal)
    expected, _ = exact(q, k, v, causal=causal)
    assert torch.nn.functional.cosine_similarity(got.out.double().flatten(), expected.flatten(), 0) >= 0.9998
    assert relative(got.out, expected) <= 0.021
    assert relative(got.out, model(got, v, 256, 256, causal=causal)) <= 6e-4


SHAPES = [  # Sq, Skv, D, Dv, H, Hkv
    (1, 1, 64, 64, 2, 2),
    (5, 70, 40, 33, 4, 2),
    (130, 67, 32, 96, 2, 1),
    (64, 200, 80, 80, 2, 2),
    (129, 129, 72, 130, 1, 1),
    (1, 300, 128, 128, 3, 1),
    (65, 64, 200, 256, 1, 1),
]
WINDOWS = [
    {},
    {"causal": True},
    {"causal": True, "bottom_right": True},
    {"left": 20, "right": 3, "bottom_right": True},
    {"left": 70, "causal": True},
]


MASKS = [None, "bool", "float"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_windows_masks_and_types(lib, shape, mask):
    sq, skv, d, dv, h, kv_heads = shape
    case = SHAPES.index(shape) + MASKS.index(mask)
    lib.order = ORDERS[case % 4]
    b = 2 if sq * skv < 1000 else 1
    dtype = (torch.float16, torch.bfloat16, torch.float32)[SHAPES.index(shape) % 3]
    q = heads(b, sq, h, d, dtype=dtype).transpose(1, 2)
    k, v = heads(b, kv_heads, skv, d, dtype=dtype, seed=1) + 2, heads(b, kv_heads, skv, dv, dtype=dtype, seed=2)
    kept = k.clone()
    if mask == "bool":
        mask = heads(b, 1, sq, skv, dtype=torch.float32, seed=3) > -0.5
        mask[0, 0, 0] = False
    elif mask == "float":
        mask = heads(1, 1, sq, skv, dtype=dtype, seed=3)
        mask[0, 0, sq // 2] = -math.inf
    mask = None if mask is None else mask.expand(b, h, sq, skv)
    for window in WINDOWS[case % 2 :: 2]:
        got = lib.attention(q, k, v, mask, **window)
        expected, lse = exact(q, k, v, mask, **window)
        empty = torch.isinf(lse)
        assert torch.equal(empty, torch.isinf(got.lse))
        assert (got.out[empty] == 0).all()
        assert torch.equal(k, kept)
        assert relative(got.out, model(got, v, sq, skv, mask, **window)) <= (1e-3 if v.dtype == torch.float16 else 6e-3)
        assert relative(got.out, expected) <= 0.023
        if not empty.all():
            assert (got.lse - lse)[~empty].abs().max() < 0.06


@pytest.mark.parametrize(
    ("d", "softcap", "window"),
    [(64, 2.0, {"causal": True}), (64, 30.0, {}), (72, 0.5, {"left": 20, "right": 3}), (130, 2.0, {"causal": True})],
)
@pytest.mark.parametrize("with_mask", [False, True])
def test_softcap(lib, d, softcap, window, with_mask):
    """Keys far from 0, so that the cap is off by what smoothing took if that is not given back."""
    lib.order = ORDERS[d % 4]
    q, k, v = heads(1, 2, 70, d), heads(1, 1, 130, d, seed=1) + 2, heads(1, 1, 130, d, seed=2)
    mask = (heads(1, 1, 70, 130, seed=3) > -0.5).expand(1, 2, 70, 130) if with_mask else None
    got = lib.attention(q, k, v, mask, softcap=softcap, **window)
    s = q.double() @ k.double().mT.repeat_interleave(2, 1) * d**-0.5
    seen = visible(70, 130, **options(**window))
    expected, lse = softmax(softcap * torch.tanh(s / softcap), v.double().repeat_interleave(2, 1), mask, seen)
    empty = torch.isinf(lse)
    assert torch.equal(empty, torch.isinf(got.lse))
    assert (got.out[empty] == 0).all()
    assert relative(got.out, expected) <= 0.023
    assert (got.lse - lse)[~empty].abs().max() < 0.06


@pytest.mark.parametrize("order", ORDERS)
def test_integers_are_those_of_the_op(lib, order):
    lib.order = order
    q, k = heads(1, 4, 70, 48, dtype=torch.float32), heads(1, 2, 200, 48, dtype=torch.float32, seed=1) + 5
    q[0, 0, 3], q[0, 1, 4, 5] = 0, math.nan
    k[0, 1, 0, 7] = math.inf  # this channel's mean is not finite
    got = lib.attention(q, k, k, scale=-math.log(2))
    integers, scale = numbers.quantize_tokens(q, 8)
    mine, mine_scale = got.queries()
    assert torch.equal(mine[:, :, :70, :48].float(), -integers)
    assert (mine[:, :, 70:] == 0).all()
    assert (mine[..., 48:] == 0).all()
    torch.testing.assert_close(mine_scale[:, :, :70], scale, rtol=3e-7, atol=0, equal_nan=True)

    mine, mine_scale, mean = got.keys()
    assert torch.equal(mean[..., :48], numbers.key_mean(k))
    smoothed = torch.nn.functional.pad(k - numbers.key_mean(k)[:, :, None], (0, 0, 0, 56)).unflatten(2, (4, BLOCK))
    block, block_scale = numbers.quantize_tokens(smoothed.flatten(3), 8)
    assert torch.equal(mine[..., :48].float(), block.view(1, 2, 256, 48))
    assert torch.equal(mine_scale.nan_to_num(-1), block_scale.nan_to_num(-1))


def test_what_is_not_finite_spoils_who_sees_it(lib):
    lib.order = "warp greedy"
    q, k, v = (heads(1, 1, 200, 32, dtype=torch.float32, seed=i) for i in range(3))
    q[0, 0, 7, 3] = math.nan
    out = lib.attention(q, k, v, causal=True).out
    assert out[0, 0].isnan().any(-1).nonzero().flatten().tolist() == [7]
    q[0, 0, 7, 3], k[0, 0, 150, 0] = 0, math.inf
    got = lib.attention(q, k, v, causal=True)
    bad = got.out[0, 0].isnan().any(-1)
    assert bad[150:].all()
    assert not bad[:128].any()
    assert got.lse[0, 0, 150:].isnan().all()


def test_zeros_huge_values_and_peaks(lib):
    zeros, v = torch.zeros(1, 1, 70, 64, dtype=torch.float16), heads(1, 1, 70, 64)
    out = lib.attention(zeros, zeros, v).out
    torch.testing.assert_close(out.double(), v.double().mean(2, keepdim=True).expand_as(out), rtol=0, atol=1e-3)
    big = v.to(torch.bfloat16) * 1e30  # beyond float16
    out = lib.attention(zeros.bfloat16(), zeros.bfloat16(), big).out
    assert out.isfinite().all()
    assert out.abs().max() > 1e28
    # the maximum rises from block to block, by more than what the output follows at once
    q = torch.ones(1, 1, 3, 64)
    k = torch.arange(256.0)[:, None].expand(1, 1, 256, 64).contiguous()
    v = heads(1, 1, 256, 64, dtype=torch.float32, seed=4)
    got = lib.attention(q, k, v, scale=0.3)
    assert relative(got.out, model(got, v, 3, 256)) <= 6e-3


@pytest.mark.parametrize("bug", ["missing barrier", "unwaited copy", "off by one", "wrong mask"])
@pytest.mark.parametrize("d", [64, 128])
def test_planted_bug_is_caught(lib, bug, d):
    q, k, v = heads(1, 1, 130, d), heads(1, 1, 200, d, seed=1), heads(1, 1, 200, d, seed=2)
    window = {"causal": True} if bug == "wrong mask" else {}

    def run() -> bool:
        got = lib.attention(q, k, v, **window)
        return relative(got.out, model(got, v, 130, 200, **window)) <= 6e-4

    assert not caught(lib, run)
    with lib.plant(bug):
        assert caught(lib, run)
