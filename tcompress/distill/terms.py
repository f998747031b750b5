"""All losses, by what a recipe says of them."""

from __future__ import annotations

from typing import Any

from tcompress.distill.attention_maps import AttentionTerm
from tcompress.distill.cosine import CosineTerm
from tcompress.distill.hidden import HiddenTerm
from tcompress.distill.labels import LabelsTerm
from tcompress.distill.logits import LogitsTerm
from tcompress.distill.loss import Term
from tcompress.distill.relations import RelationsTerm
from tcompress.recipe.losses import (
    AttentionLoss,
    CosineLoss,
    HiddenLoss,
    LabelsLoss,
    LogitsLoss,
    Loss,
    RelationsLoss,
)

#: A new kind of loss stands here and in `recipe.losses`.
TERMS: dict[type[Loss], type[Term[Any]]] = {
    LogitsLoss: LogitsTerm,
    LabelsLoss: LabelsTerm,
    HiddenLoss: HiddenTerm,
    AttentionLoss: AttentionTerm,
    RelationsLoss: RelationsTerm,
    CosineLoss: CosineTerm,
}
