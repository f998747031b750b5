"""The ops with a 4-bit weight in Triton; see `bindings`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .reasons import DEQUANTIZED, IN_CPU_LAYOUT, IN_CUDA_LAYOUT, LEAST_GROUP, multiplies_dequantized

Maybe = torch.Tensor | None


def int4_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    zero_point: Maybe,
    bias: Maybe,
    kernel_weight: Maybe,
    group_size: int,
    act_bits: int | None,
    act_symmetric: bool,
    activation: str,
    out_dtype: torch.dtype | None,
    residual: Maybe = None,
) -> torch.Tensor:
    from .int4_linear import int4_linear

    operands = (x, weight, weight_scale, zero_point, bias)
    return int4_linear(*operands, group_size, act_bits, act_symmetric, activation, out_dtype, residual)


def int4_linear_unsupported(
    x: torch.Tensor,
    weight: Maybe,
    weight_scale: torch.Tensor | None = None,
    zero_point: Maybe = None,
    bias: Maybe = None,
    kernel_weight: Maybe = None,
    group_size: int = LEAST_GROUP,
    *options: object,
    **more: object,
) -> str | None:
    if weight is None:
        return _held_otherwise(kernel_weight)
    if group_size < x.shape[-1] and (group_size < LEAST_GROUP or group_size & (group_size - 1)):
        return f"group_size={group_size}: the Triton kernels have powers of two from {LEAST_GROUP} on"
    return None


def int4_linear_path(
    x: torch.Tensor,
    weight: Maybe,
    weight_scale: torch.Tensor | None = None,
    zero_point: Maybe = None,
    bias: Maybe = None,
    kernel_weight: Maybe = None,
    group_size: int = LEAST_GROUP,
    act_bits: int | None = 8,
    act_symmetric: bool = True,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    residual: Maybe = None,
) -> str | None:
    """What `explain` adds where the product is torch's."""
    return DEQUANTIZED if multiplies_dequantized(x.shape[:-1].numel(), act_bits, x.dtype, out_dtype) else None


def int4_multi_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    zero_points: Sequence[Maybe],
    biases: Sequence[Maybe],
    kernel_weights: Sequence[Maybe],
    group_size: int,
    act_bits: int | None,
    act_symmetric: bool,
    activation: str,
    gated: bool,
    out_dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    from .int4_linear import int4_linear

    dtype = out_dtype or x.dtype

    def part(i: int, activation: str, dtype: torch.dtype) -> torch.Tensor:
        operands = (x, weights[i], weight_scales[i], zero_points[i], biases[i])
        return int4_linear(*operands, group_size, act_bits, act_symmetric, activation, dtype)

    if gated:
        return [(part(0, activation, dtype).float() * part(1, "none", torch.float32)).to(dtype)]
    return [part(i, activation, dtype) for i in range(len(weights))]


def int4_multi_linear_unsupported(
    x: torch.Tensor,
    weights: Sequence[Maybe],
    weight_scales: Sequence[torch.Tensor] = (),
    zero_points: Sequence[Maybe] = (),
    biases: Sequence[Maybe] = (),
    kernel_weights: Sequence[Maybe] = (),
    group_size: int = LEAST_GROUP,
    *options: object,
    **more: object,
) -> str | None:
    for weight, kernel_weight in zip(weights, kernel_weights, strict=True):
        if weight is None:
            return _held_otherwise(kernel_weight)
    return int4_linear_unsupported(x, weights[0], group_size=group_size)


def _held_otherwise(kernel_weight: Maybe) -> str:
    """In which layout an int4 weight is that is not in the storage layout."""
    in_cpu_layout = kernel_weight is None or kernel_weight.dtype == torch.int8
    return IN_CPU_LAYOUT if in_cpu_layout else IN_CUDA_LAYOUT
