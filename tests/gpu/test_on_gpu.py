"""On a real GPU: every sample of the ops' tests that its kernels take, against the references on the CPU; and modules.

Skipped without a GPU. `make test-gpu` runs it.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

sys.path.append(str(Path(__file__).parent.parent / "ops"))
sys.path.append(str(Path(__file__).parent.parent / "nn"))
import cases
import sparse_layers
from storage_layout import in_storage_layout
from tcompress.kernels.triton.bindings import KERNELS

from tcompress import backend, cuda_backend, explain, nn, triton_backend, use_backend
from tcompress.ops import int4_cuda_layout
from tcompress.ops._registry import OPS

UNSUPPORTED = {
    "triton": {op: kernel.unsupported for op, kernel in KERNELS.items()},
    "cuda": cuda_backend.UNSUPPORTED,
}
WHY_NOT = {"triton": triton_backend.WHY_NO_TRITON, "cuda": cuda_backend.WHY_NOT}
PAIRS = [(name, op) for name, table in UNSUPPORTED.items() for op in table]
#: Attention has integers of its own (a scale a block of keys); its P and V are 16-bit floats.
LIMITS = {"quantized_attention": 0.025, "quantized_attention_varlen": 0.025, "kv_cache_attention": 2e-3}


@pytest.fixture(autouse=True)
def _stored_tiles(monkeypatch):
    """Choosing tiles by measuring takes seconds a size."""
    monkeypatch.setenv("TCOMPRESS_TUNE", "0")


def on_gpu(argument):
    if isinstance(argument, torch.Tensor):
        return argument.cuda()
    return type(argument)(map(on_gpu, argument)) if isinstance(argument, list | tuple) else argument


def relative(expected, got):
    kept = expected.isfinite()
    difference = (expected.double() - got.double())[kept].norm()
    return (difference / expected.double()[kept].norm().clamp_min(1e-9)).item() if kept.any() else 0.0


@pytest.mark.parametrize(("name", "op"), PAIRS)
def test_samples_agree_with_the_reference(name, op):
    if WHY_NOT[name]:
        pytest.skip(WHY_NOT[name])
    ran = 0
    for sample in cases.gpu_samples(op):
        arguments = in_storage_layout(op, sample)
        if UNSUPPORTED[name][op](*arguments) is not None:
            continue
        ran += 1
        layout_of_cuda = op == "int4_prepack"
        expected = (int4_cuda_layout.pack if layout_of_cuda else OPS[op].reference)(*arguments)
        with use_backend(name):
            got = backend.call(op, *on_gpu(arguments))
        pairs = zip(*(r if isinstance(r, list | tuple) else (r,) for r in (expected, got)), strict=True)
        for a, b in pairs:
            b = b.cpu()
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            if a.is_floating_point():
                assert torch.equal(a.isnan(), b.isnan())
                limit = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[a.dtype]
                assert relative(a, b) <= max(limit, LIMITS.get(op, 0.0))
            elif op == "int8_linear_requantize":  # of floats that may differ in their last places
                assert a.numel() == 0 or (a.int() - b.int()).abs().max() <= 1
            else:
                assert torch.equal(a, b)
    assert ran


def run_as(how, module, x):
    """The module's result for `x`, on the GPU."""
    inputs = torch.zeros_like(x, device="cuda")
    run = torch.compile(module, fullgraph=True) if how == "compiled" else module
    got = run(inputs)
    if how != "graph":
        return run(x.cuda())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(inputs)
    inputs.copy_(x)
    graph.replay()
    return got


@pytest.mark.parametrize("how", ["eager", "compiled", "graph"])
@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("scheme", ["W8A8", "W7A7"])
def test_linear_module(name, how, scheme):
    if WHY_NOT[name]:
        pytest.skip(WHY_NOT[name])
    torch.manual_seed(0)
    module = nn.QuantizedLinear.from_linear(torch.nn.Linear(512, 256), scheme)
    x = torch.randn(32, 512)
    expected, state = module(x), {key: value.clone() for key, value in module.state_dict().items()}
    module.to("cuda")
    with use_backend(name):
        torch.testing.assert_close(run_as(how, module, x).cpu(), expected, rtol=1e-5, atol=1e-5)
    module.to("cpu")
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in state.items())


SPARSE = [(scheme, f"gpu-{pattern}") for scheme in (None, "W8A8", "W7A7") for pattern in ("2:4", "8x4", "32x16")]


@pytest.mark.parametrize("how", ["eager", "compiled", "graph"])
@pytest.mark.parametrize(("scheme", "layout"), [*SPARSE, ("W8A8", "mma-2:4")])
def test_sparse_layer(scheme, layout, how):
    name = "cuda" if layout.startswith("mma") else "triton"
    if WHY_NOT[name]:
        pytest.skip(WHY_NOT[name])
    torch._dynamo.reset()
    linear = sparse_layers.pruned(256, 512, layout.split("-")[1])
    x = sparse_layers.tokens(32, 512)
    expected = nn.SparseLinear.from_linear(linear, scheme, layout="dense")
    module = nn.SparseLinear.from_linear(linear.cuda(), scheme, layout=layout)
    assert explain(module).backend == name
    with torch.no_grad():
        got = run_as(how, module, x)
        torch.testing.assert_close(got.cpu(), expected(x), rtol=1e-4, atol=1e-5)
    state = module.state_dict()
    assert all(torch.equal(value.cpu(), state[key].cpu()) for key, value in expected.state_dict().items())


@pytest.mark.parametrize("tune", ["0", "1"])
@pytest.mark.parametrize("scheme", [None, "W8A8"])
def test_a_sparse_layer_moves(scheme, tune, monkeypatch):
    """It measures its layouts on the GPU, or asks the rule, and takes its own again on the CPU."""
    monkeypatch.setenv("TCOMPRESS_TUNE", tune)
    linear = sparse_layers.pruned(256, 512, "16x16", 0.9)
    module = nn.SparseLinear.from_linear(linear, scheme, layout="8x4")
    x = sparse_layers.tokens(32, 512)
    expected, packed = module(x), module.kernel_weight.clone()
    module.to("cuda")
    torch.testing.assert_close(module(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-5)
    assert {c.name for c in explain(module).candidates} >= {"dense", "gpu-8x4", "gpu-16x16"}
    module.to("cpu")
    assert torch.equal(module.kernel_weight, packed)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("tokens", [1, 16, 40, 300])
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_weight_only_module(name, tokens):
    """16-bit activations; CUDA C++ holds the weight in a layout of its own. 300 tokens: Triton's dequantized weight."""
    if WHY_NOT[name]:
        pytest.skip(WHY_NOT[name])
    torch.manual_seed(0)
    module = nn.QuantizedLinear.from_linear(torch.nn.Linear(512, 200), "W4A16-g128").to(torch.bfloat16)
    x = torch.randn(tokens, 512).bfloat16()
    expected, state = module(x), {key: value.clone() for key, value in module.state_dict().items()}
    with use_backend(name):
        module.to("cuda")
        assert (module.kernel_weight is not None) == (name == "cuda")
        got, graph, inputs = module(x.cuda()), torch.cuda.CUDAGraph(), torch.zeros_like(x, device="cuda")
        compiled = torch.compile(module, fullgraph=True)(x.cuda())
        with torch.cuda.graph(graph):
            replayed = module(inputs)
        inputs.copy_(x)
        graph.replay()
        for y in (got, compiled, replayed):
            assert relative(expected, y.cpu()) <= 8e-3
    module.to("cpu")
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in state.items())


def normal(*shape, dtype=torch.float16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


@pytest.mark.parametrize("value_bits", [16, 8])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_attention_of_every_tile_against_float64(d, value_bits):
    if WHY_NOT["triton"]:
        pytest.skip(WHY_NOT["triton"])
    from tcompress.kernels.triton.attention import attention

    for tokens in (64, 1000, 4096):
        q, k, v = (normal(1, 2, tokens, d, seed=i) for i in range(3))
        for causal in (False, True):
            s = q.double() @ k.double().mT * d**-0.5
            if causal:
                s = s.masked_fill(torch.ones(tokens, tokens, device="cuda").triu(1).bool(), -torch.inf)
            expected = torch.softmax(s, -1) @ v.double()
            out, lse = attention(q, k, v, causal=causal, return_lse=True, value_bits=value_bits)
            assert ((out - expected).abs().sum() / expected.abs().sum()).item() <= 0.021
            assert (lse - torch.logsumexp(s, -1)).abs().max() < 0.06


def test_a_graph_of_sequences_laid_end_to_end():
    """Captured once, replayed with other lengths; each sequence as the dense kernel has it."""
    if WHY_NOT["triton"]:
        pytest.skip(WHY_NOT["triton"])
    from tcompress.kernels.triton.attention import attention
    from tcompress.kernels.triton.attention_tiles import attention_tile
    from tcompress.kernels.triton.attention_varlen import attention_varlen

    tile = attention_tile(64, 64, 4, 2)
    q, k, v = normal(900, 4, 64), normal(900, 2, 64, seed=1), normal(900, 2, 64, seed=2)
    ends = torch.tensor([0, 900, 900, 900], device="cuda")

    def run():
        return attention_varlen(q, k, v, ends, ends, right=0, return_lse=True, tile=tile)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run()
    for others in ([0, 1, 700, 900], [0, 300, 300, 850]):
        ends.copy_(torch.tensor(others))
        graph.replay()
        for first, end in pairwise(others):
            if first == end:
                continue
            one = (x[first:end].transpose(0, 1)[None] for x in (q, k, v))
            expected, expected_lse = attention(*one, causal=True, return_lse=True, tile=tile)
            torch.testing.assert_close(out[first:end].transpose(0, 1), expected[0], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(lse[:, first:end], expected_lse[0], rtol=1e-4, atol=1e-4)
        assert (out[others[-1] :] == 0).all()
