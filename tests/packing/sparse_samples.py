"""Sparse weights for tests."""

import torch

from tcompress.packing import Pattern

PATTERNS = ["unstructured", "2:4", "1:3", "5:8", "1:64", "1x1", "1x4", "8x4", "16x16", "32x32", "3x5", "64x1"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def sparse(n, k, pattern, kept, dtype=torch.float32, seed=0, bits=8):
    """A random weight with the pattern, about `kept` of it not zero, or of N:M up to N a group."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        dense = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k), dtype=dtype, generator=generator)
    else:
        dense = torch.randn(n, k, generator=generator).to(dtype)
    first, second = (1, 1) if pattern == "unstructured" else Pattern.parse(pattern).size
    if ":" in pattern:
        order = torch.rand(n, -(-k // second), second, generator=generator).argsort(2)
        return dense * (order < first).flatten(1)[:, :k]
    grid = torch.rand(-(-n // first), -(-k // second), generator=generator) < kept
    return dense * grid.repeat_interleave(first, 0)[:n].repeat_interleave(second, 1)[:, :k]


def scales(n, k, bits, group_size=0, dtype=torch.float32):
    shape = (n,) if bits == 8 else (n, -(-k // group_size))
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.01).to(dtype)
