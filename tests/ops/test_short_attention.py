"""short_attention: the reference and every path against float64; where quantized_attention means it by "auto"."""

import attention_cases as shapes
import attention_oracle as exact
import cases
import pytest
import torch
import torch.nn.functional as F

from tcompress import explain, ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS
from tcompress.ops.attention_options import MAX_SHORT_KEYS, MAX_SHORT_PAIRS, is_short

OP = OPS["short_attention"]
SHAPES = (
    *(shape for shape in shapes.SHAPES if shape.skv <= MAX_SHORT_KEYS),
    shapes.Shape("one-token", 1, 12, 12, 1, 1, 64, 64),
    shapes.Shape("square", 1, 12, 12, 48, 48, 64, 64),
    shapes.Shape("odd", 1, 3, 3, 3, 3, 7, 9),
    shapes.Shape("group", 2, 6, 2, 10, 33, 100, 200),
    shapes.Shape("most-keys", 1, 2, 1, 6, 64, 256, 256),
)
CAUSAL = (False, True, "bottom_right")


def run(backend, qkv, **options):
    """`backend`: a path of the CPU, or "reference"."""
    if backend == "reference":
        with use_backend("reference"):
            return ops.short_attention(*qkv, enable_gqa=True, **options)
    with use_backend("cpu"), use_cpu_path(backend):
        return ops.short_attention(*qkv, enable_gqa=True, **options)


BACKENDS = ("reference", *cases.CPU_PATHS)


def bound(qkv, expected, is_causal):
    """torch's own largest error, a few times; and where that is nothing, some units of the last place."""
    q, k, v = qkv
    if not expected.numel() or not k.shape[2]:
        return torch.zeros_like(expected)
    mask = torch.from_numpy(exact.allowed(q.shape[2], k.shape[2], is_causal, None))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    error = (F.scaled_dot_product_attention(q, k, v, mask).nan_to_num(0.0) - expected).abs().max()
    return OP.tolerance * error + torch.finfo(q.dtype).eps * expected.abs() + 4 * exact.HALF_ULP * v.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_torch(backend, shape):
    for dtype in cases.DTYPES:
        qkv = shapes.operands(shape, dtype)
        for is_causal in CAUSAL:
            got = run(backend, qkv, is_causal=is_causal)
            assert (got.shape, got.dtype) == ((shape.b, shape.h, shape.sq, shape.dv), dtype)
            assert got.numel() == 0 or got.transpose(1, 2).is_contiguous()
            expected, _ = exact.exact(*qkv, is_causal=is_causal)
            difference = (got - expected).abs()
            assert (difference <= bound(qkv, expected, is_causal)).all(), (dtype, is_causal, difference.max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", CAUSAL)
@pytest.mark.parametrize("scale", [None, 0.7, -0.3, 0.0])
def test_options(backend, is_causal, scale):
    for sq, skv in ((9, 20), (20, 9)):  # of 20 queries at the bottom right of 9 keys, 11 see nothing
        qkv = shapes.operands(shapes.Shape("options", 2, 4, 2, sq, skv, 16, 20))
        got = run(backend, qkv, is_causal=is_causal, scale=scale)
        expected, lse = exact.exact(*qkv, is_causal=is_causal, scale=scale)
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)
        hidden = got[lse == -torch.inf]
        assert hidden.numel() == (11 * 8 * 20 if is_causal == "bottom_right" and sq == 20 else 0)
        assert not hidden.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", shapes.LAYOUTS)
def test_layouts(backend, layout):
    for dtype in cases.DTYPES:
        plain = shapes.operands(shapes.Shape("layouts", 2, 4, 2, 9, 20, 16, 32), dtype)
        views = [shapes.LAYOUTS[layout](x) for x in plain]
        dense = [x.resolve_neg().contiguous().clone() for x in views]
        torch.testing.assert_close(run(backend, views), run(backend, dense), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_reaches_the_queries_that_see_it_and_no_other(backend, value):
    shape = shapes.Shape("broken", 1, 2, 2, 11, 11, 16, 16)
    for which, head, token in ((0, 1, 4), (1, 0, 6), (2, 1, 9)):
        qkv = [x.clone() for x in shapes.operands(shape)]
        qkv[which][0, head, token, 3] = value
        got = run(backend, qkv, is_causal=True)
        broken = torch.zeros(2, 11, dtype=torch.bool)
        broken[head, token : token + 1 if which == 0 else None] = True
        assert torch.equal(got[0].isnan().all(-1), broken)
        assert torch.equal(got[0].isnan().any(-1), broken)
        expected, _ = exact.exact(*shapes.operands(shape), is_causal=True)
        torch.testing.assert_close(got[0][~broken].double(), expected[0][~broken], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(backend):
    """A score far below the largest has no weight; one that overflows gives NaN, as in torch."""
    q, k, v = torch.ones(1, 1, 2, 8), torch.ones(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    k[0, 0, 3] = 1e4
    torch.testing.assert_close(run(backend, (q, k, v)), v[:, :, 3:4].expand(1, 1, 2, 8), rtol=1e-6, atol=0)
    assert run(backend, (q * 1e30, k * 1e30, v)).isnan().all()
    torch.testing.assert_close(run(backend, (q * 0, k, v)), v.mean(2, keepdim=True).expand(1, 1, 2, 8))


# ---- bits="auto" ----------------------------------------------------------------------------------------------------


def operands(h, hkv, sq, skv):
    return shapes.operands(shapes.Shape("auto", 1, h, hkv, sq, skv, 16, 16))


def test_auto_is_float32_up_to_a_size():
    for sizes in ((3, 3, 1, 1), (3, 3, 48, 48), (2, 2, 36, 64), (4, 2, 18, 64), (1, 1, MAX_SHORT_PAIRS, 1)):
        assert is_short(*sizes)
        qkv = operands(*sizes)
        for backend in (None, "reference"):
            with use_backend(backend):
                got = ops.quantized_attention(*qkv, enable_gqa=True)
                assert torch.equal(got, ops.short_attention(*qkv, enable_gqa=True))
    for sizes in ((3, 3, 49, 48), (2, 2, 37, 64), (4, 2, 19, 64), (1, 1, 1, MAX_SHORT_KEYS + 1)):
        assert not is_short(*sizes)
        qkv = operands(*sizes)
        with use_cpu_path("scalar"):
            got = ops.quantized_attention(*qkv, enable_gqa=True)
            assert torch.equal(got, ops.quantized_attention(*qkv, bits=12, enable_gqa=True))


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"is_causal": "bottom_right"}, {"scale": 0.2}, {"window": (-1, 2)}, {}], ids=str
)
def test_auto_is_float32_with_options(options):
    qkv = operands(4, 2, 7, 9)
    got = ops.quantized_attention(*qkv, enable_gqa=True, **options)
    expected, _ = exact.exact(*qkv, **options)
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)
    assert explain("quantized_attention", *qkv, enable_gqa=True, **options).op == "short_attention"


@pytest.mark.parametrize(
    "options",
    [{"mask": torch.ones(7, 9, dtype=torch.bool)}, {"window": 3}, {"softcap": 5.0}, {"return_lse": True}],
    ids=lambda o: next(iter(o)),
)
def test_auto_is_integers_with_other_options(options):
    qkv = operands(4, 2, 7, 9)
    with use_cpu_path("scalar"):
        got = ops.quantized_attention(*qkv, enable_gqa=True, **options)
        expected = ops.quantized_attention(*qkv, bits=12, enable_gqa=True, **options)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, expected)), strict=True):
        assert torch.equal(a, b)
    assert explain("quantized_attention", *qkv, enable_gqa=True, **options).op == "quantized_attention"


def test_bits_are_never_float32():
    qkv = operands(2, 2, 4, 4)
    for bits in shapes.BITS:
        got = ops.quantized_attention(*qkv, bits=bits)
        exact.assert_within(got, None, exact.quantized(*qkv, bits), bits)
        assert not torch.equal(got, ops.short_attention(*qkv))
        assert explain(ops.quantized_attention, *qkv, bits=bits).op == "quantized_attention"


def test_refuses_more_keys():
    with pytest.raises(ValueError, match=r"short_attention: k: got \[1, 2, 65, 16\], expected at most 64 keys"):
        ops.short_attention(*operands(2, 2, 4, 65))


@pytest.mark.parametrize(
    "options", [{"is_causal": "left"}, {"scale": float("inf")}, {"window": 0}, {"softcap": -1.0}, {"bits": 7}], ids=str
)
def test_a_short_call_refuses_what_a_long_one_does(options):
    errors = []
    for skv in (9, 90):
        with pytest.raises(ValueError, match="quantized_attention: ") as error:
            ops.quantized_attention(*operands(2, 2, 7, skv), **options)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_no_grad_computes_what_inference_mode_does():
    q, k, v = operands(2, 2, 7, 9)
    q.requires_grad_()
    with torch.inference_mode():
        expected = ops.quantized_attention(q, k, v)
    with torch.no_grad():
        got = ops.quantized_attention(q, k, v)
    assert not got.requires_grad
    assert torch.equal(got, expected)
    with pytest.raises(RuntimeError, match="short_attention: backward"):
        ops.quantized_attention(q, k, v).sum().backward()
