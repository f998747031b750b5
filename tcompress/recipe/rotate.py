"""The step that rotates what flows between blocks, so that no channel is much larger than others."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tcompress.recipe.step import Transform


class Rotate(Transform):
    """QuaRot's rotation of the residual stream (`tcompress.rotate_step`), folded into the weights that read it and
    write it. The model computes the same. A `Quantize` step follows. Needs a sample, to find these weights.

    Attributes:
        seed: of the random signs.
    """

    step: Literal["rotate"] = "rotate"
    seed: int = Field(0, ge=0)
