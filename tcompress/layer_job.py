"""What is to be done to each linear layer of a recipe that algorithms have a part in, and what was found for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tcompress.match import Match
from tcompress.packing import PackedWeight
from tcompress.prune_step import Pruned
from tcompress.quantize import QuantArgs
from tcompress.recipe import Quantize, Sparse
from tcompress.weights import is_masked_by_torch, weight_key

#: Layers with one weight have the same.
Key = tuple[int, bool]


@dataclass(frozen=True)
class Written:
    """What is known of a layer whose new weight took the place of the old one at once.

    Attributes:
        weight_sqnr_db: of the weight.
        output_sqnr_db: of what the weight contributes to the layer's output, on the inputs that the layer is given in
            the model under way, by their Hessian: 10·log10(tr(W H Wᵀ) / tr((Ŵ-W) H (Ŵ-W)ᵀ)); None without one.
    """

    weight_sqnr_db: float
    output_sqnr_db: float | None


@dataclass(frozen=True)
class Solution:
    """What was found for a layer.

    Attributes:
        weight: [N, K], as it will compute; empty where `packed` has it.
        mask: what pruning keeps, or None.
        packed: the integers, or None where the weight stays in floating point.
        bias: [N], a corrected one, or None where it stays.
        outliers: int64 [C], the inputs whose weights stay in floating point (they are zero in `packed`), or None.
        written: set where the layer holds the weight already, and nothing of it stands here.
    """

    weight: torch.Tensor
    mask: torch.Tensor | None
    packed: PackedWeight | None
    bias: torch.Tensor | None = None
    outliers: torch.Tensor | None = None
    written: Written | None = None


@dataclass(frozen=True)
class Job:
    """A layer to solve: pruned, quantized, or first one and then the other."""

    names: tuple[str, ...]
    module: nn.Module
    pruned: Pruned | None
    step: Quantize | Sparse | None

    @property
    def name(self) -> str:
        return self.names[0] or "(root)"

    @property
    def quantize(self) -> Quantize | None:
        """The step that quantizes it, or None."""
        return self.step if isinstance(self.step, Quantize) else None

    @property
    def args(self) -> QuantArgs | None:
        """How its weight is quantized, or None."""
        scheme = None if self.quantize is None else self.quantize.scheme
        return None if scheme is None else scheme.weights

    @property
    def pruning(self) -> str:
        """The algorithm that prunes it, "magnitude" where none does."""
        return "magnitude" if self.pruned is None else self.pruned.step.algorithm

    @property
    def algorithm(self) -> str | None:
        """The algorithm that quantizes it, or None."""
        return None if self.quantize is None else self.quantize.algorithm

    @property
    def needs_hessian(self) -> bool:
        begins = self.quantize is not None and self.quantize.start == "gptq"
        return self.algorithm == "gptq" or begins or self.pruning == "sparsegpt"

    @property
    def needs_statistics(self) -> bool:
        """Whether it decides by sums over the layer's inputs."""
        by_inputs = self.quantize is not None and self.quantize.needs_data and not self.by_block
        return self.needs_hessian or self.pruning == "wanda" or by_inputs

    @property
    def needs_original(self) -> bool:
        """Whether it decides by what the original model's inputs were too."""
        return self.quantize is not None and bool(self.quantize.propagation) and self.pruned is None

    @property
    def by_block(self) -> bool:
        """Whether all such layers of a block are solved together, by the block's output."""
        return self.algorithm == "autoround"

    @property
    def only_prunes(self) -> bool:
        """Whether its weight stays what it is, a float tensor of its own, with zeros."""
        return self.pruned is not None and self.step is None and not is_masked_by_torch(self.module)

    @property
    def key(self) -> Key:
        return weight_key(self.module)


def jobs_of(matches: Sequence[Match], pruned: Mapping[nn.Module, Pruned]) -> list[Job]:
    """Every linear layer that a step prunes or quantizes."""
    found = [
        Job(m.names, m.module, pruned.get(m.module), m.step) for m in matches if not isinstance(m.module, nn.Embedding)
    ]
    done = {job.module for job in found}
    return found + [Job(p.names, module, p, None) for module, p in pruned.items() if module not in done]
