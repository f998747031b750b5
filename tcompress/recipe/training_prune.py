"""Pruning that goes on while the model is trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from tcompress.packing.sparse_pattern import Pattern


class TrainingPrune(BaseModel):
    """Which weights go in the course of a training, and how they are found; frozen.

    Attributes:
        method: "magnitude": the smallest, more and more of them (`distill.gradual`); "movement": those that training
            moves towards zero (`distill.movement`); "admm": those that a penalty has drawn to zero (`distill.admm`).
        pattern, sparsity: as in `recipe.Prune`. The sparsity is that at the end.
        begin, end: the part of the steps at which pruning begins and ends; after it the zeros stay where they are.
        every: steps between two changes of a mask, or two updates of the multipliers of ADMM.
        lr: of movement's scores, which stays; a learning rate of weights would be too small for them.
        rho: of ADMM, the penalty's factor.
        targets, ignore: as in `recipe.Step`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    method: Literal["magnitude", "movement", "admm"] = "magnitude"
    pattern: str = "8x4"
    sparsity: float | None = Field(None, ge=0, le=1, validate_default=True)
    begin: float = Field(0.0, ge=0, lt=1)
    end: float = Field(0.7, gt=0, le=1)
    every: int = Field(10, ge=1)
    lr: float = Field(1e-2, gt=0)
    rho: float = Field(1e-2, gt=0)
    targets: tuple[str, ...] = ("Linear", "Conv1D")
    ignore: tuple[str, ...] = ("lm_head",)

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("pattern")
    @classmethod
    def _parsed(cls, value: str) -> str:
        return str(Pattern.parse(value))

    @field_validator("sparsity")
    @classmethod
    def _how_much(cls, value: float | None, info: ValidationInfo) -> float | None:
        if "pattern" not in info.data:
            return value
        pattern = Pattern.parse(info.data["pattern"])
        n, m = pattern.size
        if pattern.kind == "n_m":
            if value is not None and abs(value - (1 - n / m)) > 1e-9:
                raise ValueError(f"got {value}, expected {1 - n / m} or nothing for {pattern}")
        elif value is None:
            raise ValueError(f"got nothing, expected 0 to 1 for {pattern}")
        return value

    @field_validator("end")
    @classmethod
    def _after_begin(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("begin", 0):
            raise ValueError(f"got {value}, expected more than begin, {info.data['begin']}")
        return value
