"""The terms of what a `Distill` step minimises; `tcompress.distill` computes them, one a file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag


class Loss(BaseModel):
    """One term; frozen.

    Attributes:
        loss: which kind, in YAML and JSON.
        weight: its factor in the sum.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    loss: str
    weight: float = Field(1.0, gt=0)


class LogitsLoss(Loss):
    """The teacher's probabilities, softened (`distill.logits`).

    Attributes:
        temperature: T; above 1 it shows more of how the teacher ranks the wrong answers.
    """

    loss: Literal["logits"] = "logits"
    temperature: float = Field(2.0, gt=0)


class LabelsLoss(Loss):
    """Cross-entropy of the student's logits with the batch's "labels" (`distill.labels`); -100 is left out, as usual.

    Attributes:
        causal: the logits at a token are for the label at the next one, as in language models.
    """

    loss: Literal["labels"] = "labels"
    causal: bool = False


class HiddenLoss(Loss):
    """What the blocks return (`distill.hidden`).

    Attributes:
        relative: divide by the mean square of what the teacher's block returns.
    """

    loss: Literal["hidden"] = "hidden"
    relative: bool = True


class AttentionLoss(Loss):
    """Attention scores of all blocks (`distill.attention_maps`); as many heads in both models."""

    loss: Literal["attention"] = "attention"


class RelationsLoss(Loss):
    """MiniLM's relations (`distill.relations`).

    Attributes:
        kinds: "qq", "kk", "vv", "qk".
        heads: relation heads; None for the teacher's attention heads.
        teacher_layer: which of the teacher's blocks, from 0 or from the end.
    """

    loss: Literal["relations"] = "relations"
    kinds: tuple[Literal["qq", "kk", "vv", "qk"], ...] = Field(("qq", "kk", "vv"), min_length=1)
    heads: int | None = Field(None, ge=1)
    teacher_layer: int = -1


class CosineLoss(Loss):
    """1 - the cosine of the outputs (`distill.cosine`).

    Attributes:
        pooled: of their means over the tokens, which is what a sentence encoder is asked for.
    """

    loss: Literal["cosine"] = "cosine"
    pooled: bool = False


#: The kinds of losses, in the order of the documentation.
LOSSES: tuple[type[Loss], ...] = (LogitsLoss, LabelsLoss, HiddenLoss, AttentionLoss, RelationsLoss, CosineLoss)


def _kind(value: Any) -> str | None:
    if isinstance(value, Loss):
        return value.loss
    return str(value.get("loss")) if isinstance(value, dict) else None


def _named(value: Any) -> Any:
    """A bare name stands for a loss with its defaults."""
    return {"loss": value} if isinstance(value, str) else value


#: Any loss; a new kind stands here and in `LOSSES`.
AnyLoss = Annotated[
    Annotated[LogitsLoss, Tag("logits")]
    | Annotated[LabelsLoss, Tag("labels")]
    | Annotated[HiddenLoss, Tag("hidden")]
    | Annotated[AttentionLoss, Tag("attention")]
    | Annotated[RelationsLoss, Tag("relations")]
    | Annotated[CosineLoss, Tag("cosine")],
    Discriminator(_kind),
    BeforeValidator(_named),
]
