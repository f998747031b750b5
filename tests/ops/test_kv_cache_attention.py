"""kv_cache_attention: against quantized_attention of the same tokens, and every path against the reference."""

import attention_cases as shapes
import attention_oracle as exact
import cases
import oracle
import pytest
import torch
from attention_samples import empty_cache

from tcompress import ops, use_backend, use_cpu_path

OPTIONS = [
    {},
    {"is_causal": "bottom_right"},
    {"is_causal": True, "window": 20},
    {"scale": -0.3, "softcap": 2.0},
    {"window": (5, 30)},
]
SHAPES = [s for s in shapes.SHAPES if s.b * s.h * s.sq * s.skv * s.d * s.dv > 0 and s.skv * s.sq < 40000]


def cache_of(k, v, blocks=None):
    cache = empty_cache(*k.shape[:2], blocks or -(-k.shape[2] // 64), k.shape[3], v.shape[3])
    ops.kv_cache_append(*cache, k, v, 0)
    return cache


def attend(q, cache, length, dv, **options):
    return ops.kv_cache_attention(q, *cache, length, dv, return_lse=True, **options)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_quantized_attention_of_8_bits(path, shape):
    """The reference of one is that of the other; the kernels differ in the layout that they read."""
    q, k, v = shapes.operands(shape)
    options = OPTIONS[sum(map(ord, shape.name)) % len(OPTIONS)]
    with use_backend("reference"):
        cache = cache_of(k, v)
        expected = attend(q, cache, shape.skv, shape.dv, **options)
        same = ops.quantized_attention(q, k, v, bits=8, enable_gqa=True, return_lse=True, **options)
    assert all(map(torch.equal, expected, same))
    torch.set_num_threads(1)  # with more, the keys may be split, and sums come in another order
    try:
        with use_backend("cpu"), use_cpu_path(path):
            got = attend(q, cache, shape.skv, shape.dv, **options)
    finally:
        torch.set_num_threads(2)
    assert oracle.same_bits(got[0], expected[0])
    assert exact.same_lse(got[1], expected[1])


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("mask", ["random", "key-padding", "rows-hidden", "minus-infinity", "added-bfloat16"])
def test_masks(path, mask):
    shape = shapes.BY_NAME["gqa2"]
    q, k, v = shapes.operands(shape)
    keep = shapes.MASKS[mask](shape)
    with use_backend("reference"):
        expected = ops.quantized_attention(q, k, v, bits=8, enable_gqa=True, mask=keep)
    with use_cpu_path(path):
        got, _ = attend(q, cache_of(k, v), shape.skv, shape.dv, mask=keep)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize(("heads", "kv_heads", "sq"), [(1, 1, 1), (4, 1, 1), (3, 3, 2), (8, 1, 5)])
def test_keys_split_over_threads(path, heads, kv_heads, sq):
    q, k, v = (
        shapes.normal(1, heads, sq, 64),
        shapes.normal(1, kv_heads, 1500, 64),
        shapes.normal(1, kv_heads, 1500, 32),
    )
    k[0, 0, 700] += 5
    cache = cache_of(k, v)
    mask = torch.ones(1500, dtype=torch.bool)
    mask[:600] = False  # the first parts see nothing
    for options in ({}, {"mask": mask}, {"is_causal": "bottom_right", "window": 300}):
        with use_backend("reference"):
            expected = attend(q, cache, 1500, 32, **options)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                with use_cpu_path(path):
                    got = attend(q, cache, 1500, 32, **options)
            finally:
                torch.set_num_threads(2)
            torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
def test_what_lies_behind_the_length_does_not_matter(path):
    q, k, v = shapes.normal(2, 4, 3, 20), shapes.normal(2, 2, 100, 20, name="k"), shapes.normal(2, 2, 100, 24, name="v")
    cache = cache_of(k, v, blocks=3)
    with use_cpu_path(path):
        expected = attend(q, cache, 70, 24)
        for data, scale in ((cache[0], cache[1]), (cache[2], cache[3])):
            data[:, :, 2:] = 99
            scale.flatten(2)[..., 70:] = float("nan")
        got = attend(q, cache, 70, 24)
    assert all(map(oracle.same_bits, got, expected))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tokens_that_are_not_finite(backend):
    q, k, v = shapes.normal(1, 2, 4, 16), shapes.normal(1, 2, 80, 16, name="k"), shapes.normal(1, 2, 80, 16, name="v")
    k[0, 0, 78, 3] = float("nan")  # queries 2 and 3 of the first head see it
    with use_backend(backend):
        out, lse = attend(q, cache_of(k, v), 80, 16, is_causal="bottom_right")
    assert torch.isnan(out[0, 0]).all(1).tolist() == torch.isnan(lse[0, 0]).tolist() == [False, False, True, True]
    assert torch.isfinite(out[0, 1]).all()


def test_empty():
    cache = empty_cache(1, 2, 1, 8, 8)
    out, lse = attend(shapes.normal(1, 4, 3, 8), cache, 0, 8)
    assert not out.any()
    assert (lse == float("-inf")).all()
    assert attend(shapes.normal(1, 4, 0, 8), cache, 0, 8)[0].shape == (1, 4, 0, 8)


def test_arguments():
    cache = empty_cache(1, 2, 1, 8, 8)
    q = shapes.normal(1, 4, 3, 8)
    with pytest.raises(TypeError, match="kv_cache_attention: q: got torch.int64, expected float32"):
        attend(q.long(), cache, 5, 8)
    with pytest.raises(ValueError, match=r"q: got \[2, 4, 3, 8\], expected \[1, H, Sq, D\]"):
        attend(q.expand(2, -1, -1, -1), cache, 5, 8)
    with pytest.raises(ValueError, match="q: got 3 heads, expected a multiple of 2 as in k"):
        attend(q[:, :3], cache, 5, 8)
    with pytest.raises(ValueError, match="length: got 65, expected 0 to 64, the room of the cache"):
        attend(q, cache, 65, 8)
    with pytest.raises(ValueError, match="v_data: got"):
        attend(q, cache, 5, 17)
    with pytest.raises(ValueError, match="mask: got"):
        attend(q, cache, 5, 8, mask=torch.ones(6, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="backward"):
        attend(q.requires_grad_(), cache, 5, 8)[0].sum().backward()


def test_compiles():
    q, k, v = shapes.normal(1, 4, 3, 16), shapes.normal(1, 2, 70, 16, name="k"), shapes.normal(1, 2, 70, 16, name="v")
    cache = cache_of(k, v)

    def step(x):
        return ops.kv_cache_attention(x * 1, *cache, 70, 16, is_causal="bottom_right") + 1

    with torch.inference_mode():
        assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(q), step(q))
