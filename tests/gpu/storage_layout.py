"""Samples of the ops as GPU kernels take them: weights that are given in the layout of the CPU kernels alone, brought
back to the storage layout."""

from __future__ import annotations

from typing import Any

from tcompress.ops._registry import OPS


def in_storage_layout(op: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `op` with every weight of the linear layers in the storage layout, and no kernel layout."""
    given = list(arguments)
    k = given[0].shape[-1] if op.startswith("int") else 0
    if op == "int8_multi_linear":
        unpack = OPS["int8_unpack"].reference
        parts = zip(given[1], given[2], given[4], strict=True)
        given[1] = [unpack(kernel, s.shape[0], k) if w is None else w for w, s, kernel in parts]
        given[4] = [None] * len(given[1])
    elif op.startswith("int8_linear"):
        at = 3 if op == "int8_linear_quantized" else 1
        if given[at] is None:
            given[at] = OPS["int8_unpack"].reference(given[at + 3], given[at + 1].shape[0], k)
        given[at + 3] = None
    elif op == "int4_linear":
        given[1:4] = _int4(*given[1:4], given[5], k, given[6])
        given[5] = None
    elif op == "int4_multi_linear":
        parts = zip(given[1], given[2], given[3], given[5], strict=True)
        weights = [_int4(*part, k, given[6]) for part in parts]
        given[1:4] = [list(of_all) for of_all in zip(*weights, strict=True)]
        given[5] = [None] * len(weights)
    return tuple(given)


def _int4(weight: Any, scale: Any, zero_point: Any, kernel_weight: Any, k: int, group_size: int) -> list[Any]:
    if weight is not None:
        return [weight, scale, zero_point]
    has_zero_points = zero_point is not None
    sizes = (scale.shape[0], k, group_size, scale.dtype, has_zero_points)
    weight, scale, zeros = OPS["int4_unpack"].reference(kernel_weight, *sizes)
    return [weight, scale, zeros if has_zero_points else None]
