"""Which modules a step means, and the reasons for leaving some."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import tcompress
from tcompress.match import match
from tcompress.recipe import Recipe


def _recipe(scheme: str = "W8A8", **fields: object) -> Recipe:
    return Recipe.load({"steps": [{"step": "quantize", "scheme": scheme, **fields}]})


def _model() -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(OrderedDict(query=nn.Linear(8, 8), dense=nn.Linear(8, 8), norm=nn.LayerNorm(8)))

    layers = nn.ModuleList([block(), block()])
    return nn.ModuleDict({"embed": nn.Embedding(10, 8), "layers": layers, "lm_head": nn.Linear(8, 10)})


def _names(model: nn.Module, recipe: Recipe) -> set[str]:
    return {m.names[0] for m in match(model, recipe)[0]}


ALL = {f"layers.{i}.{part}" for i in (0, 1) for part in ("query", "dense")}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["Linear"], ALL),
        ("Linear", ALL),
        (["query"], {"layers.0.query", "layers.1.query"}),
        (["layers.0.*"], {"layers.0.query", "layers.0.dense"}),
        (["layers.?.dense"], {"layers.0.dense", "layers.1.dense"}),
        (["re:layers\\.[1-9]\\."], {"layers.1.query", "layers.1.dense"}),
        (["re:.*(query|dense)$"], ALL),
        (["layers.1.dense", "query"], {"layers.0.query", "layers.1.query", "layers.1.dense"}),
        (["Module"], ALL),
    ],
)
def test_targets(targets, expected):
    assert _names(_model(), _recipe(targets=targets)) == expected


def test_ignore_says_by_which_pattern():
    recipe = _recipe(targets=["Linear"], ignore=["lm_head", "layers.0.*"])
    matches, skips = match(_model(), recipe)
    assert {m.names[0] for m in matches} == {"layers.1.query", "layers.1.dense"}
    assert {s.names[0]: s.reason for s in skips} == {
        "layers.0.query": "ignored by 'layers.0.*'",
        "layers.0.dense": "ignored by 'layers.0.*'",
        "lm_head": "ignored by 'lm_head'",
    }


def test_the_head_is_a_target_where_nothing_ignores_it():
    assert "lm_head" in _names(_model(), _recipe(ignore=[]))


def test_first_step_that_can_takes_a_module():
    steps = [
        {"step": "quantize", "scheme": "W8A8", "targets": ["query"]},
        {"step": "quantize", "scheme": "W7A7", "targets": ["Linear"]},
    ]
    matches, _ = match(_model(), Recipe.load({"steps": steps}))
    schemes = {m.names[0]: m.step.scheme.name for m in matches}
    assert schemes == {n: "W8A8" if n.endswith("query") else "W7A7" for n in ALL}


class _Lora(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class _Halved(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w / 2


def _parametrized() -> nn.Module:
    linear = nn.Linear(4, 4)
    parametrize.register_parametrization(linear, "weight", _Halved())
    return linear


def _hooked() -> nn.Module:
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda *args: None)
    return linear


def _hooked_before() -> nn.Module:
    linear = nn.Linear(4, 4)
    linear.register_forward_pre_hook(lambda *args: None)
    return linear


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (_Lora(4, 4), "forward of its own"),
        (_parametrized(), "parametrized"),
        (nn.utils.spectral_norm(nn.Linear(4, 4)), "hooks"),
        (_hooked(), "hooks"),
        (_hooked_before(), "hooks"),
        (prune.l1_unstructured(_hooked_before(), "weight", 0.5), "hooks"),
        (prune.l1_unstructured(nn.Linear(4, 4), "bias", 0.5), "hooks"),
        (nn.Linear(4, 4, device="meta"), "meta device"),
        (nn.Linear(4, 4, dtype=torch.float64), "float64"),
        (nn.Linear(0, 4), "empty"),
        (nn.Linear(65537, 1), "65537"),
        (nn.MultiheadAttention(4, 2).out_proj, "MultiheadAttention reads its weight"),
    ],
)
def test_reasons_for_linear_layers(module, reason):
    model = nn.ModuleDict({"odd": module, "plain": nn.Linear(4, 4)})
    matches, skips = match(model, _recipe())
    assert [m.names[0] for m in matches] == ["plain"]
    assert [s.names[0] for s in skips] == ["odd"]
    assert reason in skips[0].reason


@pytest.mark.parametrize("step", [{"step": "sparse"}, {"step": "quantize", "scheme": "W8A8"}])
@pytest.mark.parametrize("times", [1, 2])
def test_the_hooks_of_torch_prune_are_no_obstacle(step, times):
    """The product of weight and mask is the weight, whatever `module.weight` was left at."""
    linear = nn.Linear(4, 4)
    for _ in range(times):
        prune.l1_unstructured(linear, "weight", 0.5)
    with torch.no_grad():
        linear.weight_orig.mul_(3)
    (found,), skips = match(nn.Sequential(linear), Recipe.load({"steps": [step]}))
    assert not skips
    assert torch.equal(found.weight, linear.weight_orig * linear.weight_mask)


def test_long_rows_are_too_long_for_integers_only():
    model = nn.Sequential(nn.Linear(65537, 1, bias=False))
    nn.init.zeros_(model[0].weight)
    assert len(match(model, Recipe.load({"steps": [{"step": "sparse"}]}))[0]) == 1
    with pytest.raises(ValueError, match="65537"):
        match(model, Recipe.load({"steps": [{"step": "sparse", "scheme": "W8A8"}]}))


def test_reasons_for_embeddings():
    model = nn.ModuleDict(
        {"norm": nn.Embedding(4, 4, max_norm=1.0), "thin": nn.Embedding(4, 1), "e": nn.Embedding(4, 4)}
    )
    matches, skips = match(model, _recipe("W8A16", targets=["Embedding"]))
    assert [m.names[0] for m in matches] == ["e"]
    reasons = {s.names[0]: s.reason for s in skips}
    assert "max_norm" in reasons["norm"]
    assert "smaller" in reasons["thin"]


@pytest.mark.parametrize(("scheme", "target"), [("W8A16", "Linear"), ("W8A8", "Embedding")])
def test_schemes_that_do_not_fit_the_kind_of_module(scheme, target):
    with pytest.raises(ValueError, match=f"{scheme} .*floating point|{scheme} quantizes activations"):
        match(_model(), _recipe(scheme, targets=[target]))


def test_conv_by_name_has_no_quantized_form():
    model = nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1), "fc": nn.Linear(4, 4)})
    _, skips = match(model, _recipe(targets=["conv", "fc"]))
    assert [(s.names[0], s.reason) for s in skips] == [("conv", "Conv2d has no quantized form")]


def test_tied_weights():
    model = _model()
    model["lm_head"].weight = model["embed"].weight
    with pytest.raises(ValueError, match="lm_head.weight, which stays"):
        match(model, _recipe("W8A16", targets=["Embedding"]))


def test_shared_module_is_one_match_with_all_names():
    shared = nn.Linear(4, 4)
    matches, _ = match(nn.ModuleDict({"a": shared, "b": shared}), _recipe())
    assert [m.names for m in matches] == [("a", "b")]


def test_nothing_matched_names_what_there_is():
    with pytest.raises(ValueError, match="compress: recipe: got .*Conv9.* match nothing.*Embedding, LayerNorm, Linear"):
        match(_model(), _recipe(targets=["Conv9"]))


def test_already_compressed():
    compressed = tcompress.compress(_model(), _recipe(ignore=[])).model
    with pytest.raises(ValueError, match="already compressed"):
        match(compressed, _recipe())


def test_partly_compressed():
    once = tcompress.compress(_model(), _recipe(targets=["query"])).model
    matches, skips = match(once, _recipe())
    assert {m.names[0] for m in matches} == {"layers.0.dense", "layers.1.dense"}
    assert {s.reason for s in skips} == {"already compressed", "ignored by 'lm_head'"}


def test_bad_regular_expression():
    with pytest.raises(ValueError, match="match: pattern: got .*expected a regular expression"):
        match(_model(), _recipe(targets=["re:("]))
