"""The step that makes layers share one weight."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tcompress.recipe.step import Transform


class Share(Transform):
    """Ties weights, so that they are stored, trained and quantized once (`tcompress.share.tie`).

    Attributes:
        structure: "layers": those of `group` blocks that follow one another; "embeddings": the output layer and the
            input embedding.
        group: how many blocks share.
        init: what they share: the "mean", or the "best": of the mean and each member's, what changes the model's output
            least on the data, which it then needs. Either is only a start for training.
        targets, ignore: as in `Step`; of layers, only linear ones by default: norms are small, and stay as they are.
    """

    step: Literal["share"] = "share"
    structure: Literal["layers", "embeddings"] = "layers"
    group: int = Field(2, ge=2)
    init: Literal["mean", "best"] = "mean"
