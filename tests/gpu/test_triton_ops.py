"""The ops with the `triton` backend forced, in Triton's interpreter: every case of the ops' tests against the
reference, torch's own checks of the registration, and the modules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import triton_cases

triton_cases.require()
sys.path.append(str(Path(__file__).parent.parent / "ops"))
import cases  # noqa: E402
import oracle  # noqa: E402
from storage_layout import in_storage_layout  # noqa: E402
from tcompress.kernels.triton.bindings import KERNELS  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from tcompress import backend, explain, nn, ops, use_backend  # noqa: E402
from tcompress.nn.quantized_linear import multi_linear  # noqa: E402
from tcompress.ops._registry import OPS  # noqa: E402

FLOATS = (
    "int8_linear",
    "int8_linear_quantized",
    "int8_multi_linear",
    "int4_linear",
    "int4_multi_linear",
    "sparse_linear",
    "int8_sparse_linear",
    "int4_sparse_linear",
)
#: Weights into the layout of a kernel and back: plain torch.
PLAIN_TORCH = ("sparse_prepack", "sparse_unpack", "int4_sparse_prepack", "int4_sparse_unpack")
#: Tests of their error: test_triton_attention, test_triton_attention_varlen, test_triton_decode.
ATTENTION = ("quantized_attention", "quantized_attention_varlen", "kv_cache_attention")


@pytest.fixture(autouse=True)
def _forced():
    with use_backend("triton"):
        yield


def outputs(result):
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def attention_samples():
    """Types, strides and options; `cases` has windows and softcaps."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, s, d, generator=generator) for h, s, d in ((4, 7, 10), (2, 70, 10), (2, 70, 5)))
    keep = (torch.randn(1, 4, 1, 70, generator=generator) > 0).expand(2, 4, 7, 70)
    yield (q.half(), k.half(), v.half(), None, 8, False, -1, -1, 0.0, 0.3, False)
    yield (q.bfloat16(), k.bfloat16(), v.bfloat16(), keep, 8, True, -1, 0, 0.0, -0.3, True)
    yield (*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), None, 8, False, -1, 0, 0.0, 0.3, True)
    yield (q, k, v, keep, 12, True, -1, 0, 0.0, 0.3, True)


def samples(op):
    return (*attention_samples(),) if op == "quantized_attention" else cases.gpu_samples(op)


SAMPLES = [(op, i) for op in KERNELS if op not in ATTENTION for i, _ in enumerate(cases.gpu_samples(op))]


def sample(op, i):
    arguments = in_storage_layout(op, cases.gpu_samples(op)[i])
    reason = KERNELS[op].unsupported(*arguments)
    if reason is not None:
        with pytest.raises(RuntimeError, match=r"got 'triton' \(forced\)"):
            backend.call(op, *arguments)
        pytest.skip(reason)
    return arguments


@pytest.mark.parametrize(("op", "i"), SAMPLES)
def test_samples_agree_with_the_reference(op, i):
    """Integers bit for bit; floats by the last places, and of requantized floats the integers by one."""
    arguments = sample(op, i)
    expected, got = outputs(OPS[op].reference(*arguments)), outputs(backend.call(op, *arguments))
    for a, b in zip(expected, got, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if op in FLOATS and a.is_floating_point():
            limit = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[a.dtype]
            torch.testing.assert_close(b.double(), a.double(), rtol=limit, atol=limit, equal_nan=True)
        elif op == "int8_linear_requantize":
            within = 1 if not a.is_floating_point() else 1e-5 * a.nan_to_num().abs().max().item() if a.numel() else 0
            torch.testing.assert_close(b.double(), a.double(), rtol=0, atol=within, equal_nan=True)
        else:
            assert oracle.same_bits(a, b)


@pytest.mark.parametrize("op", KERNELS)
def test_opcheck(op):
    """Schema, fake and autograd of `tcompress_triton::<op>`; torch runs the kernel and compares with the fake."""
    arguments = [in_storage_layout(op, a) for a in samples(op)]
    supported = [a for a in arguments if KERNELS[op].unsupported(*a) is None and a[0].numel()]
    for some in supported[:2]:
        torch.library.opcheck(getattr(torch.ops.tcompress_triton, op).default, some)


@pytest.mark.parametrize("scheme", [(8, True), (7, False), (4, True), (3, False)])
@pytest.mark.parametrize("shape", [(0, 16, 8), (1, 33, 20), (3, 17, 0), (1, 70, 2100), (33, 65, 127), (66, 40, 64)])
def test_sums_of_int8_linear_are_exact(shape, scheme):
    m, n, k = shape
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    if m > 2 and k:
        x[1], x[2, -1] = 0, float("nan")
    weight, scale = cases.random_weight(n, k), torch.rand(n)
    arguments = (x, weight, scale, None, None, *scheme, "none", torch.int32)
    got = ops.int8_linear(*arguments)
    with use_backend("reference"):
        assert torch.equal(got, ops.int8_linear(*arguments))


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (7, False)])
def test_sums_over_quantized_activations_are_exact(bits, symmetric):
    x = torch.randn(2, 20, 70, generator=torch.Generator().manual_seed(0)) + 0.5
    quantized = ops.quantize_per_token(x, bits, symmetric)
    weight, scale = cases.random_weight(33, 70), torch.rand(33)
    got = ops.int8_linear_quantized(*quantized, weight, scale, out_dtype=torch.int32)
    with use_backend("reference"):
        assert torch.equal(got, ops.int8_linear_quantized(*quantized, weight, scale, out_dtype=torch.int32))


@pytest.mark.parametrize("options", [{}, {"is_causal": "bottom_right", "return_lse": True}, {"scale": -0.2}])
def test_attention_is_as_far_from_the_truth_as_the_reference(options):
    """Its integers are others (a scale for each block of keys), so both are held against float64."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 4, s, 64, generator=generator, dtype=torch.float16) for s in (70, 130, 130))
    got = outputs(ops.quantized_attention(q, k[:, :2], v[:, :2], bits=8, enable_gqa=True, **options))
    exact = {k: v for k, v in options.items() if k != "return_lse"}
    expected = nn.Int8Attention(precision="float")(
        q.double(), k[:, :2].double(), v[:, :2].double(), enable_gqa=True, **exact
    )
    assert got[0].transpose(1, 2).is_contiguous()
    assert ((got[0] - expected).abs().sum() / expected.abs().sum()).item() <= 0.025
    if len(got) == 2:
        assert got[1].shape == (1, 4, 70)


def on_meta(argument):
    if isinstance(argument, list):
        return [on_meta(a) for a in argument]
    return argument.to("meta") if isinstance(argument, torch.Tensor) else argument


@pytest.mark.parametrize("op", KERNELS)
def test_nothing_before_or_after_a_launch_looks_at_data(op, monkeypatch):
    """So that a CUDA graph can hold it: on tensors without data. Launches are left out."""
    launched = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, **options: launched.append(self))
    if op in PLAIN_TORCH:
        pytest.skip("no kernel; done once, before a layer runs")
    for arguments in samples(op):
        arguments = in_storage_layout(op, arguments)
        if KERNELS[op].unsupported(*arguments) is None:
            with torch.device("meta"):  # a default device may be the GPU: no scalar may be made there and read
                fake = OPS[op].fake(*(on_meta(a) for a in arguments))
                got = KERNELS[op].run(*(on_meta(a) for a in arguments))
            assert [a.shape for a in outputs(got)] == [a.shape for a in outputs(fake)]
    assert launched


# ---- choice ---------------------------------------------------------------------------------------------------------


def test_the_interpreter_runs_only_where_it_is_forced():
    x = torch.ones(2, 16)
    assert backend.select("quantize_per_token", x, 8, True) == "triton"
    with use_backend(None):
        explanation = explain("quantize_per_token", x, 8, True)
        assert explanation.backend == "cpu"
        assert {c.name: c.reason for c in explanation.candidates}["triton"] == "the input is on cpu"


@pytest.mark.parametrize("op", [op for op in OPS if op not in KERNELS])
def test_an_op_without_a_kernel_says_so(op):
    with pytest.raises(RuntimeError, match="it has no kernel for this op"):
        backend.select(op, *cases.SAMPLES[op][0])


def test_backward_raises():
    x = torch.ones(2, 16, requires_grad=True)
    y = ops.int8_linear(x, torch.ones(3, 16, dtype=torch.int8), torch.ones(3))
    with pytest.raises(RuntimeError, match="int8_linear: backward: got a gradient"):
        y.sum().backward()


# ---- modules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scheme", ["W8A8", "W8A7", "W7A7"])
def test_linear_module(scheme, compiled):
    torch.manual_seed(0)
    module = nn.QuantizedLinear.from_linear(torch.nn.Linear(96, 33), scheme).eval()
    run = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    x = torch.randn(2, 5, 96)
    with torch.no_grad():
        got = run(x)
        with use_backend("reference"):
            torch.testing.assert_close(got, module(x), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_several_layers_over_one_input(gated):
    torch.manual_seed(0)
    layers = [nn.QuantizedLinear.from_linear(torch.nn.Linear(40, 24)) for _ in range(2)]
    x = torch.randn(7, 40)
    got = multi_linear(x, layers, gated)
    with use_backend("reference"):
        for a, b in zip(got, multi_linear(x, layers, gated), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_a_module_in_the_layout_of_the_cpu_kernels_says_why_not():
    with use_backend(None):
        module = nn.QuantizedLinear(96, 33)
    with pytest.raises(RuntimeError, match="the weight is in the layout of the CPU kernels"):
        module(torch.ones(2, 96))
