"""quantized_attention: the reference against float64, every path against the reference, bit for bit."""

from functools import cache

import attention_cases as shapes
import attention_oracle as exact
import cases
import oracle
import pytest
import torch
import torch.nn.functional as F

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["quantized_attention"]
#: A mask of every kind against options of every kind.
COMBINATIONS = [(mask, "plain") for mask in shapes.MASKS] + [
    (mask, options)
    for mask in ("random", "key-padding", "rows-hidden", "minus-infinity", "lowest", "added-bfloat16")
    for options in ("causal", "bottom-right-window", "window-both", "softcap-causal", "scale-negative-softcap")
]


def by_reference(q, k, v, bits, **options):
    with use_backend("reference"):
        return ops.quantized_attention(q, k, v, bits=bits, enable_gqa=True, return_lse=True, **options)


def run(path, q, k, v, bits, **options):
    with use_backend("cpu"), use_cpu_path(path):
        return ops.quantized_attention(q, k, v, bits=bits, enable_gqa=True, return_lse=True, **options)


def assert_same(got, expected, what):
    assert oracle.same_bits(got[0], expected[0]), f"{what}: out: {(got[0] != expected[0]).sum()} differ"
    assert exact.same_lse(got[1], expected[1]), f"{what}: lse: {got[1]}, expected {expected[1]}"


def arguments(mask, options, shape):
    made = {} if mask is None else {"mask": shapes.MASKS[mask](shape)}
    return {**made, **shapes.OPTIONS[options]}


@cache
def ordinary(shape, dtype, bits, mask=None, options="plain"):
    """Operands and the reference's result; few enough of them to keep."""
    qkv = shapes.operands(shape, dtype)
    return qkv, by_reference(*qkv, bits, **arguments(mask, options, shape))


# ---- the reference against real numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", shapes.SHAPES, ids=str)
def test_reference_matches_float64_on_every_shape(shape):
    for dtype in cases.DTYPES:
        for bits in shapes.BITS:
            qkv, got = ordinary(shape, dtype, bits)
            exact.assert_within(*got, exact.quantized(*qkv, bits), (dtype, bits))
            assert (got[0].dtype, got[1].dtype) == (dtype, torch.float32)
            assert got[0].shape == (shape.b, shape.h, shape.sq, shape.dv)
            assert got[1].shape == (shape.b, shape.h, shape.sq)


@pytest.mark.parametrize("shape", shapes.MASKED, ids=str)
@pytest.mark.parametrize("options", shapes.OPTIONS)
def test_reference_matches_float64_on_every_option(shape, options):
    for bits in shapes.BITS:
        qkv, got = ordinary(shape, torch.float32, bits, None, options)
        exact.assert_within(*got, exact.quantized(*qkv, bits, **shapes.OPTIONS[options]), bits)


@pytest.mark.parametrize("shape", shapes.MASKED, ids=str)
@pytest.mark.parametrize(("mask", "options"), COMBINATIONS)
def test_reference_matches_float64_on_every_mask(shape, mask, options):
    for bits in shapes.BITS:
        qkv, got = ordinary(shape, torch.float32, bits, mask, options)
        exact.assert_within(*got, exact.quantized(*qkv, bits, **arguments(mask, options, shape)), bits)


@pytest.mark.parametrize("name", shapes.FINITE_VALUES)
def test_reference_matches_float64_on_every_value(name):
    for dtype in cases.DTYPES:
        for bits in shapes.BITS:
            qkv = shapes.VALUES[name](*shapes.operands(shapes.BY_NAME["gqa2"], dtype))
            exact.assert_within(*by_reference(*qkv, bits), exact.quantized(*qkv, bits), (dtype, bits))


@pytest.mark.parametrize("mask", [None, "random-per-head", "added-per-head"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_float64_computation_is_torch_s(mask, is_causal):
    """That the oracle itself means what torch means."""
    shape = shapes.MASKED[0]
    q, k, v = shapes.operands(shape, torch.float32)
    keep = None if mask is None else shapes.MASKS[mask](shape)
    if is_causal and keep is not None:
        pytest.skip("torch takes one of both")
    expected = F.scaled_dot_product_attention(
        q.double(),
        k.double(),
        v.double(),
        keep.double() if mask == "added-per-head" else keep,
        is_causal=is_causal,
        enable_gqa=True,
    )
    got, _ = exact.exact(q, k, v, mask=keep, is_causal=is_causal)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("bias", [0, 8])
def test_accuracy(d, is_causal, bias):
    """At 2048 tokens, without and with a bias of each channel of k; what the docstring says of both numbers of bits."""
    q, k, v = (shapes.normal(1, 1, 2048, d, name=name) for name in "qkv")
    k = k + bias + bias * shapes.normal(d)
    expected, expected_lse = exact.exact(q, k, v, is_causal=is_causal)
    for bits, limit in ((12, 0.002), (8, 0.018)):
        out, lse = by_reference(q, k, v, bits, is_causal=is_causal)
        assert exact.relative_error(out, expected) <= limit
        assert exact.cosine(out, expected) >= 0.9998
        if bits == 8 and not is_causal:  # the first rows of a causal mask are single values, of ordinary size
            assert exact.root_mean_square(out, expected) <= 6.5e-4
        # One score is off by 0.01 or so (8 bits), and the first rows of a causal mask have few.
        torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=0.04 if bits == 8 else 0.004)


def test_by_hand():
    """Two keys with weights 3:1 by their scores, log 3 apart; values 100 and 20."""
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([1.0, -1.0]).view(1, 1, 2, 1)
    v = torch.tensor([100.0, 20.0]).view(1, 1, 2, 1)
    for bits in shapes.BITS:
        out, lse = by_reference(q, k, v, bits, scale=0.5 * 1.0986122886681098)
        assert abs(out.item() - 80) < 0.05
        assert abs(lse.item() - torch.logsumexp(torch.tensor([0.5493, -0.5493]), 0).item()) < 1e-3


# ---- every path against the reference, bit for bit ------------------------------------------------------------------


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("shape", shapes.SHAPES, ids=str)
def test_bit_exact_on_every_shape(path, shape):
    for dtype in cases.DTYPES:
        for bits in shapes.BITS:
            qkv, expected = ordinary(shape, dtype, bits)
            assert_same(run(path, *qkv, bits), expected, (path, dtype, bits))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("options", shapes.OPTIONS)
def test_bit_exact_on_every_option(path, options):
    for shape in (*shapes.MASKED, shapes.BY_NAME["three-blocks-less-1"], shapes.BY_NAME["mqa-one-query"]):
        for bits in shapes.BITS:
            qkv, expected = ordinary(shape, torch.float32, bits, None, options)
            assert_same(run(path, *qkv, bits, **shapes.OPTIONS[options]), expected, (path, shape, bits))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize(("mask", "options"), COMBINATIONS)
def test_bit_exact_on_every_mask(path, mask, options):
    for shape in shapes.MASKED:
        for bits in shapes.BITS:
            qkv, expected = ordinary(shape, torch.float32, bits, mask, options)
            got = run(path, *qkv, bits, **arguments(mask, options, shape))
            assert_same(got, expected, (path, shape, bits))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("name", shapes.VALUES)
@pytest.mark.parametrize("options", ["plain", "bottom-right-window", "softcap"])
def test_bit_exact_on_every_value(path, name, options):
    for dtype in cases.DTYPES:
        for bits in shapes.BITS:
            qkv = shapes.VALUES[name](*shapes.operands(shapes.BY_NAME["gqa2"], dtype))
            expected = by_reference(*qkv, bits, **shapes.OPTIONS[options])
            assert_same(run(path, *qkv, bits, **shapes.OPTIONS[options]), expected, (path, dtype, bits))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("layout", shapes.LAYOUTS)
def test_bit_exact_on_every_layout(path, layout):
    for dtype in cases.DTYPES:
        plain = shapes.operands(shapes.BY_NAME["gqa2"], dtype)
        views = [shapes.LAYOUTS[layout](x) for x in plain]
        dense = [x.resolve_neg().contiguous().clone() for x in views]
        before = [x.clone() for x in views]
        for bits in shapes.BITS:
            expected = by_reference(*dense, bits)
            assert_same(by_reference(*views, bits), expected, "reference")
            got = run(path, *views, bits)
            assert_same(got, expected, (path, layout, dtype, bits))
            mixed = run(path, views[0], dense[1], views[2], bits)
            assert_same(mixed, expected, (path, layout, dtype, bits))
            assert got[0].transpose(1, 2).is_contiguous()
        assert all(oracle.same_bits(a.resolve_neg(), b.resolve_neg()) for a, b in zip(views, before, strict=True))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
def test_bit_exact_over_several_tiles_of_every_height(path):
    """1 to 40 queries of a few heads that share their keys; each row by itself is the same row."""
    for groups in (1, 3):
        everything = shapes.Shape("heights", 1, 2 * groups, 2, 40, 70, 12, 20)
        q, k, v = shapes.operands(everything, torch.float32)
        expected, lse = by_reference(q, k, v, 8)
        for rows in range(1, 41):
            got = run(path, q[:, :, :rows], k, v, 8)
            assert_same(got, (expected[:, :, :rows], lse[:, :, :rows]), (path, groups, rows))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
def test_extreme_integers(path):
    """All products at their largest, of one sign and of both: sums that a step of 16 bits would spoil."""
    signs = (-1.0) ** torch.arange(256)
    for d, dv in ((256, 256), (64, 32), (3, 17)):
        q, k, v = torch.ones(1, 2, 7, d), torch.ones(1, 2, 70, d), torch.ones(1, 2, 70, dv)
        k[:, :, ::2] *= -1  # a mean of 0
        for a, b in ((1, 1), (-1, 1), (1, -1), (signs[:d], signs[:d]), (signs[:d], 1)):
            for bits in shapes.BITS:
                qkv = (q * a, k * b, v * torch.where(torch.arange(70) % 3 == 0, -1.0, 1.0)[:, None])
                expected = by_reference(*qkv, bits)
                assert_same(run(path, *qkv, bits), expected, (path, d, bits))
                exact.assert_within(*expected, exact.quantized(*qkv, bits), (d, bits))


# ---- bits, and the shorter names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases.CPU_PATHS)
def test_auto_is_what_the_path_runs_fastest(path):
    qkv, _ = ordinary(shapes.BY_NAME["d64"], torch.float32, 8)
    bits = 8 if path in ("avx512vnni", "amx") else 12
    assert_same(run(path, *qkv, "auto"), run(path, *qkv, bits), path)
    assert not oracle.same_bits(run(path, *qkv, "auto")[0], run(path, *qkv, 20 - bits)[0])


def test_auto_of_the_reference_is_that_of_the_path_in_force():
    qkv, expected = ordinary(shapes.BY_NAME["d64"], torch.float32, 12)
    with use_cpu_path("scalar"):
        assert_same(by_reference(*qkv, "auto"), expected, "auto")


def test_int8_attention_is_8_bits():
    shape = shapes.MASKED[0]
    qkv, expected = ordinary(shape, torch.float32, 8, "random", "softcap-causal")
    options = arguments("random", "softcap-causal", shape)
    for path in cases.CPU_PATHS:
        with use_cpu_path(path):
            got = ops.int8_attention(*qkv, enable_gqa=True, return_lse=True, **options)
            assert_same(got, expected, path)
            assert oracle.same_bits(ops.int8_attention(*qkv, enable_gqa=True, **options), expected[0])
