"""What to do to a model: an ordered list of steps, frozen and serialisable."""

from __future__ import annotations

import math
import reprlib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tcompress.errors import message
from tcompress.ops.attention_options import auto_bits
from tcompress.packing import Pattern
from tcompress.quantize.scheme import Scheme

#: The recipe's format; raised when an old file would be read differently.
VERSION = 1
#: Attention whose output has a lower cosine to floating point on the user's data stays in floating point. 8 bits give
#: 0.9999 on normal inputs; 0.999 is a relative error of 4.5 %, four times theirs.
MIN_COSINE = 0.999
#: What a step means that does not say: linear layers by their classes, or (True) all of a model's attention.
_DEFAULTS: dict[bool, dict[str, Any]] = {
    False: {"targets": ("Linear", "Conv1D"), "ignore": ("lm_head",), "algorithm": "rtn"},
    True: {"targets": ("*",), "ignore": ()},
}


class Quantize(BaseModel):
    """Replaces modules by quantized ones: linear layers and embeddings by a `scheme`, or the products between the
    projections of attention layers, softmax(Q Kᵀ) V, by `attention`. A step does one of the two.

    Attributes:
        scheme: a name ("W8A8", "W8A7", "W7A7"; "W8A16" for embeddings) or a `Scheme`.
        algorithm: how a scheme's integers are found (`tcompress.quantize`): "rtn", to the nearest, or "gptq", which
            makes up for the errors by the inputs of the layer and needs data; embeddings have no such inputs.
        attention: "int8" or "int12", the bits of Q, K and V; "auto" is what the processor runs fastest
            (`ops.quantized_attention`). `torch.nn.MultiheadAttention`, `tcompress.nn.MultiHeadAttention` and the
            attention of `transformers` models are meant; the first one's projections become linear layers of their own
            ("….q_proj", k_proj, v_proj, out_proj), which steps with a scheme may target.
        targets: which modules. A class name ("Linear", subclasses included), a glob over names
            ("encoder.layer.*.dense"), a last name ("query"), or "re:" and a regular expression matched from the start.
            "*", all of them, is the default for attention.
        ignore: which of them not, in the same language. "lm_head" also means a model's output embeddings, whatever
            their name.
        min_cosine: for attention. Where the output's cosine to floating point on the data is lower, the layer stays in
            floating point; -1 keeps all. By default `MIN_COSINE`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    step: Literal["quantize"] = "quantize"
    attention: Literal["int8", "int12"] | None = None
    scheme: Scheme | None = Field(None, validate_default=True)
    targets: tuple[str, ...] = ()  # both have defaults by the kind of step: _DEFAULTS
    ignore: tuple[str, ...] = ()
    algorithm: Literal["rtn", "gptq"] | None = None
    min_cosine: float | None = Field(None, ge=-1, le=1)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        attention = content.get("attention") is not None
        content = _DEFAULTS[attention] | content
        if attention and content.get("min_cosine") is None:
            content["min_cosine"] = MIN_COSINE
        return content

    @field_validator("attention", mode="before")
    @classmethod
    def _bits(cls, value: Any) -> Any:
        if value not in (None, "auto", "int8", "int12"):
            raise ValueError(f"got {value!r}, expected 'int8', 'int12' or 'auto'")
        return f"int{auto_bits()}" if value == "auto" else value

    @field_validator("scheme", mode="before")
    @classmethod
    def _named(cls, value: Any, info: ValidationInfo) -> Any:
        if "attention" in info.data and (value is None) == (info.data["attention"] is None):
            got = "nothing" if value is None else "a scheme beside attention"
            raise ValueError(f"got {got}, expected a scheme or, in a step of its own, attention")
        return Scheme.named(value) if isinstance(value, str) else value

    @field_validator("algorithm")
    @classmethod
    def _of_scheme(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("attention") is not None:
            raise ValueError(f"got {value!r}, expected it in a step with a scheme only")
        return value

    @field_validator("min_cosine")
    @classmethod
    def _of_attention(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("scheme") is not None:
            raise ValueError(f"got {value}, expected it in a step with attention only")
        return value

    @property
    def needs_data(self) -> bool:
        """Whether it decides by the inputs of layers."""
        return self.algorithm == "gptq"

    @property
    def attention_bits(self) -> Literal[8, 12] | None:
        """Bits of an attention step, or None."""
        return None if self.attention is None else 8 if self.attention == "int8" else 12

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Sparse(BaseModel):
    """Replaces linear layers whose weights hold zeros, from whatever pruned them, by `tcompress.nn.SparseLinear`.

    Attributes:
        scheme: of int8 values ("int8", "W8A8", "W7A7" …), or None for the floats as they are.
        tokens: how many tokens a call usually has: the layout of the kernel, the dense one among the candidates, is
            chosen by measuring that many on this machine (`tcompress.tune`).
        min_sparsity: a layer with a smaller part of zeros is left to the later steps.
        targets, ignore: as in `Quantize`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    step: Literal["sparse"] = "sparse"
    scheme: Scheme | None = None
    tokens: int = Field(128, ge=1)
    min_sparsity: float = Field(0.1, ge=0, le=1)
    targets: tuple[str, ...] = ("Linear", "Conv1D")
    ignore: tuple[str, ...] = ("lm_head",)

    @field_validator("scheme", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return Scheme.named(value) if isinstance(value, str) else value

    @field_validator("scheme")
    @classmethod
    def _eight_bits(cls, value: Scheme | None) -> Scheme | None:
        if value is not None and (value.weights.bits <= 4 or value.activations is None):
            raise ValueError(f"got {value.name}, expected 5 to 8 bits for weights and quantized activations, or none")
        return value

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Prune(BaseModel):
    """Sets the smallest weights of linear layers to zero (`tcompress.prune`); later steps compress what is left.

    Attributes:
        pattern: "unstructured", "2:4", "1x4", "8x4", "16x16" …, outputs x inputs (`packing.Pattern`).
        sparsity: which part of the weights goes, 0 … 1; of "N:M" it is 1 - N/M and may be left out.
        algorithm: which go (`tcompress.prune`): "magnitude", the smallest; "wanda", those with the smallest products
            with their inputs; "sparsegpt", those that are easiest to make up for by the weights that stay; with "gptq"
            in another step both are done in one pass over the data. The latter two need data.
        targets, ignore: as in `Quantize`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    step: Literal["prune"] = "prune"
    pattern: str = "8x4"
    sparsity: float | None = Field(None, ge=0, le=1, validate_default=True)
    algorithm: Literal["magnitude", "wanda", "sparsegpt"] = Field(
        "magnitude", validation_alias=AliasChoices("algorithm", "scores")
    )  # "scores" is what it was called
    targets: tuple[str, ...] = ("Linear", "Conv1D")
    ignore: tuple[str, ...] = ("lm_head",)

    @property
    def needs_data(self) -> bool:
        """Whether it decides by the inputs of layers."""
        return self.algorithm != "magnitude"

    @field_validator("pattern", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> str:
        if not isinstance(value, str):
            hint = '; write "2:4" in quotes: without them it is a number to YAML' if isinstance(value, int) else ""
            raise ValueError(f"got {reprlib.repr(value)}, expected text such as '8x4'{hint}")
        return str(Pattern.parse(value))

    @field_validator("sparsity")
    @classmethod
    def _how_much(cls, value: float | None, info: ValidationInfo) -> float | None:
        if "pattern" not in info.data:  # which has an error of its own
            return value
        pattern = Pattern.parse(info.data["pattern"])
        n, m = pattern.size
        if pattern.kind == "n_m":
            if value is not None and not math.isclose(value, 1 - n / m):
                raise ValueError(f"got {value}, expected {1 - n / m} or nothing for {pattern}")
        elif value is None:
            raise ValueError(f"got nothing, expected 0 to 1 for {pattern}")
        return value

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def _kind(step: Any) -> str | None:
    """Which step this is, quantize where it does not say; None if it is no step at all."""
    if isinstance(step, Quantize | Sparse | Prune):
        return step.step
    return str(step.get("step", "quantize")) if isinstance(step, dict) else None


#: A step of a recipe.
Step = Annotated[
    Annotated[Quantize, Tag("quantize")] | Annotated[Sparse, Tag("sparse")] | Annotated[Prune, Tag("prune")],
    Discriminator(_kind),
]


class Recipe(BaseModel):
    """Ordered steps. `Prune` steps come first, whatever their place; of the others, the first step that claims a module
    keeps it.

    Attributes:
        version: of the format.
        steps: at least one.
        inputs: by which inputs a block is solved, where an algorithm needs data: what the "compressed" blocks before it
            give, so that it makes up for their errors too, or what the "original" ones give.

    Raises:
        ValueError: no steps, an unknown field, or a version that this release does not read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: int = VERSION
    steps: tuple[Step, ...]
    inputs: Literal["compressed", "original"] = "compressed"

    @field_validator("version")
    @classmethod
    def _readable(cls, value: int) -> int:
        if value != VERSION:
            raise ValueError(message("Recipe", "version", value, VERSION))
        return value

    @field_validator("steps")
    @classmethod
    def _not_empty(cls, value: tuple[Step, ...]) -> tuple[Step, ...]:
        if not value:
            raise ValueError(message("Recipe", "steps", "none", "at least one"))
        return value

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
    place = ".".join(str(part) for part in error["loc"] if part not in ("quantize", "sparse", "prune"))
    if error["type"] == "union_tag_invalid":
        return f"{place}.step: got {error['input']['step']!r}, expected 'quantize', 'sparse' or 'prune'"
    if error["type"] == "union_tag_not_found":
        return f"{place}: got {reprlib.repr(error['input'])}, expected a step: a mapping"
    if error["type"] == "value_error":  # raised by a validator of ours, in our form
        return f"{place}: {error['msg'].removeprefix('Value error, ')}"
    if error["type"] == "missing":
        return f"{place}: got nothing, expected a value"
    if error["type"] == "extra_forbidden":
        return f"{place}: got an unknown field, expected no such field"
    return f"{place}: got {reprlib.repr(error['input'])}, expected {error['msg'].removeprefix('Input should be ')}"


def presets() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("tcompress") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
