"""Recipes that are tried after the first ones, for what those lacked."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from tcompress.advisor.advice import Measured, misses, misses_in_quality
from tcompress.advisor.candidates import Candidate
from tcompress.advisor.target import Target
from tcompress.expected_training import PASSES
from tcompress.recipe import Recipe

#: Seconds that a candidate may train for, and the fewest and most steps of it that are worth a try.
_TRAINING_SECONDS, _FEWEST_STEPS, _MOST_STEPS = 120.0, 20, 100
#: Which part of a feed-forward network's channels goes for speed.
_CHANNELS = 0.25

Step = dict[str, Any]


def follow_ups(
    tried: Sequence[Measured], target: Target, maximize: bool, seconds: float | None, logits: bool
) -> tuple[list[Candidate], list[str]]:
    """What may keep to a limit that an earlier recipe missed; all of it decides by data.

    Args:
        tried: what was measured.
        maximize: as for `advise`.
        seconds: of the model as it is on one batch, where that is known.
        logits: whether its outputs are those of a head over a vocabulary; else they are embeddings.

    Returns:
        The candidates, and what was not tried, with the reason.
    """
    rows = {row.name: row for row in tried if row.failure is None and row.recipe is not None}
    inaccurate = {
        name for name, row in rows.items() if misses_in_quality(row, target, maximize) and not misses(row, target)
    }
    found, notes = [], []
    if "int8" in inaccurate:
        why = "eight bits suffer from inputs that are much larger than others: some of that goes over to the weights"
        found.append(Candidate("smooth + int8", _extended(rows["int8"], {"step": "smooth", "alpha": "auto"}), why))
    if "int4 gptq" in inaccurate:
        steps = _MOST_STEPS if not seconds else int(min(_TRAINING_SECONDS / (PASSES * seconds), _MOST_STEPS))
        if importlib.util.find_spec("accelerate") is None:
            notes.append("'int4 gptq' was not trained on: that needs tcompress[train]")
        elif steps < _FEWEST_STEPS:
            notes.append(f"'int4 gptq' was not trained on: {_FEWEST_STEPS} steps take over {_TRAINING_SECONDS:.0f} s")
        else:
            train = {"step": "finetune", "steps": steps, "losses": ["logits" if logits else "cosine"]}
            why = f"{steps} steps of training, so that layers make up for one another"
            found.append(Candidate("int4 gptq + finetune", _extended(rows["int4 gptq"], after=train), why))
    if "int8" in rows and any("as fast" in missed for missed in misses(rows["int8"], target)):
        narrow = {"step": "shrink", "structure": "channels", "ratio": _CHANNELS, "multiple": 16}
        why = f"{1 - _CHANNELS:.0%} of the feed-forward networks' channels, those that matter most"
        found.append(Candidate("fewer channels + int8", _extended(rows["int8"], narrow), why))
    return found, notes


def _extended(row: Measured, before: Step | None = None, after: Step | None = None) -> Recipe:
    """A recipe with a step more."""
    assert row.recipe is not None
    content = row.recipe.model_dump(mode="json", exclude_none=True)
    more = [[] if step is None else [step] for step in (before, after)]
    return Recipe.load({**content, "steps": [*more[0], *content["steps"], *more[1]]})
