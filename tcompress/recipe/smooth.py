"""The step that moves the size of activations into weights before both are quantized."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tcompress.recipe.step import Transform


class Smooth(Transform):
    """SmoothQuant (`tcompress.quantize.smoothquant`): divides the inputs of linear layers by scales that are folded
    into the norm or linear layer that gives them, and multiplies their weights. The model computes the same. A
    `Quantize` step with activations follows. Needs data.

    Attributes:
        alpha: the migration strength, 0 … 1, or "auto": for each pair, the one of ten with the smallest output error
            under the scheme that the recipe's `Quantize` step has for the layers; none where scales do not help.
        sources: "norm", "linear", or "all" for both: what scales are folded into (`tcompress.pairs`).
        targets, ignore: as in `Step`: pairs that feed at least one of these layers.
    """

    step: Literal["smooth"] = "smooth"
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = 0.5
    sources: Literal["all", "norm", "linear"] = "all"
