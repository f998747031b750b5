"""The step that takes whole heads, channels or layers out of a model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from tcompress.recipe.step import Transform


class Shrink(Transform):
    """Structured pruning: the model gets narrower or shorter (`tcompress.prune.shrink`).

    What depends on what is found by running the model on the data; what is not understood stays, with the reason in the
    report.

    Attributes:
        structure: "heads" of attention, of which those that share keys go together; "channels" between two linear
            layers, as of a feed-forward network; or whole "layers" of a chain of blocks.
        ratio: which part goes, above 0 and below 1; rounded down to whole heads, channels or layers.
        importance: by what is chosen (`tcompress.prune.importance`). Of heads and channels "activation": how much they
            add to the output; "taylor": the first-order change of the loss, the model's own if it returns one, for
            which the data must hold labels, else a random projection of its output; "weight": the norm of their
            weights. Of layers "cosine": 1 - cos of what goes in and what comes out.
        scope: of heads and channels, whether each "layer" loses its part, or the least important of the whole "model".
        repair: whether the weights that read the channels that stay are refitted to what they gave before, on the data.
        multiple: channels that stay are so many times this, where the ratio allows: kernels like multiples of 16.
        targets, ignore: as in `Step`; of linear layers, all that a head or channel goes through; of blocks ("layers")
            all by default.
    """

    step: Literal["shrink"] = "shrink"
    structure: Literal["heads", "channels", "layers"]
    ratio: float = Field(gt=0, lt=1)
    importance: Literal["activation", "taylor", "weight", "cosine"] | None = Field(None, validate_default=True)
    scope: Literal["layer", "model"] = "layer"
    repair: bool = True
    multiple: int = Field(1, ge=1)
    targets: tuple[str, ...] = ("*",)

    @field_validator("importance")
    @classmethod
    def _fits(cls, value: str | None, info: ValidationInfo) -> Any:
        layers = info.data.get("structure") == "layers"
        if value is None:
            return "cosine" if layers else "activation"
        if layers != (value == "cosine"):
            expected = "'cosine' for layers" if layers else "'activation', 'taylor' or 'weight' for heads and channels"
            raise ValueError(f"got {value!r}, expected {expected}")
        return value
