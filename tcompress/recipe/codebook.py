"""The step that stores weights as indices into codebooks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tcompress.recipe.step import Transform


class Codebook(Transform):
    """Replaces linear layers by `tcompress.nn.CodebookLinear`: k-means over the weights of each tile of `rows` x
    `columns` (`tcompress.share.kmeans`).

    Attributes:
        bits: of an index, 1 … 8.
        rows, columns: of a tile. By default a row has a codebook of its own; both None is one codebook a layer.
        weighting: "none", or "inputs": by the mean square of each input on the data, which it then needs.
        init: "linear" or "k-means++", with `seed`.
        iterations: at most so many.
        values: type of the stored values.
        held: in memory as "float", looked up when loaded, or as "indices", looked up at each call.
        targets, ignore: as in `Step`.
    """

    step: Literal["codebook"] = "codebook"
    bits: int = Field(4, ge=1, le=8)
    rows: int | None = Field(1, ge=1)
    columns: int | None = Field(None, ge=1)
    weighting: Literal["none", "inputs"] = "none"
    init: Literal["linear", "k-means++"] = "linear"
    iterations: int = Field(100, ge=1)
    values: Literal["float16", "float32"] = "float16"
    held: Literal["float", "indices"] = "float"
    seed: int = 0
