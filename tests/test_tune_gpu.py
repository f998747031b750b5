"""Which layout of a GPU's kernels is chosen, without a GPU: others stand in for clock and device, and the references
run the layouts."""

from __future__ import annotations

import json

import pytest
import torch

from tcompress import Scheme, tune, tune_gpu
from tcompress.sparse_kernel import SparseKernel

W8A8 = Scheme.named("W8A8")
INTEGERS = ("dense", "gpu-2:4", "gpu-8x4", "gpu-16x16", "gpu-32x16", "mma-2:4")
BLOCKS = ("dense", "gpu-8x4", "gpu-16x16", "gpu-32x16")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache's file, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tcompress" / "tune.json"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of some name, on which the layouts take the given milliseconds."""

    class Gpu:
        def __init__(self):
            self.name, self.now, self.calls = "GPU A", 0.0, []
            self.milliseconds = dict(zip(INTEGERS, (4.0, 3.0, 2.0, 1.0, 5.0, 6.0), strict=True))

    gpu = Gpu()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = gpu.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    class Device:
        def __init__(self, device):
            pass

        __enter__ = __exit__ = lambda self, *args: None

    call = SparseKernel.__call__

    def timed(self, *args):
        gpu.calls.append(self.layout)
        compiles = gpu.calls.count(self.layout) == 1
        gpu.now += gpu.milliseconds[self.layout] * (10 if compiles else 1)
        return call(self, *args)

    monkeypatch.setattr(SparseKernel, "__call__", timed)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(tune_gpu, "CALLS", 1)
    monkeypatch.setattr(tune_gpu, "ROUNDS", 2)
    monkeypatch.setattr(tune_gpu, "can_measure", lambda weight: True)
    monkeypatch.setattr(tune_gpu, "device", lambda weight: gpu.name)
    return gpu


def blocks(kept, dtype=torch.float16, n=1024, k=1024):
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(n // 32, k // 16, generator=generator) < kept
    dense = torch.randn(n, k, generator=generator) * keep.repeat_interleave(32, 0).repeat_interleave(16, 1)
    return (dense * 40).clamp(-127, 127).to(dtype) if dtype == torch.int8 else dense.to(dtype)


def two_four(n=1024, k=1024):
    weight = torch.ones(n, k, dtype=torch.int8)
    weight.view(n, -1, 4)[..., :2] = 0
    return weight


def choose(weight, layouts, tokens=128, dtype=torch.float32):
    suffix = "-float16" if weight.dtype == torch.float16 else ""
    scheme = W8A8 if weight.dtype == torch.int8 else None
    return tune.choose(weight, [SparseKernel(n + suffix * (n != "dense"), scheme) for n in layouts], tokens, dtype)


# ---- measured -------------------------------------------------------------------------------------------------------


def test_the_fastest_is_taken_and_kept(cache, gpu):
    weight = two_four(32, 64)
    first = choose(weight, INTEGERS, 4)
    assert (first.kernel.layout, first.source) == ("gpu-16x16", "measured")
    assert first.seconds == pytest.approx({layout: ms / 1e3 for layout, ms in gpu.milliseconds.items()})
    assert len(gpu.calls) == len(INTEGERS) * 3
    again = choose(weight, INTEGERS, 4)
    assert (again.kernel, again.source, again.seconds) == (first.kernel, "cached", first.seconds)
    (key,) = json.loads(cache.read_text())
    assert "| GPU A, tcompress" in key
    assert "gpu-2:4 0.50, gpu-8x4 1.00" in key


@pytest.mark.parametrize("layouts", [BLOCKS, INTEGERS])
def test_another_gpu_or_layer_is_measured_anew(cache, gpu, layouts):
    choose(two_four(32, 64), layouts, 4)
    for weight, tokens in ((two_four(32, 64), 5), (two_four(32, 32), 4), (two_four(64, 64), 4)):
        assert choose(weight, layouts, tokens).source == "measured"
    gpu.name = "GPU B"
    assert choose(two_four(32, 64), layouts, 4).source == "measured"
    assert len(json.loads(cache.read_text())) == 5


def test_densities_are_measured_apart(cache, gpu):
    for kept, source in ((0.2, "measured"), (0.8, "measured"), (0.2, "cached")):
        assert choose(blocks(kept, torch.int8, 128, 128), BLOCKS, 2).source == source


# ---- by the rule ----------------------------------------------------------------------------------------------------


def test_without_a_gpu_the_rule_decides(cache, monkeypatch):
    weight = blocks(0.05)
    choice = choose(weight, BLOCKS)
    assert choice.source == "model: no GPU to measure on"
    monkeypatch.setenv("TCOMPRESS_TUNE", "0")
    assert choose(weight, BLOCKS).source == "model"
    assert not cache.exists()
    assert not tune_gpu.can_measure(weight)


@pytest.mark.parametrize(
    ("kept", "tokens", "sparse"),
    [(0.05, 256, True), (0.4, 256, False), (0.4, 1, True), (1.0, 256, False), (1.0, 1, False)],
)
def test_blocks(cache, kept, tokens, sparse):
    """Few of them are worth it; memory decides for one token; a full weight never is."""
    choice = choose(blocks(kept), BLOCKS, tokens, torch.float16)
    assert (choice.kernel.layout != "dense") == sparse
    assert choice.kernel.layout in ("dense", "gpu-32x16-float16")


@pytest.mark.parametrize(("tokens", "layout"), [(1, "gpu-2:4"), (2048, "dense")])
def test_two_of_four(cache, tokens, layout):
    """In Triton it saves memory traffic and no products."""
    assert choose(two_four(), INTEGERS[:-1], tokens).kernel.layout == layout


def test_two_of_four_in_cuda(cache):
    """mma.sp saves products too."""
    assert choose(two_four(2048, 4096), ("dense", "gpu-2:4", "mma-2:4"), 4096).kernel.layout == "mma-2:4"


def test_float32_products_do_without_the_matrix_unit(cache):
    """Where weight and activations have different types the sparse kernels multiply in float32."""
    weight = blocks(0.05)
    assert choose(weight, BLOCKS, 256, torch.float16).kernel.layout != "dense"
    assert choose(weight, BLOCKS, 256, torch.bfloat16).kernel.layout == "dense"


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 0), (0, 4)])
def test_small_weights(cache, shape):
    assert choose(torch.zeros(shape, dtype=torch.int8), INTEGERS, 2).kernel.layout in INTEGERS
