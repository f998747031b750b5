"""The step that makes integers of weights, activations and attention."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tcompress.ops.attention_options import auto_bits
from tcompress.quantize.observers import ObserverName
from tcompress.quantize.scheme import Scheme
from tcompress.recipe.step import Step

#: Attention whose output has a lower cosine to floating point on the user's data stays in floating point. 8 bits give
#: 0.9999 on normal inputs; 0.999 is a relative error of 4.5 %, four times theirs.
MIN_COSINE = 0.999
#: What a step means that does not say: linear layers by their classes, or (True) all of a model's attention.
_DEFAULTS: dict[bool, dict[str, Any]] = {
    False: {"targets": ("Linear", "Conv1D"), "ignore": ("lm_head",), "algorithm": "rtn"},
    True: {"targets": ("*",), "ignore": ()},
}


#: Options of an algorithm, with their values where a step does not say.
_OPTIONS: dict[str, dict[str, Any]] = {
    "rtn": {"range": "minmax"},
    "hqq": {},
    "gptq": {"range": "mse", "sweeps": 1, "propagation": 0.0},
    "autoround": {"iterations": 200, "start": "rtn"},
}


class Quantize(Step):
    """Replaces modules by quantized ones: linear layers and embeddings by a `scheme`, or the products between the
    projections of attention layers, softmax(Q Kᵀ) V, by `attention`. A step does one of the two.

    Attributes:
        scheme: a name ("W8A8", "W8A7", "W7A7"; "W8A16" for embeddings) or a `Scheme`.
        observer: of a static scheme ("W8A8-static"): how the range of a layer's inputs is taken from the data
            (`quantize.observers`): "minmax", "percentile", "mse" or "moving_average"; "mse" by default.
        algorithm: how a scheme's integers are found (`tcompress.quantize`): "rtn", to the nearest; "hqq", on a grid for
            sparse errors; "gptq", which makes up for the errors by the inputs of the layer; "autoround", which learns
            the rounding of a whole block. The latter two need data, and embeddings have no such inputs.
        range: of "rtn" and "gptq": "minmax", "percentile" or "mse" (`quantize.range_search`). By default "minmax" for
            "rtn", "mse" for "gptq".
        sweeps: of "gptq": how often integers and scales are refined afterwards (`quantize.refine`), 1 by default.
        propagation: of "gptq": 0 to 1, how far the weight moves before it is rounded, to make up for the difference of
            its inputs to the original model's (`quantize.error_propagation`); 0 by default.
        iterations: of "autoround", 200 by default.
        start: of "autoround": where it begins, at "rtn" as in its paper, or at "gptq", which is never left for worse.
        bias_correction: the mean error of the outputs on the data goes into the bias, where a layer has one.
        outliers: of LLM.int8: the inputs of a layer whose largest magnitude on the data is more than so many times the
            median over its inputs, 4 for one, are multiplied in floating point (`nn.OutlierLinear`).
        attention: "int8" or "int12", the bits of Q, K and V; "auto" is what the processor runs fastest
            (`ops.quantized_attention`). `torch.nn.MultiheadAttention`, `tcompress.nn.MultiHeadAttention` and the
            attention of `transformers` models are meant; the first one's projections become linear layers of their own
            ("….q_proj", k_proj, v_proj, out_proj), which steps with a scheme may target.
        targets, ignore: as in `Step`. "*", all of them, is the default for attention.
        min_cosine: for attention. Where the output's cosine to floating point on the data is lower, the layer stays in
            floating point; -1 keeps all. By default `MIN_COSINE`.
    """

    step: Literal["quantize"] = "quantize"
    attention: Literal["int8", "int12"] | None = None
    scheme: Scheme | None = Field(None, validate_default=True)
    targets: tuple[str, ...] = ()  # both have defaults by the kind of step: _DEFAULTS
    ignore: tuple[str, ...] = ()
    observer: ObserverName | None = None
    algorithm: Literal["rtn", "hqq", "gptq", "autoround"] | None = None
    range: Literal["minmax", "percentile", "mse"] | None = None
    sweeps: int | None = Field(None, ge=0)
    propagation: float | None = Field(None, ge=0, le=1)
    iterations: int | None = Field(None, ge=1)
    start: Literal["rtn", "gptq"] | None = None
    bias_correction: bool | None = None
    outliers: float | None = Field(None, gt=0)
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
        options = _OPTIONS.get(str(content.get("algorithm")), {})
        return content | {name: value for name, value in options.items() if content.get(name) is None}

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

    @model_validator(mode="after")
    def _of_algorithm(self) -> Quantize:
        options = _OPTIONS.get(self.algorithm or "", {})
        for name in ("range", "sweeps", "propagation", "iterations", "start"):
            if getattr(self, name) is not None and name not in options:
                named = self.algorithm or "attention"
                raise ValueError(f"got {name} with {named}, expected only {sorted(options) or 'no options'} with it")
        if (self.bias_correction or self.outliers is not None) and self.algorithm in (None, "autoround"):
            named = self.algorithm or "attention"
            raise ValueError(f"got {named} with bias_correction or outliers, expected rtn, hqq or gptq with these")
        return self

    @model_validator(mode="after")
    def _of_static(self) -> Quantize:
        static = self.scheme is not None and self.scheme.static
        if self.observer is not None and not static:
            named = "attention" if self.scheme is None else self.scheme.name
            raise ValueError(f"got observer with {named}, expected it with a static scheme only (W8A8-static)")
        if static and self.observer is None:
            object.__setattr__(self, "observer", "mse")  # frozen
        return self

    @field_validator("min_cosine")
    @classmethod
    def _of_attention(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("scheme") is not None:
            raise ValueError(f"got {value}, expected it in a step with attention only")
        return value

    @property
    def needs_data(self) -> bool:
        """Whether it decides by the inputs of layers."""
        return self.algorithm in ("gptq", "autoround") or bool(self.bias_correction) or self.outliers is not None

    @property
    def attention_bits(self) -> Literal[8, 12] | None:
        """Bits of an attention step, or None."""
        return None if self.attention is None else 8 if self.attention == "int8" else 12
