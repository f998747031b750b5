"""Movement pruning: the weights go that training moves towards zero, however large they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from tcompress.distill.constraint import Masks
from tcompress.distill.effective import TensorMap
from tcompress.distill.prune_schedule import cubic, keep_largest, span, spread
from tcompress.packing.sparse_blocks import block_grid
from tcompress.packing.sparse_pattern import Pattern
from tcompress.recipe.training_prune import TrainingPrune


class _Masked(torch.autograd.Function):
    """W ⊙ M(S), with the gradient of S as if M were S."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.size = size
        return weight.masked_fill(~mask, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, mask = ctx.saved_tensors
        grad = grads[0]
        towards = block_grid(grad * weight, ctx.size).sum((2, 3))
        return grad.masked_fill(~mask, 0), towards, None, None


class MovementPruning(Masks):
    """Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", arXiv 2005.07683, section 4, with the cubic
    schedule of section 5; blocks as in Lagunas et al., "Block Pruning For Faster Transformers", arXiv 2109.04838,
    section 4.

    ::

        a = (W ⊙ M) x,   M = Top_v(S)                         of B blocks the round((1 - s_t) · B) with the largest S
        ∂L/∂S = Σ over the block of  ∂L/∂(W ⊙ M) ⊙ W          straight-through: past the choice; of weights that are
                                                              masked too, which may so come back
        ∂L/∂W = ∂L/∂(W ⊙ M) ⊙ M

    So S = -Σ_t lr · ∂L/∂W · W grows where a weight moves away from zero. M is found anew at each step; after t₁ it is
    fixed, and the weights that it leaves out are set to zero.

    Args:
        layers: by name.
        config: with the method "movement".
        steps: of the whole training.
    """

    fixed: torch.Tensor  # bool: whether the masks are

    def __init__(self, layers: Mapping[str, nn.Module], config: TrainingPrune, steps: int) -> None:
        super().__init__(layers)
        self.config, self.steps, self.lr = config, steps, config.lr
        self._pattern = Pattern.parse(config.pattern)
        self._size = self._pattern.size if self._pattern.kind == "blocks" else (1, 1)
        for i, name in enumerate(self._layers):
            (n, k), (r, c) = self.weight(name).shape, self._size
            self.register_parameter(
                f"score_{i}", nn.Parameter(torch.zeros(-(-n // r), -(-k // c), device=self.weight(name).device))
            )
        self.register_buffer("fixed", torch.tensor(False))

    def scores(self, name: str) -> nn.Parameter:
        """S [ceil(N/R), ceil(K/C)]."""
        scores = self._parameters[f"score_{list(self._layers).index(name)}"]
        assert scores is not None
        return scores

    def maps(self) -> dict[nn.Module, TensorMap]:
        return {module: partial(self._masked, name) for name, module in self._layers.items()}

    def _masked(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _Masked.apply(weight, self.scores(name), self.mask(name), self._size)
        return result

    def before_step(self, step: int) -> None:
        first, last = span(self.config, self.steps)
        if step < first or bool(self.fixed):
            return
        part = 1.0 if step >= last else cubic((step - first) / (last - first))
        for name in self._layers:
            kept = keep_largest(self.scores(name).detach(), self._pattern, self.config.sparsity, part)
            self.mask(name).copy_(spread(kept, self._pattern, self.weight(name).shape))
        if step >= last:
            self.fixed.fill_(True)
            for name in self._layers:
                self.apply_mask(name)

    def after_backward(self) -> None:
        if bool(self.fixed):
            super().after_backward()
            for parameter in self.parameters():
                parameter.grad = None

    def after_step(self, step: int) -> None:
        if bool(self.fixed):  # before that, a masked weight keeps its value and may come back
            super().after_step(step)
