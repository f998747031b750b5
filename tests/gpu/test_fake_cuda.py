"""Ops and modules on GPU tensors, without a GPU: which kernel is chosen, and the shapes, types, strides and devices of
what comes out. None of it runs a kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda, graph_of, layout, on_cuda, outputs

from tcompress import backend, cuda_backend, explain, nn, ops, triton_backend, use_backend
from tcompress.nn.quantized_linear import multi_linear
from tcompress.ops import int4_cuda_layout
from tcompress.ops._registry import OPS

sys.path.append(str(Path(__file__).parent.parent / "ops"))
import cases

#: Of sparse weights: test_fake_cuda_sparse.
SAMPLES = [(op, i) for op in cases.SAMPLES if "sparse" not in op for i in range(len(cases.SAMPLES[op]))]
TRITON = [(op, i) for op, i in SAMPLES if "triton" in backend.kernels(op)]
#: Their references look at data: at the runs of a schedule.
LOOK_AT_DATA = {"int8_prepack"}


@pytest.fixture(autouse=True)
def _triton_is_there(monkeypatch):
    """Also where it is not installed: nothing here runs it."""
    monkeypatch.setattr(triton_backend, "WHY_NO_TRITON", None)


#: Has a layout of its own on CUDA.
OTHERWISE_ON_CUDA = {"int4_prepack"}


@pytest.mark.parametrize(("op", "i"), [s for s in SAMPLES if s[0] not in LOOK_AT_DATA | OTHERWISE_ON_CUDA])
def test_layout_of_every_op(op, i):
    """The chosen backend's result, on the GPU, is laid out as the reference's on the CPU."""
    arguments = cases.SAMPLES[op][i]
    copies = [a.clone() if isinstance(a, torch.Tensor) and OPS[op].mutates else a for a in arguments]
    expected = OPS[op].reference(*copies)
    with fake_cuda() as mode:
        fakes = [on_cuda(mode, a) for a in arguments]
        chosen = backend.select(op, *fakes)
        assert chosen in ("triton", "reference")
        if OPS[op].mutates:
            backend.call_in_place(op, *fakes)
            return
        got = backend.call(op, *fakes)
    for a, b in zip(outputs(expected), outputs(got), strict=True):
        assert b.device.type == "cuda"
        assert layout(a) == layout(b)


def test_what_looks_at_data_says_that_the_reference_runs():
    with fake_cuda() as mode:
        for op in LOOK_AT_DATA:
            explanation = explain(op, *(on_cuda(mode, a) for a in cases.SAMPLES[op][0]))
            assert explanation.backend == "reference"
            assert {c.name: c.reason for c in explanation.candidates}["triton"] == "no kernel for this op yet"


@pytest.mark.parametrize(("op", "i"), TRITON)
def test_explain_agrees_with_select(op, i):
    with fake_cuda() as mode:
        fakes = [on_cuda(mode, a) for a in cases.SAMPLES[op][i]]
        explanation = explain(op, *fakes)
        reason = {c.name: c.reason for c in explanation.candidates}["triton"]
        assert explanation.backend == backend.select(op, *fakes) == ("triton" if reason == "chosen" else "reference")
        if explanation.backend == "reference":
            with use_backend("triton"), pytest.raises(RuntimeError, match=r"got 'triton' \(forced\)") as error:
                backend.call(op, *fakes)
            assert reason in str(error.value)


# ---- what explain says ----------------------------------------------------------------------------------------------


def reasons(*arguments, **options):
    explanation = explain(*arguments, **options)
    return explanation.backend, {c.name: c.reason for c in explanation.candidates}


def test_reasons_of_linear_layers():
    with fake_cuda():
        x, weight = torch.empty(3, 16, device="cuda"), torch.empty(5, 16, device="cuda", dtype=torch.int8)
        scale = torch.empty(5, device="cuda")
        expected = {
            "triton": "chosen",
            "cuda": cuda_backend.WHY_NOT or "passed over: triton is preferred",
            "cpu": "the input is on cuda",
            "reference": "passed over: a kernel is faster",
        }
        assert reasons(ops.int8_linear, x, weight, scale) == ("triton", expected)
        chosen, why = reasons(ops.int8_linear, x, None, scale)
        assert (chosen, why["triton"][:47]) == ("reference", "the weight is in the layout of the CPU kernels:")
        chosen, why = reasons(ops.quantize_per_token, x, 8, False)
        assert (chosen, why["triton"][:25]) == ("reference", "bits=8, symmetric=False: ")
        with use_backend("cpu"), pytest.raises(RuntimeError, match="the input is on cuda"):
            ops.int8_linear(x, weight, scale)
        if cuda_backend.WHY_NOT:
            with use_backend("cuda"), pytest.raises(RuntimeError, match="the CUDA extension"):
                ops.int8_linear(x, weight, scale)
        with use_backend("cuda"), pytest.raises(RuntimeError, match="it has no kernel for this op"):
            ops.int8_unpack(torch.empty(0, dtype=torch.int8, device="cuda"), 0, 0)


def test_reasons_of_attention():
    with fake_cuda():
        q = torch.empty(1, 2, 70, 64, device="cuda", dtype=torch.float16)
        op = ops.quantized_attention
        assert reasons(op, q, q, q, bits=8, is_causal=True)[0] == "triton"
        for options in ({"window": 4}, {"softcap": 5.0}):
            assert reasons(op, q, q, q, bits=8, **options)[0] == "triton"
        chosen, said = reasons(op, q, q, q, bits=12)
        assert chosen == "triton"
        assert "bits=12" in said["cuda"] or cuda_backend.WHY_NOT in said.values()
        with use_backend("cuda"), pytest.raises(RuntimeError, match="bits=12|the CUDA extension"):
            op(q, q, q, bits=12)


def test_automatic_attention_is_what_was_measured_to_be_faster():
    with fake_cuda():
        q = torch.empty(1, 2, 70, 64, device="cuda", dtype=torch.float16)
        for options in (
            {},
            {"is_causal": True},
            {"window": 4},
            {"mask": torch.ones(70, 70, dtype=bool, device="cuda")},
        ):
            explanation = explain(ops.quantized_attention, q, q, q, **options)
            assert explanation.backend == "scaled_dot_product_attention"
            assert "other GPUs are not measured" in str(explanation)
            assert ops.quantized_attention(q, q, q, **options).shape == q.shape
        assert reasons(ops.quantized_attention, q, q, q, return_lse=True)[0] == "triton"
        assert ops.quantized_attention(q, q, q, return_lse=True)[1].shape == (1, 2, 70)
        with use_backend("triton"):
            assert reasons(ops.quantized_attention, q, q, q)[0] == "triton"
        with pytest.raises(ValueError, match="quantized_attention: softcap"):
            ops.quantized_attention(q, q, q, softcap=-1.0)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"WHY_NO_TRITON": "triton is not installed"}, "triton is not installed"),
        ({"why_not_this_gpu": lambda index: "compute capability 7.5: …"}, "compute capability 7.5: …"),
    ],
)
def test_where_triton_cannot_run(state, reason, monkeypatch):
    for name, value in state.items():
        monkeypatch.setattr(triton_backend, name, value)
    with fake_cuda():
        x = torch.empty(3, 16, device="cuda")
        assert reasons(ops.quantize_per_token, x)[1]["triton"] == reason
        assert ops.quantize_per_token(x)[0].shape == x.shape
        with use_backend("triton"), pytest.raises(RuntimeError, match=reason):
            ops.quantize_per_token(x)


def test_why_not_this_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: {0: (7, 5), 1: (8, 0), 2: (9, 0)}[index])
    assert [triton_backend.why_not_this_gpu(i) is None for i in range(3)] == [False, True, True]
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "AMD" in triton_backend.why_not_this_gpu(2)


# ---- modules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["W8A8", "W8A7", "W4A8-g32", "W4A16-g128"])
def test_a_module_moves(scheme):
    """The layout of the CPU kernels stays behind: the GPU's read the storage layout."""
    with fake_cuda():
        module = nn.QuantizedLinear(96, 33, bias=False, scheme=scheme)  # torch cannot exchange fake parameters
        saved = {name: layout(x) for name, x in module.state_dict().items()}
        assert module.held_kernel is not None
        module.to("cuda")
        assert module.held_kernel is None
        assert module.qdata.device.type == "cuda"
        assert {name: layout(x) for name, x in module.state_dict().items()} == saved
        x = torch.empty(2, 5, 96, device="cuda", dtype=torch.bfloat16)
        y = module(x)
        assert (y.shape, y.dtype, y.device.type) == ((2, 5, 33), torch.bfloat16, "cuda")
        if module.qdata.dtype == torch.int8:
            assert explain(ops.int8_linear, x, module.qdata, module.scale).backend == "triton"


@pytest.fixture
def cuda_forced(monkeypatch):
    """The CUDA C++ kernels, also where they are not built: nothing here runs them."""
    monkeypatch.setattr(cuda_backend, "WHY_NOT", None)
    with use_backend("cuda"):
        yield


@pytest.mark.parametrize("i", range(len(cases.SAMPLES["int4_prepack"])))
def test_int4_layout_of_cuda(i, cuda_forced):
    weight, scale, zero_point, k, group_size = cases.SAMPLES["int4_prepack"][i]
    with fake_cuda() as mode:
        got = ops.int4_prepack(*(on_cuda(mode, a) for a in (weight, scale, zero_point)), k, group_size)
    assert got.device.type == "cuda"
    assert layout(got) == layout(int4_cuda_layout.pack(weight, scale, zero_point, k, group_size))


@pytest.mark.parametrize("scheme", ["W4A16-g128", "W4A16-g32", "W4A8-g32", "W8A8"])
def test_a_module_moves_to_the_kernels_of_cuda(scheme, cuda_forced):
    """Weight-only int4 gets the layout of that kernel, derived from the storage layout and back to it."""
    with fake_cuda():
        with use_backend(None):
            module = nn.QuantizedLinear(96, 33, bias=False, scheme=scheme)
        saved = {name: layout(x) for name, x in module.state_dict().items()}
        module.to("cuda")
        if scheme.startswith("W4A16"):
            assert module.qdata is None
            assert (module.kernel_weight.dtype, module.kernel_weight.device.type) == (torch.int32, "cuda")
            x = torch.empty(2, 5, 96, device="cuda", dtype=torch.bfloat16)
            assert layout(module(x)) == ((2, 5, 33), torch.bfloat16, [165, 33, 1])
            (y,) = multi_linear(x, [module, module], gated=True)
            assert layout(y) == ((2, 5, 33), torch.bfloat16, [165, 33, 1])
            with pytest.raises(RuntimeError, match="x of float32: the CUDA kernel multiplies 16-bit floats"):
                module(x.float())
            with use_backend("triton"), pytest.raises(RuntimeError, match="in the layout of the CUDA C"):
                module(x)
            with use_backend(None):  # the reference reads any layout
                assert module(x.float()).shape == (2, 5, 33)
        else:
            assert module.kernel_weight is None
        assert {name: layout(x) for name, x in module.state_dict().items()} == saved
        with use_backend(None):
            module.to("cpu")
        assert module.held_kernel is not None
        assert module.kernel_weight.dtype == torch.int8
        assert {name: layout(x) for name, x in module.state_dict().items()} == saved


def test_int4_layout_where_triton_is_not_installed(monkeypatch):
    monkeypatch.setattr(cuda_backend, "WHY_NOT", None)
    with fake_cuda():
        module = nn.QuantizedLinear(96, 33, bias=False, scheme="W4A16-g32")
        assert module.to("cuda").kernel_weight is None
        module.to("cpu")
        monkeypatch.setattr(triton_backend, "WHY_NO_TRITON", "triton is not installed")
        assert module.to("cuda").kernel_weight.dtype == torch.int32
        x = torch.empty(5, 96, device="cuda", dtype=torch.float16)
        assert (
            explain(ops.int4_linear, x, None, *module._int4_parts()[:2], None, module.kernel_weight, 32, None).backend
            == "cuda"
        )


def test_one_graph_of_int4_on_the_kernels_of_cuda(cuda_forced):
    with fake_cuda():
        module = nn.QuantizedLinear(96, 33, scheme="W4A16-g32", device="cuda", activation="gelu")
        seen, y = graph_of(module, torch.empty(5, 96, device="cuda", dtype=torch.float16))
    assert "tcompress.int4_linear.default" in seen
    assert y.shape == (5, 33)


@pytest.mark.parametrize("scheme", ["W4A16-g32", "W4A8-g32"])
def test_one_graph_of_int4(scheme):
    with fake_cuda():
        layers = torch.nn.ModuleList(nn.QuantizedLinear(32, 64, scheme=scheme, device="cuda") for _ in range(2))
        x = torch.empty(5, 32, device="cuda", dtype=torch.float16)
        seen, _ = graph_of(layers[0], x)
        assert seen == ["tcompress_triton.int4_linear.default"]
        seen, ys = graph_of(lambda x: multi_linear(x, list(layers)), x)
        assert "tcompress_triton.int4_multi_linear.default" in seen
    assert [y.shape for y in ys] == [(5, 64)] * 2


@pytest.mark.parametrize("scheme", ["W8A8", "W8A7"])
def test_one_graph_of_a_linear_layer(scheme):
    with fake_cuda():
        module = nn.QuantizedLinear(96, 33, scheme=scheme, device="cuda", activation="gelu")
        seen, y = graph_of(module, torch.empty(5, 96, device="cuda"))
    assert seen == ["tcompress_triton.int8_linear.default"]
    assert y.shape == (5, 33)


@pytest.mark.parametrize(("bits", "expected"), [(8, "tcompress_triton.quantized_attention"), ("auto", "scaled_dot_")])
def test_one_graph_of_attention(bits, expected):
    with fake_cuda():
        q = torch.empty(1, 4, 70, 64, device="cuda", dtype=torch.float16)
        seen, y = graph_of(nn.Int8Attention(bits), q, q, q, is_causal=True)
    assert any(expected in name for name in seen)
    assert y.shape == q.shape


def test_one_graph_of_sequences_laid_end_to_end():
    """Their ends are on the GPU, and nobody looks at them."""

    def attend(q, ends):
        return ops.quantized_attention_varlen(q, q, q, ends, ends, is_causal=True, return_lse=True)

    with fake_cuda():
        q = torch.empty(70, 4, 64, device="cuda", dtype=torch.float16)
        ends = torch.empty(3, device="cuda", dtype=torch.int32)
        results = [attend(q, ends)]
        seen, compiled = graph_of(attend, q, ends)
    assert "tcompress_triton.quantized_attention_varlen.default" in seen
    for out, lse in (*results, compiled):
        assert (out.shape, out.dtype, lse.shape) == (q.shape, q.dtype, (4, 70))


def test_one_graph_of_several_layers_over_one_input():
    with fake_cuda():
        layers = torch.nn.ModuleList(nn.QuantizedLinear(32, n, device="cuda") for n in (64, 64))
        x = torch.empty(5, 32, device="cuda")
        for gated in (False, True):
            seen, ys = graph_of(lambda x, gated=gated: multi_linear(x, list(layers), gated), x)
            assert "tcompress_triton.int8_multi_linear.default" in seen
            assert [y.shape for y in ys] == [(5, 64)] * (2 - gated)
