"""Solutions of layers as named tensors, to be kept in a file and read back bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tcompress.layer_job import Solution
from tcompress.packing import PackedWeight

_PARTS = ("weight", "mask", "bias", "outliers")
_PACKED = ("qdata", "scale", "zero_point")


def to_tensors(solutions: Mapping[str, Solution]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors "<layer>/<part>", and by layer what else a packed weight is described by.

    A weight that its integers give again is left out.
    """
    tensors: dict[str, torch.Tensor] = {}
    described: dict[str, Any] = {}
    for name, found in solutions.items():
        whole = found.packed is not None and found.outliers is None
        parts = {part: getattr(found, part) for part in _PARTS if not (whole and part == "weight")}
        described[name] = None
        if found.packed is not None:
            parts |= {part: getattr(found.packed, part) for part in _PACKED}
            described[name] = [list(found.packed.shape), found.packed.layout, found.packed.group_size]
        tensors |= {f"{name}/{part}": tensor for part, tensor in parts.items() if tensor is not None}
    return tensors, described


def from_tensors(
    tensors: Mapping[str, torch.Tensor], described: Mapping[str, Any], device: Mapping[str, torch.device]
) -> dict[str, Solution]:
    """What `to_tensors` was given, with the weights, each on its layer's device."""
    found: dict[str, Solution] = {}
    for name, description in described.items():
        parts = {
            part: tensor.to(device[name])
            for part in (*_PARTS, *_PACKED)
            if (tensor := tensors.get(f"{name}/{part}")) is not None
        }
        packed = None
        if description is not None:
            shape, layout, group_size = description
            zero_point = parts.get("zero_point")
            packed = PackedWeight(parts["qdata"], parts["scale"], tuple(shape), layout, zero_point, group_size)
        weight = parts.get("weight")
        if weight is None:
            assert packed is not None
            weight = packed.dequantize()
        found[name] = Solution(weight, parts.get("mask"), packed, parts.get("bias"), parts.get("outliers"))
    return found
