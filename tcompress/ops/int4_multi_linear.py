"""Several int4 linear layers over one input, which is quantized once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tcompress import backend
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.int4_linear import check
from tcompress.ops.int4_linear import nbytes as nbytes_of_one
from tcompress.ops.int4_linear import reference as one
from tcompress.ops.int4_prepack import why_not_the_cpu_layout
from tcompress.ops.int8_multi_linear import Maybe, check_lists


def int4_multi_linear(
    x: torch.Tensor,
    weights: Sequence[Maybe],
    weight_scales: Sequence[torch.Tensor],
    zero_points: Sequence[Maybe],
    biases: Sequence[Maybe],
    kernel_weights: Sequence[Maybe],
    group_size: int = 128,
    act_bits: int | None = 8,
    act_symmetric: bool = True,
    activation: str = "none",
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """`int4_linear` with each weight, in one call: q, k and v of an attention, or a gated feed-forward layer.

    ::

        y_i = activation(x W_iᵀ + b_i)
        gated:  y = activation(x W_0ᵀ + b_0) · (x W_1ᵀ + b_1)       the first factor rounded to the type of the result

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        weights, weight_scales, biases, kernel_weights: for each layer, as in `int4_linear`.
        zero_points: for each layer; of all of them or of none.
        group_size, act_bits, act_symmetric, activation: as in `int4_linear`.
        gated: two weights of one shape, and one result.
        out_dtype: type of the results, by default that of `x`.

    Returns:
        A list of [..., N_i]; of one tensor where gated.

    Raises:
        TypeError, ValueError: as `int4_linear`; lists of different lengths; gated without exactly two like weights.
    """
    op = "int4_multi_linear"
    lists = {"weights": weights, "zero_points": zero_points, "biases": biases, "kernel_weights": kernel_weights}
    check_lists(op, gated, weight_scales, **lists)
    if len({z is None for z in zero_points}) > 1:
        raise ValueError(f"{op}: zero_points: got some, expected all or none")
    for parts in zip(weights, weight_scales, zero_points, biases, kernel_weights, strict=True):
        check(op, x, *parts, group_size, act_bits, act_symmetric, activation, out_dtype)
    results = backend.call(
        op,
        x,
        list(weights),
        list(weight_scales),
        list(zero_points),
        list(biases),
        list(kernel_weights),
        group_size,
        act_bits,
        act_symmetric,
        activation,
        gated,
        out_dtype,
    )
    return list(results)


def reference(
    x: torch.Tensor,
    weights: Sequence[Maybe],
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
    dtype = out_dtype or x.dtype

    def part(i: int, activation: str, dtype: torch.dtype) -> torch.Tensor:
        weight = (weights[i], weight_scales[i], zero_points[i], biases[i], kernel_weights[i])
        return one(x, *weight, group_size, act_bits, act_symmetric, activation, dtype)

    if gated:
        return [(part(0, activation, dtype).float() * part(1, "none", torch.float32)).to(dtype)]
    return [part(i, activation, dtype) for i in range(len(weights))]


def fake(
    x: torch.Tensor,
    weights: Sequence[Maybe],
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
    scales = weight_scales[:1] if gated else weight_scales
    return [x.new_empty((*x.shape[:-1], s.shape[0]), dtype=out_dtype or x.dtype) for s in scales]


def flops(x: torch.Tensor, weights: Sequence[Maybe], weight_scales: Sequence[torch.Tensor], *args: object) -> int:
    return 2 * x.numel() * sum(s.shape[0] for s in weight_scales)


def nbytes(
    x: torch.Tensor,
    weights: Sequence[Maybe],
    weight_scales: Sequence[torch.Tensor],
    zero_points: Sequence[Maybe],
    *args: object,
) -> int:
    read_x = x.numel() * x.element_size()
    parts = zip(weights, weight_scales, zero_points, strict=True)
    return read_x + sum(nbytes_of_one(x, w, s, z) - read_x for w, s, z in parts)


define(
    Op(
        name="int4_multi_linear",
        schema=(
            "(Tensor x, Tensor?[] weights, Tensor[] weight_scales, Tensor?[] zero_points, Tensor?[] biases,"
            " Tensor?[] kernel_weights, int group_size, int? act_bits, bool act_symmetric, str activation, bool gated,"
            " ScalarType? out_dtype) -> Tensor[]"
        ),
        reference=reference,
        fake=fake,
        tolerance=4.0,  # as int4_linear
        flops=flops,
        nbytes=nbytes,
    )
)


def _cpu_unsupported(
    x: torch.Tensor,
    weights: Sequence[Maybe] = (),
    weight_scales: Sequence[torch.Tensor] = (),
    zero_points: Sequence[Maybe] = (),
    biases: Sequence[Maybe] = (),
    kernel_weights: Sequence[Maybe] = (),
    *options: object,
    **more: object,
) -> str | None:
    reasons = [cpu_unsupported(x), *map(why_not_the_cpu_layout, kernel_weights)]
    return next((reason for reason in reasons if reason), None)


backend.register_kernel("int4_multi_linear", "cpu", unsupported=_cpu_unsupported)
