"""Moves scales from a source's output into the weights of its readers."""

from __future__ import annotations

import torch

from tcompress.pairs.find import Consumer, Pair
from tcompress.weights import is_conv1d


def reader_scales(scales: torch.Tensor, consumer: Consumer) -> torch.Tensor:
    """Of the source's scales [N], those of a reader's inputs [K]; 1 where the channel is not known."""
    channels = consumer.channels.to(scales.device)
    return scales[channels.clamp_min(0)].masked_fill(channels < 0, 1)


def source_values(values: torch.Tensor, consumer: Consumer, size: int) -> torch.Tensor:
    """The largest of a reader's values per input [K] >= 0 for each of the source's channels [size]; 0 for none."""
    channels = consumer.channels.to(values.device)
    known = channels >= 0
    return values.new_zeros(size).scatter_reduce(0, channels[known], values[known], "amax")


@torch.no_grad()
def fold(pair: Pair, scales: torch.Tensor) -> None:
    """Divides a source's output channels by `scales` [N] > 0 and multiplies the readers' columns by them, in place.

    ::

        norm       w /= s (1 + w' = (1 + w) / s for Gemma's),  b /= s
        linear     W /= s[:, None],                            b /= s
        readers    W *= s[channels]

    Computed in float32 at least and rounded to the weights' type. A channel without a known reader keeps its scale.
    """
    scales = scales.masked_fill(~pair.used.to(scales.device), 1)
    for name, parameter in pair.source._parameters.items():
        if parameter is None:
            continue
        s = scales.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
        if pair.kind == "one_plus" and name == "weight":
            parameter.copy_((1 + parameter.to(s.dtype)) / s - 1)
        elif parameter.dim() == 2 and not is_conv1d(pair.source):
            parameter.copy_(parameter / s[:, None])
        else:  # a vector, or Conv1D's weight, stored as [K, N]
            parameter.copy_(parameter / s)
    for consumer in pair.consumers:
        weight = consumer.module._parameters["weight"]
        assert weight is not None
        s = reader_scales(scales, consumer).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        weight.copy_(weight * s[:, None] if is_conv1d(consumer.module) else weight * s)
