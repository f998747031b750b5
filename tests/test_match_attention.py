"""Which attention a step means, and the reasons for leaving some."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.utils import parametrize, prune

import tcompress
from tcompress.match import match
from tcompress.match_attention import holding, match_attention
from tcompress.nn import MultiHeadAttention
from tcompress.recipe import Recipe


def recipe(*steps, **fields):
    return Recipe.load({"steps": list(steps) or [{"attention": "int8", **fields}]})


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)


class OddMultiheadAttention(nn.MultiheadAttention):
    pass


def model():
    return nn.ModuleDict(
        {
            "encoder": nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2)]),
            "ours": MultiHeadAttention(2, 8, 4),
            "head": nn.Linear(8, 8),
        }
    )


ALL = ["encoder.0.self_attn", "encoder.1.self_attn", "ours"]


def found(module, wanted):
    matches, skips = match_attention(module, wanted)
    return [m.names[0] for m in matches], {s.names[0]: s.reason for s in skips}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ALL),
        ({"targets": "MultiheadAttention"}, ALL[:2]),
        ({"targets": "MultiHeadAttention"}, ["ours"]),
        ({"targets": ["encoder.1.*", "ours"]}, ALL[1:]),
        ({"targets": "self_attn"}, ALL[:2]),
        ({"targets": r"re:encoder\.0"}, ALL[:1]),
        ({"targets": "Linear"}, []),
    ],
)
def test_targets(fields, expected):
    assert found(model(), recipe(**fields)) == (expected, {})


def test_ignore_says_by_which_pattern():
    names, reasons = found(model(), recipe(ignore=["encoder.0.*"]))
    assert names == ALL[1:]
    assert reasons == {ALL[0]: "ignored by 'encoder.0.*'"}


def test_the_first_step_keeps_what_it_claims():
    steps = {"attention": "int12", "targets": "ours"}, {"attention": "int8"}
    matches, _ = match_attention(model(), recipe(*steps))
    assert [m.step.attention_bits for m in matches] == [8, 8, 12]


def test_a_recipe_without_an_attention_step():
    assert found(model(), recipe({"scheme": "W8A8"})) == ([], {})


def test_the_kinds():
    matches, _ = match_attention(model(), recipe())
    assert [m.kind for m in matches] == ["torch", "torch", "tcompress"]
    first, last = matches[0], matches[2]
    assert first.converted.attention is first.attention
    assert first.converted.q_proj.weight.data_ptr() == first.module.in_proj_weight.data_ptr()
    assert last.attention is last.module.attention
    assert all(m.attention.precision == "float" for m in matches)


def hooked():
    module = nn.MultiheadAttention(8, 2)
    module.register_forward_hook(lambda *args: None)
    return module


def parametrized():
    module = nn.MultiheadAttention(8, 2)
    parametrize.register_parametrization(module.out_proj, "weight", nn.Identity())
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (OddMultiheadAttention(8, 2), "OddMultiheadAttention is a subclass"),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv"),
        (nn.MultiheadAttention(8, 2, add_zero_attn=True), "add_zero_attn"),
        (nn.MultiheadAttention(514, 2), "head_dim 257 is above 256"),
        (nn.MultiheadAttention(8, 2, dtype=torch.float64), "torch.float64"),
        (nn.MultiheadAttention(8, 2, device="meta"), "meta device"),
        (hooked(), "forward hooks"),
        (prune.l1_unstructured(nn.MultiheadAttention(8, 2), "in_proj_weight", 0.5), "forward hooks"),
        (parametrized(), "parametrized"),
        (MultiHeadAttention(1, 8, 257), "d_head 257 is above 256"),
        (type("Mine", (MultiHeadAttention,), {"forward": lambda self, x: x})(2, 8, 4), "Mine has a forward of its own"),
        (Custom(), None),
        (type("CustomAttention", (Custom,), {})(), "CustomAttention computes its attention itself"),
    ],
)
def test_reasons(module, reason):
    names, reasons = found(nn.ModuleDict({"odd": module, "plain": nn.MultiheadAttention(8, 2)}), recipe())
    assert names == ["plain"]
    assert list(reasons) == (["odd"] if reason else [])
    assert (reason or "") in reasons.get("odd", "")


def test_of_nested_custom_attention_the_innermost_is_named():
    inner = type("SelfAttention", (Custom,), {})()
    outer = nn.Sequential(inner)
    outer.__class__ = type("AttentionBlock", (nn.Sequential,), {})
    assert list(found(nn.ModuleDict({"a": outer}), recipe())[1]) == ["a.0"]


def test_shared_attention_is_one_match():
    shared = nn.MultiheadAttention(8, 2)
    matches, _ = match_attention(nn.ModuleDict({"a": shared, "b": shared}), recipe())
    assert [m.names for m in matches] == [("a", "b")]


def test_projections_become_linear_layers_with_names():
    wanted = recipe({"attention": "int8", "ignore": "encoder.0.*"}, {"scheme": "W8A8", "ignore": ["k_proj", "head"]})
    module = model()
    attention, _ = match_attention(module, wanted)
    matches, skips = match(module, wanted, {m.module: m.converted for m in attention if m.converted is not None})
    names = [m.names[0] for m in matches]
    assert [n for n in names if "self_attn" in n] == [
        f"encoder.1.self_attn.{p}" for p in ("q_proj", "v_proj", "out_proj")
    ]
    reasons = {s.names[0]: s.reason for s in skips}
    assert reasons["encoder.1.self_attn.k_proj"] == "ignored by 'k_proj'"
    assert "a step with attention changes that" in reasons["encoder.0.self_attn.out_proj"]


def test_already_compressed():
    once = tcompress.compress(model(), recipe()).model
    assert found(once, recipe()) == ([], dict.fromkeys(ALL, "already compressed"))
    with pytest.raises(ValueError, match="already compressed"):
        tcompress.compress(once, recipe())
    again = tcompress.compress(once, recipe({"scheme": "W8A8"})).report  # attention first, the layers later
    assert len(again.compressed) == 2 * 6 + 4 + 1


def small_bert(**fields):
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.BertModel(hf.BertConfig(**sizes, intermediate_size=16, **fields))


def test_transformers():
    module = small_bert()
    matches, skips = match_attention(nn.ModuleDict({"bert": module}), recipe())
    assert [m.names[0] for m in matches] == [f"bert.encoder.layer.{i}.attention.self" for i in (0, 1)]
    assert [m.kind for m in matches] == ["transformers"] * 2
    assert not skips
    assert module.config._attn_implementation == "sdpa"
    assert not any("tcompress_attention" in name for name, _ in module.named_modules())


def test_transformers_that_return_weights():
    module = small_bert(output_attentions=True)
    _, reasons = found(module, recipe())
    assert len(reasons) == 2
    assert "output_attentions" in reasons["encoder.layer.0.attention.self"]


def test_attention_functions_that_are_told_more():
    """An attention sink, here, which one function computes for all layers of a model."""
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_local_experts": 2, "head_dim": 8}
    config = hf.GptOssConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    names, reasons = found(hf.GptOssModel(config), recipe())
    assert names == []
    reason = "GptOssAttention passes s_aux to the attention function"
    assert reasons == {f"layers.{i}.self_attn": reason for i in (0, 1)}


def test_heads_that_are_too_wide():
    config = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    module = hf.LlamaModel(hf.LlamaConfig(**config, num_attention_heads=1, num_key_value_heads=1, head_dim=512))
    assert found(module, recipe()) == ([], {"layers.0.self_attn": "its head_dim 512 is above 256"})


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_that_is_attention_itself_becomes_what_would_take_its_place(fails):
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 3, 8)
    expected, before = model(x, x, x)[0], dict(vars(model))
    (match,), _ = match_attention(model, recipe())
    assert match.converted is not None
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext(), holding(model, {model: match.converted}):
        assert model.q_proj is match.converted.q_proj
        assert type(copy.deepcopy(model)) is type(match.converted)
        torch.testing.assert_close(model(x, x, x)[0], expected)
        if fails:
            raise KeyboardInterrupt
    assert type(model) is nn.MultiheadAttention
    assert vars(model) == before
    assert torch.equal(model(x, x, x)[0], expected)
