"""The step that scales weights by the size of their inputs before they are quantized."""

from __future__ import annotations

from typing import Literal

from tcompress.recipe.step import Transform


class AWQ(Transform):
    """AWQ (`tcompress.quantize.awq`): multiplies weight columns of linear layers by scales and divides the norm or
    linear layer that gives their inputs by them. The model computes the same. Of 20 scales it takes the one with the
    smallest output error under the scheme that the recipe's `Quantize` step has for the layers; that step follows, with
    rounding to nearest or GPTQ. Needs data.

    Attributes:
        sources: "norm", "linear", or "all" for both: what scales are folded into (`tcompress.pairs`).
        targets, ignore: as in `Step`: pairs that feed at least one of these layers.
    """

    step: Literal["awq"] = "awq"
    sources: Literal["all", "norm", "linear"] = "all"
