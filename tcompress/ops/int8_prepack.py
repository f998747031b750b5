"""The kernel layout of an int8 weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tcompress import backend
from tcompress.errors import message
from tcompress.ops._registry import Op, cpu_unsupported, define

PANEL = 16  # outputs in a panel
QUAD = 4  # k's that one 32-bit lane multiplies


def int8_prepack(weight: torch.Tensor) -> torch.Tensor:
    """Rearranges an int8 weight into the layout that the CPU kernels read, drawn in `csrc/cpu/int8_linear.h`.

    `[N, K]` becomes `[N/16][K/4][16][4]` int8, zero padded, followed by the sum over K of each of the padded N rows as
    int32. It is derived from the storage layout whenever needed, and never saved.

    Args:
        weight: [N, K] int8.

    Returns:
        One-dimensional int8 tensor of `ceil16(N) * (ceil4(K) + 4)` bytes.

    Raises:
        TypeError: not int8. ValueError: not two-dimensional.
    """
    if weight.dtype != torch.int8:
        raise TypeError(message("int8_prepack", "weight", weight.dtype, "int8"))
    if weight.dim() != 2:
        raise ValueError(message("int8_prepack", "weight", f"{weight.dim()} dimensions", "[N, K]"))
    return backend.call("int8_prepack", weight)


def reference(weight: torch.Tensor) -> torch.Tensor:
    n, k = weight.shape
    padded = F.pad(weight, (0, -k % QUAD, 0, -n % PANEL))
    n_padded, k_padded = padded.shape
    panels = padded.view(n_padded // PANEL, PANEL, k_padded // QUAD, QUAD).transpose(1, 2)
    column_sum = padded.sum(1, dtype=torch.int32)
    return torch.cat([panels.reshape(-1), column_sum.view(torch.int8)])


def fake(weight: torch.Tensor) -> torch.Tensor:
    n, k = weight.shape
    n_padded, k_padded = n + -n % PANEL, k + -k % QUAD
    return weight.new_empty(n_padded * (k_padded + 4))


def flops(weight: torch.Tensor) -> int:
    return weight.numel()


def nbytes(weight: torch.Tensor) -> int:
    return 2 * weight.numel() + 4 * weight.shape[0]


define(
    Op(
        name="int8_prepack",
        schema="(Tensor weight) -> Tensor",
        reference=reference,
        fake=fake,
        tolerance=0.0,
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("int8_prepack", "cpu", unsupported=cpu_unsupported)
