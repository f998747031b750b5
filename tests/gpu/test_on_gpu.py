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
import cases
from tcompress.kernels.triton.bindings import KERNELS

from tcompress import backend, cuda_backend, nn, triton_backend, use_backend
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


def in_storage_layout(op, arguments):
    """Weights that are given in the layout of the CPU kernels alone, brought back."""
    arguments = list(arguments)
    k = arguments[0].shape[-1]
    unpack = OPS["int8_unpack"].reference
    if op == "int8_multi_linear":
        triples = zip(arguments[1], arguments[2], arguments[4], strict=True)
        arguments[1] = [unpack(kw, s.shape[0], k) if w is None else w for w, s, kw in triples]
        arguments[4] = [None] * len(arguments[1])
    elif op.startswith("int8_linear"):
        at = 3 if op == "int8_linear_quantized" else 1
        if arguments[at] is None:
            arguments[at] = unpack(arguments[at + 3], arguments[at + 1].shape[0], k)
        arguments[at + 3] = None
    return tuple(arguments)


def relative(expected, got):
    kept = expected.isfinite()
    difference = (expected.double() - got.double())[kept].norm()
    return (difference / expected.double()[kept].norm().clamp_min(1e-9)).item() if kept.any() else 0.0


@pytest.mark.parametrize(("name", "op"), PAIRS)
def test_samples_agree_with_the_reference(name, op):
    if WHY_NOT[name]:
        pytest.skip(WHY_NOT[name])
    ran = 0
    for sample in cases.SAMPLES[op]:
        arguments = in_storage_layout(op, sample)
        if UNSUPPORTED[name][op](*arguments) is not None:
            continue
        ran += 1
        expected = OPS[op].reference(*arguments)
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
        inputs = torch.zeros(32, 512, device="cuda")
        run = torch.compile(module, fullgraph=True) if how == "compiled" else module
        got = run(inputs)
        if how == "graph":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = run(inputs)
            inputs.copy_(x)
            graph.replay()
        else:
            got = run(x.cuda())
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
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
    from tcompress.kernels.triton.attention_tiles import Tiles
    from tcompress.kernels.triton.attention_varlen import attention_varlen

    tile = Tiles(64, 64, 4, 2)
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
