"""An int8 weight out of its kernel layout."""

from __future__ import annotations

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.int8_prepack import GROUP_PANELS, PANEL, QUAD, kernel_bytes


def int8_unpack(kernel_weight: torch.Tensor, n: int, k: int, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The inverse of `int8_prepack`: the weight [N, K], or some of its rows.

    With it a module keeps one copy of its weight, in the layout that its kernel reads.

    Args:
        kernel_weight: the result of `int8_prepack` of a weight [N, K].
        n, k: the shape of the weight.
        rows: [R] int64, each from 0 to N - 1; or None for all.

    Returns:
        [N, K] or [R, K] int8.

    Raises:
        TypeError: a wrong dtype. ValueError: a size that no [N, K] gives, or rows that are not one-dimensional.
        RuntimeError or IndexError: a row that is not there.
    """
    if kernel_weight.dtype != torch.int8:
        raise TypeError(message("int8_unpack", "kernel_weight", kernel_weight.dtype, "int8"))
    if n < 0 or k < 0 or kernel_weight.shape != (kernel_bytes(n, k),):
        expected = f"[{kernel_bytes(n, k)}] for N={n}, K={k}" if min(n, k) >= 0 else "sizes of at least 0"
        raise ValueError(message("int8_unpack", "kernel_weight", list(kernel_weight.shape), expected))
    if rows is not None and rows.dtype != torch.int64:
        raise TypeError(message("int8_unpack", "rows", rows.dtype, "int64"))
    if rows is not None and rows.dim() != 1:
        raise ValueError(message("int8_unpack", "rows", list(rows.shape), "[R]"))
    return backend.call("int8_unpack", kernel_weight, n, k, rows)


def reference(kernel_weight: torch.Tensor, n: int, k: int, rows: torch.Tensor | None = None) -> torch.Tensor:
    n_panels, steps = -(-n // PANEL), -(-k // QUAD)
    whole = n_panels // GROUP_PANELS
    count = whole * GROUP_PANELS * PANEL * steps * QUAD
    groups = kernel_weight[:count].view(whole, steps, GROUP_PANELS, PANEL, QUAD).permute(0, 2, 3, 1, 4)
    left = n_panels - whole * GROUP_PANELS
    last = kernel_weight[count : count + left * PANEL * steps * QUAD].view(steps, left, PANEL, QUAD).permute(1, 2, 0, 3)
    padded = [part.reshape(-1, steps * QUAD) for part in (groups, last)] if steps else [kernel_weight.new_zeros(n, 0)]
    weight = torch.cat(padded)[:n, :k]
    # Not weight[rows], which takes negative ones too.
    return weight.clone(memory_format=torch.contiguous_format) if rows is None else weight.index_select(0, rows)


def fake(kernel_weight: torch.Tensor, n: int, k: int, rows: torch.Tensor | None = None) -> torch.Tensor:
    return kernel_weight.new_empty((n if rows is None else rows.shape[0], k))


def flops(kernel_weight: torch.Tensor, *args: object) -> int:
    return 0


def nbytes(kernel_weight: torch.Tensor, n: int, k: int, rows: torch.Tensor | None = None) -> int:
    return 2 * k * (n if rows is None else rows.shape[0])


define(
    Op(
        name="int8_unpack",
        schema="(Tensor kernel_weight, int n, int k, Tensor? rows) -> Tensor",
        reference=reference,
        fake=fake,
        tolerance=0.0,
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("int8_unpack", "cpu", unsupported=cpu_unsupported)
