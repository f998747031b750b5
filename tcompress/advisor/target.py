"""What the compressed model has to keep to."""

from __future__ import annotations

import math
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tcompress.errors import message

_BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


class Target(BaseModel):
    """Limits; None where there is none.

    Attributes:
        disk: bytes of the checkpoint; "25 MB" and the like are read too.
        memory: bytes of parameters, buffers and kernel layouts.
        latency: seconds a call on the first batch of the data; "8 ms" is read too.
        speedup: at least so many times as fast as the model as it is, on the same batch.
        metric: a value that the metric must reach.
        max_loss: by how much the metric may get worse, relative to that of the model as it is; 0.01 is one percent.
            Without a metric of the user's it is 1 - cosine of the outputs that may be lost.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    disk: float | None = Field(None, gt=0)
    memory: float | None = Field(None, gt=0)
    latency: float | None = Field(None, gt=0)
    speedup: float | None = Field(None, gt=0)
    metric: float | None = None
    max_loss: float | None = Field(None, ge=0)

    @field_validator("disk", "memory", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return _with_unit(value, _BYTES)

    @field_validator("latency", mode="before")
    @classmethod
    def _seconds(cls, value: Any) -> Any:
        return _with_unit(value, _SECONDS)

    @classmethod
    def load(cls, target: Target | dict[str, Any] | None) -> Target:
        """A target from a dict, or the target itself.

        Raises:
            ValueError: an unknown limit or unit, or a value that is no limit. TypeError: neither.
        """
        if isinstance(target, Target):
            return target
        if not isinstance(target, dict | None):
            raise TypeError(message("advise", "target", type(target).__name__, "a Target or a dict"))
        try:
            return cls.model_validate(target or {})
        except ValidationError as error:
            first = error.errors()[0]
            expected = f"one of {', '.join(cls.model_fields)}" if first["type"] == "extra_forbidden" else first["msg"]
            raise ValueError(message("advise", f"target.{first['loc'][0]}", repr(first["input"]), expected)) from error


def _with_unit(value: Any, units: dict[str, float]) -> Any:
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zµ]*)\s*", value.lower())
    unit = units.get(found[2] or next(k for k, v in units.items() if v == 1)) if found else None
    try:
        number = math.nan if found is None else float(found[1])
    except ValueError:
        number = math.nan
    if unit is None or math.isnan(number):
        raise ValueError(f"a number with one of {', '.join(units)}")
    return number * unit
