"""The kernel layout of an int8 weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tcompress import backend
from tcompress.errors import message
from tcompress.ops._registry import Op, cpu_unsupported, define

PANEL = 16  # outputs in a panel
GROUP_PANELS = 3  # panels in a group
QUAD = 4  # k's that one 32-bit lane multiplies: a step
MAX_LANE_SUM = 32767 // 127  # of the positive or the negative weights that a 16-bit lane meets in a run
MAX_RUN = 255
MIN_MEAN_RUN = 3


def int8_prepack(weight: torch.Tensor) -> torch.Tensor:
    """Rearranges an int8 weight into the layout that the CPU kernels read, drawn in `csrc/cpu/int8_linear.h`.

    `[N, K]` becomes `[N/48][K/4][3][16][4]` int8, zero padded; the sum over K of each of the padded N rows as int32;
    and for each group of 48 rows its flush schedule, `[N/48][K/4]` bytes: the lengths of the runs of steps whose
    products with activations in 0 … 127 can be summed in 16 bits whatever the activations are
    (`csrc/cpu/flush_schedule.h`). It is derived from the storage layout whenever needed, and never saved.

    Args:
        weight: [N, K] int8.

    Returns:
        One-dimensional int8 tensor.

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
    n_panels, steps = padded.shape[0] // PANEL, padded.shape[1] // QUAD
    panels = padded.view(n_panels, PANEL, steps, QUAD)
    whole = n_panels // GROUP_PANELS
    groups = panels[: whole * GROUP_PANELS].view(whole, GROUP_PANELS, PANEL, steps, QUAD).permute(0, 3, 1, 2, 4)
    last = panels[whole * GROUP_PANELS :].permute(2, 0, 1, 3)
    column_sum = padded.sum(1, dtype=torch.int32)
    schedule = weight.new_zeros((-(-n_panels // GROUP_PANELS), steps), dtype=torch.uint8)
    schedule[:whole] = flush_schedule(groups.reshape(whole, steps, GROUP_PANELS * PANEL * QUAD))
    parts = [groups.reshape(-1), last.reshape(-1), column_sum.view(torch.int8), schedule.view(torch.int8).view(-1)]
    packed = torch.cat(parts)
    return F.pad(packed, (0, -packed.numel() % QUAD))


def flush_schedule(groups: torch.Tensor) -> torch.Tensor:
    """Greedy run lengths for groups [G, steps, 192] of weights; rows of zeros where runs are too short to pay."""
    n_groups, steps, width = groups.shape
    pairs = groups.view(n_groups, steps, width // 2, 2).int()  # a 16-bit lane sums two neighbours
    positive, negative = pairs.clamp_min(0).sum(-1), (-pairs).clamp_min(0).sum(-1)
    runs = groups.new_zeros((n_groups, steps + 1), dtype=torch.int32)
    count = groups.new_zeros(n_groups, dtype=torch.int64)
    length = torch.zeros_like(count, dtype=torch.int32)
    p_sum = n_sum = groups.new_zeros((n_groups, width // 2), dtype=torch.int32)
    for step in range(steps):
        p_next, n_next = p_sum + positive[:, step], n_sum + negative[:, step]
        full = (torch.maximum(p_next, n_next).amax(1) > MAX_LANE_SUM) | (length == MAX_RUN)
        runs.scatter_(1, count[:, None], length[:, None])  # a later step overwrites it unless the run ends here
        count += full
        length = torch.where(full, 1, length + 1)
        p_sum = torch.where(full[:, None], positive[:, step], p_next)
        n_sum = torch.where(full[:, None], negative[:, step], n_next)
    if steps:
        runs.scatter_(1, count[:, None], length[:, None])
        count += 1
    runs[count * MIN_MEAN_RUN > steps] = 0
    return runs[:, :steps].to(torch.uint8)


def kernel_bytes(n: int, k: int) -> int:
    """Bytes of the kernel layout of a weight [N, K]."""
    n_padded, k_padded = n + -n % PANEL, k + -k % QUAD
    n_groups = (n_padded // PANEL + GROUP_PANELS - 1) // GROUP_PANELS
    size = n_padded * (k_padded + 4) + n_groups * (k_padded // QUAD)
    return size + -size % QUAD


def fake(weight: torch.Tensor) -> torch.Tensor:
    return weight.new_empty(kernel_bytes(*weight.shape))


def flops(weight: torch.Tensor) -> int:
    return 4 * weight.numel()  # one sum over K, and positive, negative and largest sums of the schedule


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
