"""ADMM pruning: a penalty draws the weights to the nearest ones with enough zeros, before any is set to zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from tcompress.distill.constraint import Masks
from tcompress.distill.prune_schedule import prunes_now
from tcompress.prune.magnitude import magnitude_mask
from tcompress.recipe.training_prune import TrainingPrune


class AdmmPruning(Masks):
    """Zhang et al., "A Systematic DNN Weight Pruning Framework using Alternating Direction Method of Multipliers",
    arXiv 1804.03294, section 3.

    ::

        loss + Σ ρ/2 ‖W - Z + U‖²                  at each step
        Z = Π(W + U),   U = U + W - Z              at each `every` steps from t₀ to t₁
        Π(V) = V with the smallest blocks at zero, as many as the pattern and the sparsity say (`magnitude_mask`): the
               nearest such weight
        at t₁: W = Π(W), and the masks are fixed   the retraining that the paper ends with

    Args:
        layers: by name.
        config: with the method "admm".
        steps: of the whole training.
    """

    state: torch.Tensor  # 0 before t₀, 1 until t₁, 2 after it

    def __init__(self, layers: Mapping[str, nn.Module], config: TrainingPrune, steps: int) -> None:
        super().__init__(layers)
        self.config, self.steps = config, steps
        self.register_buffer("state", torch.tensor(0))
        for i, name in enumerate(self._layers):
            for which in ("z", "u"):
                self.register_buffer(f"{which}_{i}", torch.zeros_like(self.weight(name)))

    def variable(self, which: str, name: str) -> torch.Tensor:
        """Z ("z") or U ("u"), [N, K]."""
        value = self._buffers[f"{which}_{list(self._layers).index(name)}"]
        assert value is not None
        return value

    def _projected(self, value: torch.Tensor) -> torch.Tensor:
        return value.masked_fill(~self._mask_of(value), 0)

    def _mask_of(self, value: torch.Tensor) -> torch.Tensor:
        return magnitude_mask(value, self.config.pattern, self.config.sparsity)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        done = prunes_now(self.config, step, self.steps)
        if done is None or int(self.state) == 2:
            return
        for name in self._layers:
            weight, z, u = self.weight(name), self.variable("z", name), self.variable("u", name)
            if done == 1:
                self.set_mask(name, self._mask_of(weight))
            elif int(self.state) == 0:
                z.copy_(self._projected(weight))  # U is zero
            else:
                z.copy_(self._projected(weight + u))
                u.add_(weight - z)
        self.state.fill_(2 if done == 1 else 1)

    def penalty(self) -> torch.Tensor | None:
        if int(self.state) != 1:
            return None
        distances = [
            (self.weight(name) - self.variable("z", name) + self.variable("u", name)).square().sum()
            for name in self._layers
        ]
        return self.config.rho / 2 * torch.stack(distances).sum()
