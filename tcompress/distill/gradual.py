"""Gradual magnitude pruning: the smallest weights go, more and more of them while the others make up for it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tcompress.distill.constraint import Masks
from tcompress.distill.prune_schedule import cubic, keep_largest, prunes_now, spread
from tcompress.packing.sparse_pattern import Pattern
from tcompress.prune.magnitude import block_scores
from tcompress.recipe.training_prune import TrainingPrune


class GradualPruning(Masks):
    """Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", arXiv
    1710.01878, section 3.

    ::

        s_t = s_f · (1 - (1 - (t - t₀) / (t₁ - t₀))³)         at each `every` steps from t₀ to t₁
        the round(s_t · B) blocks with the smallest root mean square go, as in `magnitude_mask`

    A weight that went is zero and stays zero. After t₁ the masks are fixed.

    Args:
        layers: by name.
        config: with the method "magnitude".
        steps: of the whole training.
    """

    def __init__(self, layers: Mapping[str, nn.Module], config: TrainingPrune, steps: int) -> None:
        super().__init__(layers)
        self.config, self.steps = config, steps

    def before_step(self, step: int) -> None:
        done = prunes_now(self.config, step, self.steps)
        if done is None:
            return
        pattern = Pattern.parse(self.config.pattern)
        for name in self._layers:
            weight = self.weight(name).detach()
            scores = block_scores(weight, pattern.size) if pattern.kind == "blocks" else weight.abs()
            kept = keep_largest(scores, pattern, self.config.sparsity, cubic(done))
            self.set_mask(name, spread(kept, pattern, weight.shape))
