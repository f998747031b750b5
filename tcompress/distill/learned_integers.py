"""Integers and scales that are trained, from wherever they were found."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from tcompress.distill.constraint import Constraint
from tcompress.distill.effective import TensorMap, straight_through
from tcompress.packing import PackedWeight
from tcompress.packing.int4 import pack_int4, unpack_int4
from tcompress.quantize import QuantArgs


class LearnedIntegers(Constraint):
    """Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", arXiv 2407.11062,
    section 3.3, trains the scales of a quantized model end to end; here its integers move too, by the straight-through
    estimator of Bengio et al., arXiv 1308.3432.

    ::

        Ŵ = s · (q - z),   s = s₀ · (1 + r)                   rounded to the type in which scales are stored
                           q = clamp(round(q₀ + c · d))       c: `integer_rate`
        ∂L/∂r = Σ over a group of  ∂L/∂Ŵ · (q - z) · s₀
        ∂L/∂d = ∂L/∂Ŵ · s · c                                 straight-through; zero where q₀ + c·d is off the grid

    r and d begin at zero, so that Ŵ begins at exactly what was found. AdamW moves each by about `lr` a step, whatever
    the size of a weight. An integer leaves its place only after gradients have agreed for some 0.5 / (c · lr) steps:
    what was found stays where the data say nothing. Zero points stay. Weights that pruning took stay zero.

    Args:
        layers: linear layers by name.
        packed: what was found for each, by the same names.
        args: how each weight is quantized.
        masks: bool [N, K], what pruning kept, of those that were pruned.
        integer_rate: c; with 0 there is no d.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        packed: Mapping[str, PackedWeight],
        args: Mapping[str, QuantArgs],
        masks: Mapping[str, torch.Tensor],
        integer_rate: float,
    ) -> None:
        super().__init__(layers)
        self._args, self._packed_form, self.integer_rate = dict(args), {}, integer_rate
        self._index = {name: i for i, name in enumerate(layers)}
        for name, i in self._index.items():
            found = packed[name]
            # Of what was found only the form is read later; tensors are in the buffers, which go into checkpoints.
            self._packed_form[name] = (found.shape, found.layout, found.group_size)
            q = unpack_int4(found.qdata, found.shape[1]) if found.layout == "int4" else found.qdata
            self.register_buffer(f"integers_{i}", q.clone())
            self.register_buffer(f"scale_{i}", found.scale.clone())
            self.register_buffer(f"zero_point_{i}", found.zero_point)
            self.register_buffer(f"mask_{i}", masks.get(name))
            self.register_parameter(f"ratio_{i}", nn.Parameter(torch.zeros_like(found.scale, dtype=torch.float32)))
            if integer_rate:
                self.register_parameter(f"moved_{i}", nn.Parameter(torch.zeros(found.shape, device=q.device)))

    def maps(self) -> dict[nn.Module, TensorMap]:
        return {module: partial(self._weight, name) for name, module in self._layers.items()}

    def _weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What a layer multiplies by, [N, K], in the weight's type; of that nothing else is used."""
        scale = self._along_k(name, self.scale(name))
        return ((self.integers(name) - self._zero(name)) * scale).to(weight.dtype)

    def _part(self, kind: str, name: str) -> Any:
        return getattr(self, f"{kind}_{self._index[name]}", None)

    def scale(self, name: str) -> torch.Tensor:
        """s, float32 [N] or [N, ceil(K/g)], with values of the stored type."""
        start: torch.Tensor = self._part("scale", name)
        exact = start.float() * (1 + self._part("ratio", name))
        return straight_through(exact, exact.detach().to(start.dtype).float())

    def integers(self, name: str) -> torch.Tensor:
        """q as stored (`PackedWeight`), float32 [N, K]."""
        start: torch.Tensor = self._part("integers", name)
        if not self.integer_rate:
            return start.float()
        low, high = self._limits(name)
        # What was found may lie off the limits of a scheme without a searched range; it stays where it was then.
        exact = (start.float() + self.integer_rate * self._part("moved", name)).clamp(low, high)
        q = straight_through(exact, exact.detach().round())
        mask = self._part("mask", name)
        return q if mask is None else torch.where(mask, q, self._zero(name))

    def _limits(self, name: str) -> tuple[int, int]:
        args, (_, layout, _) = self._args[name], self._packed_form[name]
        if not args.symmetric:
            return 0, 2**args.bits - 1
        half = 2 ** (args.bits - 1)
        return (8 - half, 8 + half - 1) if layout == "int4" else (1 - half, half - 1)

    def _zero(self, name: str) -> torch.Tensor:
        zero: torch.Tensor | None = self._part("zero_point", name)
        _, layout, _ = self._packed_form[name]
        start: torch.Tensor = self._part("integers", name)
        if zero is None:
            return torch.tensor(8.0 if layout == "int4" else 0.0, device=start.device)
        return self._along_k(name, zero.float())

    def _along_k(self, name: str, per_group: torch.Tensor) -> torch.Tensor:
        """[N] or [N, groups] as it goes with a weight [N, K]."""
        (_, k), layout, group_size = self._packed_form[name]
        if layout == "dense":
            return per_group[:, None]
        return per_group.repeat_interleave(min(group_size, max(k, 1)), 1)[:, :k]

    @torch.no_grad()
    def packed(self, name: str) -> PackedWeight:
        """What the training ended with; it dequantizes to the weight of the last step's end, bit for bit."""
        shape, layout, group_size = self._packed_form[name]
        start: torch.Tensor = self._part("integers", name)
        q = self.integers(name).to(start.dtype)
        scale = self.scale(name).to(self._part("scale", name).dtype)
        qdata = pack_int4(q) if layout == "int4" else q
        return PackedWeight(qdata, scale, shape, layout, self._part("zero_point", name), group_size)

    @torch.no_grad()
    def moved(self) -> float:
        """Which part of all integers are others than at the start."""
        changed = total = 0
        for name in self._layers:
            start: torch.Tensor = self._part("integers", name)
            changed, total = changed + int((self.integers(name) != start).sum()), total + start.numel()
        return changed / max(total, 1)
