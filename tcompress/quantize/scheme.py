"""What a quantization computes: bits, symmetry and granularity of weights and activations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tcompress import backend
from tcompress.errors import message


class PerChannel(BaseModel):
    """One scale per output channel: a weight [N, K] has scales [N]."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["per_channel"] = "per_channel"


class PerToken(BaseModel):
    """One scale per token: activations [..., K] have scales [..., 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["per_token"] = "per_token"


class PerTensor(BaseModel):
    """One scale for all: activations [..., K] have a scale []."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["per_tensor"] = "per_tensor"


class PerGroup(BaseModel):
    """One scale for `size` neighbours along K: a weight [N, K] has scales [N, ceil(K/size)].

    Attributes:
        size: 32, 64, 128, 256 or 512.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["per_group"] = "per_group"
    size: Literal[32, 64, 128, 256, 512] = 128


Granularity = Annotated[PerChannel | PerToken | PerTensor | PerGroup, Field(discriminator="kind")]


class QuantArgs(BaseModel):
    """How one tensor is quantized.

    Attributes:
        bits: 2 to 8. Symmetric integers lie in ±(2^(bits-1) - 1), with up to 4 bits and a searched range
            (`range_search`) also at -2^(bits-1); asymmetric ones in 0 … 2^bits - 1.
        symmetric: without a zero point.
        granularity: what shares a scale.
        dynamic: the scale is computed from each input, not fixed in advance by calibration data.
        scale_dtype: type in which scales are stored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    bits: int = Field(8, ge=2, le=8)
    symmetric: bool = True
    granularity: Granularity = PerChannel()
    dynamic: bool = False
    scale_dtype: Literal["float16", "float32"] = "float32"

    @property
    def group_size(self) -> int | None:
        """Weights that share a scale along K, or None where all of K does."""
        return self.granularity.size if isinstance(self.granularity, PerGroup) else None


class Scheme(BaseModel):
    """Weights and activations together. `activations=None` is weight-only: activations stay in floating point.

    Written W8A8, W8A7, W4A8-g32 … : bits of the weights, bits of the activations, weights that share a scale; "-asym"
    where the weights have zero points; "-static" where the activations of a layer have one scale, fixed by calibration
    data (`input_scales`), and not one a token. By name, 8-bit activations are symmetric and
    7-bit ones asymmetric: on processors without a wide dot product, 7 unsigned bits are what an exact multiply-add of
    bytes can take, and a zero point gives the lost bit back where activations are one-sided.

    Raises:
        ValueError: a combination that no kernel and no reference computes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    weights: QuantArgs
    activations: QuantArgs | None = None

    @model_validator(mode="after")
    def _computable(self) -> Scheme:
        w, a = self.weights, self.activations
        if w.dynamic or w.granularity.kind in ("per_token", "per_tensor"):
            raise ValueError(message("Scheme", "weights", w, "static, per channel or per group"))
        if w.bits > 4 and (not w.symmetric or w.granularity.kind != "per_channel" or w.scale_dtype != "float32"):
            hint = "groups, zero points and float16 scales need 4 bits or fewer"
            raise ValueError(message("Scheme", "weights", w, "symmetric, per channel, float32 scales", hint))
        if a is None:
            return self
        if (a.dynamic, a.granularity.kind) not in ((True, "per_token"), (False, "per_tensor")):
            raise ValueError(message("Scheme", "activations", a, "dynamic, per token, or static, per tensor"))
        if not a.dynamic and w.bits <= 4:
            hint = "no kernel multiplies weights of 4 bits or fewer with activations that have one scale"
            raise ValueError(message("Scheme", "activations", "static", "dynamic, per token", hint))
        if not a.symmetric and a.bits > 7:
            hint = "asymmetric activations need 7 bits or fewer to be exact on every processor"
            raise ValueError(message("Scheme", "activations.bits", a.bits, "at most 7", hint))
        return self

    @property
    def name(self) -> str:
        """W8A8 and so on; an activation that is not quantized is written A16, as usual in the field."""
        text = f"W{self.weights.bits}A{self.activations.bits if self.activations else 16}"
        text += f"-g{self.weights.group_size}" if self.weights.group_size else ""
        text += "" if self.weights.symmetric else "-asym"
        return f"{text}-static" if self.static else text

    @property
    def static(self) -> bool:
        """Whether activations are quantized by a scale that calibration data fix."""
        return self.activations is not None and not self.activations.dynamic

    def with_dynamic_activations(self) -> Scheme:
        """The same with a scale for each token."""
        if self.activations is None:
            return self
        activations = self.activations.model_copy(update={"dynamic": True, "granularity": PerToken()})
        return Scheme(weights=self.weights, activations=activations)

    @classmethod
    def named(cls, name: str) -> Scheme:
        """The scheme called `name`, or for "int8" and "int8-static" the one that suits this machine (`int8_scheme`).

        Raises:
            ValueError: an unknown name.
        """
        if name == "int8":
            return int8_scheme()
        if name == "int8-static":
            return SCHEMES[f"{int8_scheme().name}-static"]
        if name not in SCHEMES:
            raise ValueError(message("Scheme", "name", repr(name), f"one of {sorted(SCHEMES)}"))
        return SCHEMES[name]


def _weights(bits: int) -> QuantArgs:
    return QuantArgs(bits=bits, symmetric=True, granularity=PerChannel())


def _activations(bits: int, symmetric: bool, static: bool = False) -> QuantArgs:
    granularity: Granularity = PerTensor() if static else PerToken()
    return QuantArgs(bits=bits, symmetric=symmetric, granularity=granularity, dynamic=not static)


_A8, _A7 = _activations(8, symmetric=True), _activations(7, symmetric=False)


def _static_schemes() -> Iterator[Scheme]:
    for w, a, symmetric in ((8, 8, True), (8, 7, False), (7, 7, False), (6, 7, False)):
        yield Scheme(weights=_weights(w), activations=_activations(a, symmetric, static=True))


def _int4_schemes() -> Iterator[Scheme]:
    granularities: tuple[Granularity, ...] = (PerChannel(), PerGroup(size=32), PerGroup(size=64), PerGroup(size=128))
    for granularity in granularities:
        for symmetric in (True, False):
            scale_dtype: Literal["float16", "float32"] = "float16" if granularity.kind == "per_group" else "float32"
            w = QuantArgs(bits=4, symmetric=symmetric, granularity=granularity, scale_dtype=scale_dtype)
            for a in (_A8, _A7, None):
                yield Scheme(weights=w, activations=a)


#: Schemes by name.
SCHEMES: dict[str, Scheme] = {
    "W8A8": Scheme(weights=_weights(8), activations=_A8),
    "W8A7": Scheme(weights=_weights(8), activations=_A7),
    "W7A7": Scheme(weights=_weights(7), activations=_A7),
    "W6A7": Scheme(weights=_weights(6), activations=_A7),
    "W8A16": Scheme(weights=_weights(8)),
} | {scheme.name: scheme for scheme in (*_static_schemes(), *_int4_schemes())}


def int8_scheme() -> Scheme:
    """The 8-bit scheme that is fastest here at its accuracy.

    W8A8 where the processor multiplies bytes exactly in one instruction (VNNI, AMX, the dot product of ARM) and on
    other devices; W7A7, which sums in 16 bits (docs/design/002), on a CPU without. The result is a scheme like any
    other: it is what a recipe and a checkpoint record, and it computes the same numbers on every machine.
    """
    return SCHEMES["W7A7" if backend.cpu_path() in ("scalar", "avx2") else "W8A8"]
