"""As test_fake_cuda, of weights with zeros: which layouts a GPU's kernels take, and layers that hold them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda, graph_of, layout, on_cuda, outputs

from tcompress import Scheme, backend, cuda_backend, explain, nn, triton_backend, use_backend
from tcompress.ops._registry import OPS
from tcompress.ops.int8_linear import ACTIVATIONS
from tcompress.ops.sparse_prepack import gpu_layouts
from tcompress.sparse_kernel import SparseKernel, _has_gpu_kernel

sys.path.append(str(Path(__file__).parent.parent / "ops"))
sys.path.append(str(Path(__file__).parent.parent / "nn"))
import cases
import sparse_layers

SPARSE = [op for op in cases.SAMPLES if "sparse" in op]
#: What packs a weight has no size without data.
FIXED = [op for op in SPARSE if "prepack" not in op]
W8A8 = Scheme.named("W8A8")


@pytest.fixture(autouse=True)
def _triton_is_there(monkeypatch):
    """Also where it is not installed: nothing here runs it."""
    monkeypatch.setattr(triton_backend, "WHY_NO_TRITON", None)


@pytest.mark.parametrize("op", FIXED)
def test_layout_of_every_op(op):
    """The Triton kernel's result, on the GPU, is laid out as the reference's on the CPU."""
    chosen = set()
    for sample in cases.GPU_SAMPLES[op]:
        expected = OPS[op].reference(*sample)
        with fake_cuda() as mode:
            fakes = [on_cuda(mode, a) for a in sample]
            chosen.add(backend.select(op, *fakes))
            if "mma-2:4" in sample:
                continue  # the reference, which looks at the pattern; or C++, below
            got = backend.call(op, *fakes)
        for a, b in zip(outputs(expected), outputs(got), strict=True):
            assert b.device.type == "cuda"
            assert layout(a) == layout(b)
    assert "triton" in chosen


@pytest.mark.parametrize("op", sorted(SPARSE))
def test_reasons_of_sparse_weights(op):
    """A layout is one backend's, and the others name it."""
    with fake_cuda() as mode:
        for sample in cases.gpu_samples(op):
            explanation = explain(op, *(on_cuda(mode, a) for a in sample))
            said = {c.name: c.reason for c in explanation.candidates}
            layout = next((a for a in reversed(sample) if isinstance(a, str) and a not in ACTIVATIONS), "8x4")
            assert explanation.backend == ("triton" if layout.startswith("gpu-") else "reference")
            assert said["cpu"] == "the input is on cuda"
            if explanation.backend == "reference":
                assert said["triton"].startswith(f"layout {layout!r}: the Triton kernels read those that begin with")
            if op == "int8_sparse_linear" and layout != "mma-2:4" and not cuda_backend.WHY_NOT:
                assert said["cuda"] == f"layout {layout!r}: the CUDA kernel reads 'mma-2:4'"


def test_the_cuda_kernel_of_sparse_weights(monkeypatch):
    """As where its extension is built. What it runs is C++; packing is the reference's."""
    monkeypatch.setattr(cuda_backend, "WHY_NOT", None)
    mma = [sample for sample in cases.gpu_samples("int8_sparse_linear") if "mma-2:4" in sample]
    assert mma
    with fake_cuda() as mode:
        for sample in mma:
            fakes = [on_cuda(mode, a) for a in sample]
            explanation = explain("int8_sparse_linear", *fakes)
            assert explanation.backend == "cuda"
            assert layout(backend.call("int8_sparse_linear", *fakes)) == layout(
                OPS["int8_sparse_linear"].reference(*sample)
            )
        for op in ("sparse_prepack", "sparse_unpack"):
            sample = next(sample for sample in cases.gpu_samples(op) if "mma-2:4" in sample)
            assert backend.select(op, *(on_cuda(mode, a) for a in sample)) == "cuda"
        weight = torch.empty(32, 64, device="cuda", dtype=torch.int8)
        layouts = [kernel for kernel in gpu_layouts(torch.int8) if _has_gpu_kernel(weight, kernel, W8A8)]
        assert layouts == ["gpu-2:4", "gpu-8x4", "gpu-16x16", "gpu-32x16", "mma-2:4"]
        with use_backend("cuda"):
            layouts = [kernel for kernel in gpu_layouts(torch.int8) if _has_gpu_kernel(weight, kernel, W8A8)]
        assert layouts == ["mma-2:4"]


# ---- layers with zeros ----------------------------------------------------------------------------------------------


def sparse_layer(scheme, layout, dtype=torch.float32):
    """In a layout of a GPU's kernels. Made on the CPU, for what packs a weight looks at its zeros."""
    linear = sparse_layers.pruned(32, 64, layout.split("-")[1], 0.5, bias=False, dtype=dtype)
    module = nn.SparseLinear.from_linear(linear, scheme, layout="dense")
    dense = linear.weight.detach() if scheme is None else module.packed.integers()
    module._kernel = SparseKernel(layout, scheme and Scheme.named(scheme))
    module.kernel_weight = module._kernel.prepack(dense)
    return module


def put_on_cuda(mode, module):
    for name, tensor in module._buffers.items():
        module._buffers[name] = None if tensor is None else on_cuda(mode, tensor)
    return module


SPARSE_LAYERS = [("W8A8", "gpu-2:4"), ("W7A7", "gpu-16x16"), (None, "gpu-8x4"), (None, "gpu-2:4-bfloat16")]


@pytest.mark.parametrize(("scheme", "name"), SPARSE_LAYERS)
def test_a_sparse_layer(scheme, name):
    dtype = torch.bfloat16 if name.endswith("bfloat16") else torch.float32
    module = sparse_layer(scheme, name, dtype)
    with fake_cuda() as mode:
        put_on_cuda(mode, module)
        assert explain(module).backend == "triton"
        y = module(torch.empty(2, 5, 64, device="cuda", dtype=dtype), torch.empty(2, 5, 32, device="cuda", dtype=dtype))
        assert (y.shape, y.dtype, y.device.type) == ((2, 5, 32), dtype, "cuda")
        if not name.startswith("gpu-2:4"):
            return
        dense = module._kernel.unpack(module.kernel_weight, 32, 64)  # looks at no data
        assert (dense.shape, dense.device.type) == ((32, 64), "cuda")


@pytest.mark.parametrize(("scheme", "name"), SPARSE_LAYERS)
def test_one_graph_of_a_sparse_layer(scheme, name):
    module = sparse_layer(scheme, name, torch.bfloat16 if name.endswith("bfloat16") else torch.float32)
    with fake_cuda() as mode:
        put_on_cuda(mode, module)
        seen, y = graph_of(module, torch.empty(5, 64, device="cuda"))
    assert seen == [f"tcompress_triton.{'int8_' if scheme else ''}sparse_linear.default"]
    assert y.shape == (5, 32)
