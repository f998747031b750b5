"""The kernel layout of an int4 weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tcompress import backend
from tcompress.errors import message
from tcompress.ops import int4_cuda_layout
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.int8_prepack import GROUP_PANELS, PANEL, QUAD
from tcompress.packing.int4 import pack_int4, unpack_int4

GROUP_SIZES = (32, 64, 128, 256, 512)
MAX_K = 65536
PAIR = 2 * QUAD  # k's of a pair of steps: one byte holds two k's that are four apart
PAD_K = 32
SCALE_DTYPES = (torch.float16, torch.float32)


def int4_prepack(
    weight: torch.Tensor, weight_scale: torch.Tensor, zero_point: torch.Tensor | None, k: int, group_size: int
) -> torch.Tensor:
    """Rearranges an int4 weight into the layout that the compiled kernels of its device read.

    CPU, drawn in `csrc/cpu/int4_linear.h`: weights become `[N/48][K/8][3][16][4]` bytes, scales and zero points
    `[N/48][K/g][3][16]`, zero padded, one after the other. CUDA: `int4_cuda_layout`. Derived from the storage layout
    whenever needed, and never saved.

    Args:
        weight: [N, ceil(K/2)] uint8, from `packing.pack_int4`.
        weight_scale: [N, ceil(K/g)] float16 or float32.
        zero_point: like weight_scale, uint8; None where every zero point is 8.
        k: K, which the weight's shape leaves open when it is odd.
        group_size: g: 32, 64, 128, 256, 512, or K and more for one scale a channel.

    Returns:
        One-dimensional tensor: int8 on the CPU, int32 on CUDA.

    Raises:
        TypeError: a wrong dtype. ValueError: shapes that do not fit, a group size that no kernel has.
    """
    check_weight("int4_prepack", weight, weight_scale, zero_point, k, group_size)
    return backend.call("int4_prepack", weight, weight_scale, zero_point, k, group_size)


def check_weight(
    op: str,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    k: int,
    group_size: int,
) -> None:
    """Raises unless the parts of an int4 weight fit together."""
    n = weight_scale.shape[0] if weight_scale.dim() else 0
    if weight is not None and weight.dtype != torch.uint8:
        raise TypeError(message(op, "weight", weight.dtype, "uint8", "pack it with tcompress.packing.pack_int4"))
    if weight is not None and weight.shape != (n, (k + 1) // 2):
        raise ValueError(message(op, "weight", list(weight.shape), f"[N, ceil(K/2)] = [{n}, {(k + 1) // 2}]"))
    if k > MAX_K:
        raise ValueError(message(op, "K", k, f"at most {MAX_K}", "a longer sum could leave int32"))
    if group_size not in GROUP_SIZES and group_size < max(k, 1):
        raise ValueError(message(op, "group_size", group_size, f"one of {GROUP_SIZES}, or at least K = {k}"))
    groups = -(-k // group_size)
    if weight_scale.dtype not in SCALE_DTYPES:
        raise TypeError(message(op, "weight_scale", weight_scale.dtype, "float16 or float32"))
    if weight_scale.shape != (n, groups):
        raise ValueError(message(op, "weight_scale", list(weight_scale.shape), f"[N, ceil(K/g)] = [{n}, {groups}]"))
    if zero_point is not None and zero_point.dtype != torch.uint8:
        raise TypeError(message(op, "zero_point", zero_point.dtype, "uint8"))
    if zero_point is not None and zero_point.shape != (n, groups):
        raise ValueError(message(op, "zero_point", list(zero_point.shape), f"[{n}, {groups}]"))


def _panels(x: torch.Tensor) -> torch.Tensor:
    """[N, S, B] to what lies in memory: groups of panels, in each the S's, in each its outputs."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[0] % PANEL))
    width = GROUP_PANELS * PANEL
    groups = [x[n : n + width].transpose(0, 1).reshape(-1) for n in range(0, x.shape[0], width)]
    return torch.cat(groups) if groups else x.reshape(-1)


def reference(
    weight: torch.Tensor, weight_scale: torch.Tensor, zero_point: torch.Tensor | None, k: int, group_size: int
) -> torch.Tensor:
    if weight.is_cuda:
        return int4_cuda_layout.pack(weight, weight_scale, zero_point, k, group_size)
    q = F.pad(unpack_int4(weight, k), (0, -k % PAD_K))
    pairs = q.unflatten(1, (-1, 2, QUAD))
    parts = [_panels(pairs[:, :, 0] | (pairs[:, :, 1] << 4)).view(torch.int8)]
    bits = weight_scale.contiguous().view(torch.int16 if weight_scale.dtype == torch.float16 else torch.int32)
    parts.append(_panels(bits[..., None]).view(torch.int8))
    if zero_point is not None:
        parts.append(_panels(zero_point[..., None]).view(torch.int8))
    return torch.cat(parts)


def kernel_bytes(n: int, k: int, group_size: int, scale_bytes: int, has_zero_points: bool) -> int:
    """Bytes of the kernel layout of the CPU."""
    groups = -(-k // group_size)
    return (n + -n % PANEL) * ((k + -k % PAD_K) // 2 + groups * (scale_bytes + has_zero_points))


def check_kernel_weight(
    op: str, kernel_weight: torch.Tensor, n: int, k: int, group_size: int, scale_bytes: int, has_zero_points: bool
) -> None:
    """Raises unless `kernel_weight` is what `int4_prepack` gives for a weight of these sizes, on whichever device."""
    if kernel_weight.dtype not in (torch.int8, int4_cuda_layout.DTYPE):
        raise TypeError(message(op, "kernel_weight", kernel_weight.dtype, "int8, or int32 for the CUDA kernels"))
    size = kernel_bytes(n, k, group_size, scale_bytes, has_zero_points)
    if kernel_weight.dtype == int4_cuda_layout.DTYPE:
        size = int4_cuda_layout.kernel_words(n, k, group_size)
    if min(n, k) < 0 or kernel_weight.shape != (size,):
        raise ValueError(message(op, "kernel_weight", list(kernel_weight.shape), f"[{size}] for N={n}, K={k}"))


def why_not_the_cpu_layout(kernel_weight: torch.Tensor | None) -> str | None:
    """Why the CPU kernels cannot read it, or None."""
    if kernel_weight is not None and kernel_weight.dtype != torch.int8:
        return "the weight is in the layout of the CUDA kernels: module.to('cpu') derives that of the CPU"
    return None


def fake(
    weight: torch.Tensor, weight_scale: torch.Tensor, zero_point: torch.Tensor | None, k: int, group_size: int
) -> torch.Tensor:
    if weight.is_cuda:
        words = int4_cuda_layout.kernel_words(weight.shape[0], k, group_size)
        return weight.new_empty(words, dtype=int4_cuda_layout.DTYPE)
    size = kernel_bytes(weight.shape[0], k, group_size, weight_scale.element_size(), zero_point is not None)
    return weight.new_empty(size, dtype=torch.int8)


def flops(weight: torch.Tensor, *args: object) -> int:
    return 0


def nbytes(weight: torch.Tensor, weight_scale: torch.Tensor, zero_point: torch.Tensor | None, *args: object) -> int:
    return 2 * (weight.nbytes + weight_scale.nbytes + (0 if zero_point is None else zero_point.nbytes))


define(
    Op(
        name="int4_prepack",
        schema="(Tensor weight, Tensor weight_scale, Tensor? zero_point, int k, int group_size) -> Tensor",
        reference=reference,
        fake=fake,
        tolerance=0.0,
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("int4_prepack", "cpu", unsupported=cpu_unsupported)

__all__ = ["int4_prepack", "pack_int4"]
