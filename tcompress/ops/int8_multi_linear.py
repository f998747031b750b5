"""Several int8 linear layers over one input, which is quantized once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.int8_linear import check
from tcompress.ops.int8_linear import nbytes as nbytes_of_one
from tcompress.ops.int8_linear import reference as one

Maybe = torch.Tensor | None


def int8_multi_linear(
    x: torch.Tensor,
    weights: Sequence[Maybe],
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[Maybe],
    kernel_weights: Sequence[Maybe],
    act_bits: int = 8,
    act_symmetric: bool = True,
    activation: str = "none",
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """`int8_linear` with each weight, in one call: q, k and v of an attention, or a gated feed-forward layer.

    ::

        y_i = activation(x W_iᵀ + b_i)
        gated:  y = activation(x W_0ᵀ + b_0) · (x W_1ᵀ + b_1)       the first factor rounded to the type of the result

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        weights: each [N_i, K] int8, or None where its kernel_weight is given.
        weight_scales: each [N_i] float32.
        biases: each [N_i], any float type, or None.
        kernel_weights: each the result of `int8_prepack`, or None.
        act_bits, act_symmetric, activation: as in `int8_linear`.
        gated: two weights of one shape, and one result.
        out_dtype: type of the results, by default that of `x`.

    Returns:
        A list of [..., N_i]; of one tensor where gated.

    Raises:
        TypeError, ValueError: as `int8_linear`; lists of different lengths; gated without exactly two like weights.
    """
    op = "int8_multi_linear"
    check_lists(op, gated, weight_scales, weights=weights, biases=biases, kernel_weights=kernel_weights)
    if out_dtype == torch.int32:
        raise TypeError(message(op, "out_dtype", out_dtype, "float32, bfloat16 or float16"))
    for w, s, b, kw in zip(weights, weight_scales, biases, kernel_weights, strict=True):
        check(op, x, w, s, b, kw, act_bits, act_symmetric, activation, out_dtype)
    results = backend.call(
        op,
        x,
        list(weights),
        list(weight_scales),
        list(biases),
        list(kernel_weights),
        act_bits,
        act_symmetric,
        activation,
        gated,
        out_dtype,
    )
    return list(results)


def check_lists(op: str, gated: bool, weight_scales: Sequence[torch.Tensor], **lists: Sequence[Maybe]) -> None:
    """Raises unless the lists have one length, at least 1, and where gated two parts with as many outputs."""
    count = len(weight_scales)
    for name, values in lists.items():
        if len(values) != count or not count:
            raise ValueError(message(op, name, f"{len(values)} for {count} scales", "as many, and at least 1"))
    if gated and (count != 2 or weight_scales[0].shape[:1] != weight_scales[1].shape[:1]):
        got = [list(s.shape) for s in weight_scales]
        raise ValueError(message(op, "gated", f"weight_scales {got}", "two of one shape"))


def reference(
    x: torch.Tensor,
    weights: Sequence[Maybe],
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[Maybe],
    kernel_weights: Sequence[Maybe],
    act_bits: int,
    act_symmetric: bool,
    activation: str,
    gated: bool,
    out_dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    dtype = out_dtype or x.dtype

    def part(i: int, activation: str, dtype: torch.dtype) -> torch.Tensor:
        weight = (weights[i], weight_scales[i], biases[i], kernel_weights[i])
        return one(x, *weight, act_bits, act_symmetric, activation, dtype)

    if gated:
        return [(part(0, activation, dtype).float() * part(1, "none", torch.float32)).to(dtype)]
    return [part(i, activation, dtype) for i in range(len(weights))]


def fake(
    x: torch.Tensor,
    weights: Sequence[Maybe],
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[Maybe],
    kernel_weights: Sequence[Maybe],
    act_bits: int,
    act_symmetric: bool,
    activation: str,
    gated: bool,
    out_dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    scales = weight_scales[:1] if gated else weight_scales
    return [x.new_empty((*x.shape[:-1], s.shape[0]), dtype=out_dtype or x.dtype) for s in scales]


def flops(x: torch.Tensor, weights: Sequence[Maybe], weight_scales: Sequence[torch.Tensor], *args: object) -> int:
    return 2 * x.numel() * sum(s.numel() for s in weight_scales)


def nbytes(x: torch.Tensor, weights: Sequence[Maybe], weight_scales: Sequence[torch.Tensor], *args: object) -> int:
    read_x = x.numel() * x.element_size()
    parts = zip(weights, weight_scales, strict=True)
    return read_x + sum(nbytes_of_one(x, w, s) - read_x for w, s in parts)


define(
    Op(
        name="int8_multi_linear",
        schema=(
            "(Tensor x, Tensor?[] weights, Tensor[] weight_scales, Tensor?[] biases, Tensor?[] kernel_weights,"
            " int act_bits, bool act_symmetric, str activation, bool gated, ScalarType? out_dtype) -> Tensor[]"
        ),
        reference=reference,
        fake=fake,
        tolerance=4.0,  # as int8_linear
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("int8_multi_linear", "cpu", unsupported=cpu_unsupported)
