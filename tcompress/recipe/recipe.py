"""What to do to a model: an ordered list of steps, frozen and serialisable."""

from __future__ import annotations

import difflib
import reprlib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from tcompress.errors import message
from tcompress.recipe.awq import AWQ
from tcompress.recipe.codebook import Codebook
from tcompress.recipe.distill import Distill
from tcompress.recipe.finetune import Finetune
from tcompress.recipe.low_rank import LowRank
from tcompress.recipe.prune import Prune
from tcompress.recipe.quantize import Quantize
from tcompress.recipe.rotate import Rotate
from tcompress.recipe.share import Share
from tcompress.recipe.shrink import Shrink
from tcompress.recipe.smooth import Smooth
from tcompress.recipe.sparse import Sparse
from tcompress.recipe.step import Step

#: The recipe's format; raised when an old file would be read differently.
VERSION = 1
#: The kinds of steps, in the order of the documentation.
STEPS: tuple[type[Step], ...] = (
    Quantize,
    Sparse,
    Prune,
    Smooth,
    AWQ,
    Rotate,
    Distill,
    Shrink,
    Share,
    Codebook,
    LowRank,
    Finetune,
)
_KINDS: dict[str, type[Step]] = {kind.model_fields["step"].default: kind for kind in STEPS}
_ANY_KIND = " or ".join(", ".join(map(repr, _KINDS)).rsplit(", ", 1))


def _kind(step: Any) -> str | None:
    """Which step this is, quantize where it does not say; None if it is no step at all."""
    if isinstance(step, Step):
        return step.step
    return str(step.get("step", "quantize")) if isinstance(step, dict) else None


#: Any step of a recipe. The type checker is told a union; a new kind stands here and in `STEPS`.
AnyStep = Annotated[
    Annotated[Quantize, Tag("quantize")]
    | Annotated[Sparse, Tag("sparse")]
    | Annotated[Prune, Tag("prune")]
    | Annotated[Smooth, Tag("smooth")]
    | Annotated[AWQ, Tag("awq")]
    | Annotated[Rotate, Tag("rotate")]
    | Annotated[Distill, Tag("distill")]
    | Annotated[Shrink, Tag("shrink")]
    | Annotated[Share, Tag("share")]
    | Annotated[Codebook, Tag("codebook")]
    | Annotated[LowRank, Tag("low_rank")]
    | Annotated[Finetune, Tag("finetune")],
    Discriminator(_kind),
]


class Recipe(BaseModel):
    """Ordered steps. `Prune` steps come first, whatever their place; of the others, the first step that claims a module
    keeps it. Steps that make another model in floating point (`step.Transform`) are run before all these, in order;
    a `Distill` step comes after the `Prune` steps that stand before it, and trains what they left. A `Finetune` step
    comes last, and trains what all the others left.

    Attributes:
        version: of the format.
        steps: at least one.
        inputs: by which inputs a block is solved, where an algorithm needs data: what the "compressed" blocks before it
            give, so that it makes up for their errors too, what the "original" ones give, or ("sequential") what the
            compressed layers before a layer give, those of its own block included.
        samples: how many of the data's samples (batches) algorithms that decide by data look at, the first ones, and
            the report with them; all by default. Steps that train see all.

    Raises:
        ValueError: no steps, an unknown field, or a version that this release does not read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: int = VERSION
    steps: tuple[AnyStep, ...]
    inputs: Literal["compressed", "original", "sequential"] = "compressed"
    samples: Annotated[int, Field(ge=1)] | None = None

    @field_validator("version")
    @classmethod
    def _readable(cls, value: int) -> int:
        if value != VERSION:
            raise ValueError(message("Recipe", "version", value, VERSION))
        return value

    @field_validator("steps")
    @classmethod
    def _not_empty(cls, value: tuple[AnyStep, ...]) -> tuple[AnyStep, ...]:
        if not value:
            raise ValueError(message("Recipe", "steps", "none", "at least one"))
        return value

    @model_validator(mode="after")
    def _inputs_of_both(self) -> Recipe:
        moved = any(isinstance(step, Quantize) and step.propagation for step in self.steps)
        if moved and self.inputs != "compressed":
            hint = "propagation compares these with the original ones"
            raise ValueError(message("Recipe", "inputs", repr(self.inputs), "'compressed'", hint))
        return self

    @model_validator(mode="after")
    def _something_to_finetune(self) -> Recipe:
        steps = [step for step in self.steps if isinstance(step, Finetune)]
        if len(steps) > 1:
            raise ValueError(message("Recipe", "steps", f"{len(steps)} of finetune", "one", "more steps= in one"))
        quantized = any(isinstance(step, Quantize) and step.scheme is not None for step in self.steps)
        if steps and not quantized:
            hint = "it trains the integers of quantized layers; distill trains floats"
            got = "finetune without quantize"
            raise ValueError(message("Recipe", "steps", got, "a quantize step with a scheme", hint))
        return self

    @classmethod
    def load(cls, recipe: str | Path | dict[str, Any] | Recipe) -> Recipe:
        """A recipe from a preset's name, a YAML or JSON file, a dict, or a recipe.

        Raises:
            ValueError: unknown preset, or a content that does not fit. FileNotFoundError: no such file.
            TypeError: something else was given.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, dict):
            return cls._validated(recipe, "the dict")
        if not isinstance(recipe, str | Path):
            expected = "a preset's name, a Recipe, a dict or a path"
            raise TypeError(message("Recipe", "recipe", type(recipe).__name__, expected))
        if str(recipe) in presets():
            preset = resources.files("tcompress") / "recipes" / f"{recipe}.yaml"
            return cls.from_yaml(preset.read_text(), str(recipe))
        path = Path(recipe)
        if path.suffix not in (".yaml", ".yml", ".json"):
            raise ValueError(message("Recipe", "recipe", repr(str(recipe)), f"a preset {presets()} or a YAML path"))
        if not path.is_file():
            raise FileNotFoundError(message("Recipe", "path", f"{path}, which is no file", "a YAML or JSON file"))
        return cls.from_yaml(path.read_text(), str(path))

    @classmethod
    def from_yaml(cls, text: str, where: str = "the text") -> Recipe:
        """Reads YAML, of which JSON is a part."""
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(message("Recipe", where, f"no YAML ({error})", "YAML")) from error
        if not isinstance(content, dict):
            raise ValueError(message("Recipe", where, type(content).__name__, "a mapping with 'steps'"))
        return cls._validated(content, where)

    def to_yaml(self) -> str:
        """YAML text that `load` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)

    @classmethod
    def _validated(cls, content: dict[str, Any], where: str) -> Recipe:
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problems = "; ".join(_problem(dict(e)) for e in error.errors())
            raise ValueError(f"Recipe: {where}: {problems}") from error


def _problem(error: dict[str, Any]) -> str:
    """One of pydantic's errors in the form `argument: got X, expected Y`."""
    # The third part, ("steps", 0, "prune", …), is the kind of step; "prune" further on is a field.
    place = ".".join(str(part) for i, part in enumerate(error["loc"]) if i != 2 or part not in _KINDS)
    if error["type"] == "union_tag_invalid" and len(error["loc"]) > 2:
        return f"{place}: got {error['ctx']['tag']!r}, expected one of {error['ctx']['expected_tags']}"
    if error["type"] == "union_tag_invalid":
        return f"{place}.step: got {error['input']['step']!r}, expected {_ANY_KIND}"
    if error["type"] == "union_tag_not_found":
        return f"{place}: got {reprlib.repr(error['input'])}, expected a step: a mapping"
    if error["type"] == "value_error":  # raised by a validator of ours, in our form
        said = error["msg"].removeprefix("Value error, ").removeprefix("Recipe: ")
        return f"{place}: {said}" if place and not said.startswith(f"{place}: ") else said
    if error["type"] == "missing":
        return f"{place}: got nothing, expected a value"
    if error["type"] == "extra_forbidden":
        loc = error["loc"]
        close = difflib.get_close_matches(str(loc[-1]), _fields_of(loc[-2] if len(loc) > 1 else None), 1)
        return f"{place}: got an unknown field, expected no such field" + (f"; {close[0]}?" if close else "")
    if error["type"] == "too_short":
        return f"{place}: got {reprlib.repr(error['input'])}, expected at least {error['ctx']['min_length']}"
    return f"{place}: got {reprlib.repr(error['input'])}, expected {error['msg'].removeprefix('Input should be ')}"


def _fields_of(kind: Any) -> list[str]:
    """Of a kind of step, or of a recipe."""
    return list(_KINDS[kind].model_fields if kind in _KINDS else Recipe.model_fields)


def presets() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("tcompress") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
