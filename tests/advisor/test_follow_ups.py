from __future__ import annotations

import importlib.util

import pytest
import torch
from test_advise import advise, model

from tcompress.advisor import Target, follow_ups
from tcompress.advisor.advice import Measured
from tcompress.recipe import Finetune, Recipe, Shrink, Smooth

INT8 = Recipe.load("int8")
GPTQ = Recipe.load({"steps": [{"scheme": "W4A8-g32", "algorithm": "gptq"}]})


def row(name, recipe, loss=0.0, speedup=2.0):
    return Measured(
        name=name, recipe=recipe, disk=1, memory=1, seconds=1.0, speedup=speedup, quality=1 - loss, loss=loss
    )


def tried(rows, target, seconds=None, logits=True):
    found, notes = follow_ups.follow_ups(rows, Target.load(target), True, seconds, logits)
    return {candidate.name: candidate.recipe.steps for candidate in found}, notes


def test_what_is_inaccurate_is_smoothed_or_trained():
    rows = [row("int8", INT8, 0.02), row("int4 gptq", GPTQ, 0.02)]
    found, notes = tried(rows, {"max_loss": 0.01})
    assert list(found) == ["smooth + int8", "int4 gptq + finetune"]
    assert notes == []
    first, *rest = found["smooth + int8"]
    assert isinstance(first, Smooth)
    assert tuple(rest) == INT8.steps
    *rest, last = found["int4 gptq + finetune"]
    assert isinstance(last, Finetune)
    assert tuple(rest) == GPTQ.steps
    assert (last.steps, last.losses[0].loss) == (100, "logits")
    assert tried(rows, {"max_loss": 0.03}) == ({}, [])
    assert tried(rows, {}) == ({}, [])
    assert tried([row("W4A16-g64", GPTQ, 0.02)], {"max_loss": 0.01}) == ({}, [])


def test_nothing_is_made_more_accurate_that_misses_another_limit():
    found, _ = tried([row("int8", INT8, 0.02, speedup=1.5)], {"max_loss": 0.01, "speedup": 2})
    assert list(found) == ["fewer channels + int8"]


def test_what_is_slow_gets_narrower():
    found, _ = tried([row("int8", INT8, speedup=1.5)], {"speedup": 2})
    first, *rest = found["fewer channels + int8"]
    assert isinstance(first, Shrink)
    assert (first.structure, first.ratio) == ("channels", 0.25)
    assert tuple(rest) == INT8.steps


@pytest.mark.parametrize(("seconds", "steps"), [(0.1, 100), (0.6, 50), (1.4, 21), (1.6, None)])
def test_training_fits_into_its_time(seconds, steps):
    found, notes = tried([row("int4 gptq", GPTQ, 0.02)], {"max_loss": 0.01}, seconds)
    if steps is None:
        assert found == {}
        assert notes == ["'int4 gptq' was not trained on: 20 steps take over 120 s"]
    else:
        assert found["int4 gptq + finetune"][-1].steps == steps


def test_without_accelerate_it_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found, notes = tried([row("int4 gptq", GPTQ, 0.02)], {"max_loss": 0.01})
    assert found == {}
    assert "tcompress[train]" in notes[0]


def test_what_failed_is_left_alone():
    failed = Measured(name="int8", recipe=INT8, failure="no")
    assert tried([failed], {"max_loss": 0.01, "speedup": 2}) == ({}, [])


def test_they_are_measured_with_the_others():
    torch.manual_seed(0)
    advice = advise(model(), [torch.randn(200, 64) for _ in range(6)], target={"max_loss": 1e-7})
    names = {r.name: r for r in advice.rows}
    assert {"smooth + int8", "int4 gptq + finetune"} <= set(names)
    trained = names["int4 gptq + finetune"]
    assert trained.failure is None
    assert trained.disk == names["int4 gptq"].disk
    assert trained.loss < names["int4 gptq"].loss
    assert "Tried because: 100 steps of training" in trained.reason
