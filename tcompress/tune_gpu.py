"""Times of the kernel layouts of a weight with zeros on a GPU: measured there, or by a rule where there is none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

from tcompress.kernels.triton import sparse_layout
from tcompress.ops.sparse_mma import MMA_TWO_FOUR, mma_bytes
from tcompress.ops.sparse_prepack import gpu_layouts, gpu_pattern
from tcompress.sparse_kernel import DENSE, SparseKernel

CALLS, ROUNDS = 20, 5

#: Bytes a second from memory and from the second-level cache, and operations a second by type: about an A100's data
#: sheet, for the rule compares layouts and tells no times.
MEMORY, CACHE = 1.5e12, 5e12
RATES = {torch.int8: 6.2e14, torch.float16: 3.1e14, torch.bfloat16: 3.1e14, torch.float32: 1.9e13}
#: Of the rate, what a kernel is taken to reach. Not measured on a GPU: a 2:4 weight is made dense in registers before
#: the product, or has half the products (mma-2:4); blocks of few outputs leave the matrix unit idle.
SHARES = {DENSE: 0.6, "2:4": 0.3, MMA_TWO_FOUR: 0.5, "8x4": 0.05, "16x16": 0.1, "32x16": 0.2}


def concerns(weight: torch.Tensor, kernels: Sequence[SparseKernel]) -> bool:
    """Whether the kernels are a GPU's; also on the CPU, where Triton interprets them."""
    layouts = gpu_layouts(weight.dtype)
    return weight.is_cuda or any(kernel.layout in layouts for kernel in kernels)


def can_measure(weight: torch.Tensor) -> bool:
    """Whether there is a GPU, and a weight with values on it."""
    return weight.is_cuda and torch.cuda.is_available() and not isinstance(weight, FakeTensor)


def device(weight: torch.Tensor) -> str:
    """Its name, as a key of measurements has it."""
    return torch.cuda.get_device_name(weight.device)


def kept(weight: torch.Tensor, layout: str) -> float:
    """The part of a weight that a layout keeps, 0 … 1."""
    pattern = gpu_pattern(layout)
    if layout == MMA_TWO_FOUR or pattern == sparse_layout.TWO_FOUR:
        return 0.5
    if pattern is None or weight.numel() == 0:
        return 1.0
    return sparse_layout.kept_blocks(weight, pattern)


def measure(weight: torch.Tensor, kernels: Sequence[SparseKernel], tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of the fastest round of each kernel, in turns, by events on the current stream. The first call of a
    kernel compiles it and chooses its tiles."""
    n, k = weight.shape
    x = torch.randn(tokens, k, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    x = x.to(weight.device, dtype)
    scale = torch.full((n,), 0.01, dtype=torch.float32, device=weight.device) if weight.dtype == torch.int8 else None
    packed = {kernel.layout: kernel.prepack(weight) for kernel in kernels}
    fastest: dict[str, float] = {}
    with torch.inference_mode(), torch.cuda.device(weight.device):
        for warm_up in (True, *[False] * ROUNDS):
            for kernel in kernels:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(CALLS):
                    kernel(x, packed[kernel.layout], n, scale, None, "none", None)
                end.record()
                end.synchronize()
                if not warm_up:
                    seconds = start.elapsed_time(end) / (1000 * CALLS)
                    fastest[kernel.layout] = min(seconds, fastest.get(kernel.layout, seconds))
    return fastest


def model_seconds(weight: torch.Tensor, kernel: SparseKernel, tokens: int, dtype: torch.dtype) -> float:
    """The longest of what memory, the cache and the matrix unit take. A rule for the order of the layouts."""
    (n, k), size, layout = weight.shape, weight.element_size(), kernel.layout
    part, pattern = kept(weight, layout), gpu_pattern(layout) or layout
    elements, cache, dense_operations = part * n * k, 0.0, 2.0 * tokens * n * k
    product = weight.dtype if weight.dtype in (torch.int8, dtype) else torch.float32
    if pattern == sparse_layout.TWO_FOUR:
        operations, read = dense_operations, elements * size + n * k / 8
    elif layout == MMA_TWO_FOUR:
        operations, read = part * dense_operations, float(mma_bytes(n, k))
    elif layout == DENSE:  # of floats in the type of x, as torch multiplies
        product = weight.dtype if weight.dtype == torch.int8 else dtype
        operations, read = dense_operations, elements * size
    else:
        r, c = sparse_layout.block_size(pattern)
        operations = part * dense_operations
        read = elements / (r * c) * sparse_layout.block_bytes(weight.dtype, pattern)
        cache = elements / r * tokens * product.itemsize  # each row of blocks reads the tokens again
    rate = RATES.get(product, RATES[torch.float32]) * SHARES[pattern]
    return max((read + tokens * (n + k) * dtype.itemsize) / MEMORY, cache / CACHE, operations / rate)
