"""The step that replaces linear layers by two thin ones."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tcompress.recipe.step import Transform


class LowRank(Transform):
    """Replaces linear layers by `tcompress.nn.LowRankLinear` (`tcompress.share.low_rank`); later steps may quantize its
    two layers. One that would not get smaller stays.

    Attributes:
        ratio: how much of a layer's parameters its factors may have, above 0 and below 1.
        whitening: "inputs": of all factors of that size those that change the layer's output least on the data, which
            it needs; or "none", those that change the weight least.
        targets, ignore: as in `Step`.
    """

    step: Literal["low_rank"] = "low_rank"
    ratio: float = Field(gt=0, lt=1)
    whitening: Literal["inputs", "none"] = "inputs"
