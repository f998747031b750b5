"""Structured pruning through the front door, on models of transformers."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import tcompress
from tcompress.errors import CompressionWarning

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
from tiny_models import bert, gpt2, ids, llama, made, t5


def shrink(model, data, *more, **step):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        return tcompress.compress(model, {"steps": [{"step": "shrink", **step}, *more]}, data)


def round_trip(model, data, tmp_path):
    loaded = tcompress.load(tcompress.save(model, tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(**data)[0], model(**data)[0])
    assert loaded.state_dict().keys() == model.state_dict().keys()
    return loaded


DATA = {"input_ids": ids(4, 16)}
MODELS = {"llama": llama, "bert": bert, "gpt2": gpt2}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("structure", "least"), [("heads", 0.6), ("channels", 0.99)])
def test_narrower(name, structure, least, tmp_path):
    model = made(MODELS[name])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = shrink(model, DATA, structure=structure, ratio=0.5 if structure == "heads" else 0.25)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert result.report.skipped == ()
    assert result.report.output_cosine > least
    assert result.report.after.disk < 0.95 * result.report.before.disk
    sizes = {tuple(m.weight.shape) for m in result.model.modules() if isinstance(m, nn.Linear)}
    assert name == "gpt2" or any(side in (72, 32) for size in sizes for side in size)
    round_trip(result.model, DATA, tmp_path)


def test_the_configuration_says_what_it_can(tmp_path):
    model = made(llama)
    heads = shrink(model, DATA, structure="heads", ratio=0.5).model
    assert (heads.config.num_attention_heads, heads.config.num_key_value_heads) == (2, 1)
    assert heads.model.layers[0].self_attn.num_key_value_groups == 2
    channels = shrink(heads, DATA, structure="channels", ratio=0.25).model
    assert channels.config.intermediate_size == 72
    short = shrink(channels, DATA, structure="layers", ratio=0.5).model
    assert short.config.num_hidden_layers == 1
    short.save_pretrained(tmp_path / "hf")  # as any other model of its class
    again = type(short).from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        assert torch.equal(again(**DATA)[0], short(**DATA)[0])
    assert (model.config.num_attention_heads, model.config.num_hidden_layers) == (4, 2)


def test_an_encoder_whose_configuration_cannot_say_it():
    result = shrink(made(bert), DATA, structure="heads", ratio=0.5).model
    attention = result.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.query.out_features) == (2, 32)
    assert result.config.num_attention_heads == 4


@pytest.mark.parametrize("factory", [llama, gpt2])
def test_layers_go_and_the_cache_still_works(factory, tmp_path):
    name = {"llama": "num_hidden_layers", "gpt2": "n_layer"}[factory.__name__]
    model = made(factory, **{name: 5})
    result = shrink(model, DATA, structure="layers", ratio=0.4)
    assert [x.action for x in result.report.compressed] == ["removed"] * 2
    loaded = round_trip(result.model, DATA, tmp_path)
    for m in (result.model, loaded):
        prompt = ids(1, 6)
        cached = m.generate(prompt, max_new_tokens=5, do_sample=False)
        plain = m.generate(prompt, max_new_tokens=5, do_sample=False, use_cache=False)
        assert torch.equal(cached, plain)


def test_the_layers_of_least_influence_go():
    model = made(bert, num_hidden_layers=4)
    with torch.no_grad():
        layer = model.encoder.layer[2]  # made to do next to nothing
        for linear in (layer.attention.output.dense, layer.output.dense):
            linear.weight.mul_(1e-3)
            linear.bias.zero_()
    result = shrink(model, DATA, structure="layers", ratio=0.25)
    assert [x.name for x in result.report.compressed] == ["encoder.layer.2"]
    assert result.report.output_cosine > 0.999


def test_a_layer_that_others_need_stays():
    model = made(t5, num_layers=4)
    data = {"input_ids": ids(), "decoder_input_ids": ids(seed=3)}
    result = shrink(model, data, structure="layers", ratio=0.75)
    gone = {x.name for x in result.report.compressed}
    assert gone == {f"{side}.block.{i}" for side in ("encoder", "decoder") for i in (1, 2, 3)}
    assert result.model(**data).logits.isfinite().all()


def test_repair_and_importance_help():
    torch.manual_seed(0)
    data = [{"input_ids": ids(4, 32, seed=s)} for s in range(2)]
    cosine = {
        (importance, repair): shrink(
            made(bert), data, structure="channels", ratio=0.5, importance=importance, repair=repair
        ).report.output_cosine
        for importance in ("activation", "weight", "taylor")
        for repair in (True, False)
    }
    assert all(cosine[name, True] > cosine[name, False] for name in ("activation", "weight", "taylor"))
    assert cosine["activation", False] > cosine["weight", False] - 1e-3


def test_over_the_whole_model():
    model = made(bert, num_hidden_layers=3)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight.mul_(0.05)  # its channels matter least
    result = shrink(model, DATA, structure="channels", ratio=0.5, scope="model", multiple=8)
    left = [layer.intermediate.dense.out_features for layer in result.model.encoder.layer]
    assert left[1] == min(left) < 48 < max(left)
    assert all(n % 8 == 0 for n in left)


def test_together_with_quantization(tmp_path):
    w8a8 = {"step": "quantize", "scheme": "W8A8"}
    for step in ({"structure": "channels", "ratio": 0.25}, {"structure": "heads", "ratio": 0.5}):
        result = shrink(made(bert), DATA, w8a8, **step)
        assert result.report.after.disk < 0.6 * result.report.before.disk
        round_trip(result.model, DATA, tmp_path)


def test_a_model_of_ones_own(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4)).eval()

    x = torch.randn(64, 8)
    result = shrink(make(), x, structure="channels", ratio=0.5)
    assert result.model[0].weight.shape == (12, 8)
    tcompress.save(result.model, tmp_path)
    loaded = tcompress.load(tmp_path, make())
    assert torch.equal(loaded(x), result.model(x))
    wrong = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Tanh()).eval()
    with pytest.raises(ValueError, match="got Tanh|is it the architecture|does not fit"):
        tcompress.load(tmp_path, wrong)
    assert wrong[0].weight.shape == (24, 8)
    assert wrong[0].out_features == 24


def test_what_is_not_understood_is_reported():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b, self.c = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.c(torch.relu(self.b(self.norm(self.a(x)))))

    result = shrink(Mixed().eval(), torch.randn(6, 8), structure="channels", ratio=0.5)
    assert {x.name for x in result.report.compressed} == {"b", "c"}
    assert {x.name: x.reason for x in result.report.skipped} == {
        "a": "each of its outputs reaches every input of the next linear layer"
    }


def test_targets_and_too_little():
    result = shrink(made(bert), DATA, structure="channels", ratio=0.25, targets=["re:encoder.layer.0.*"])
    assert {x.name for x in result.report.compressed} == {
        "encoder.layer.0.intermediate.dense",
        "encoder.layer.0.output.dense",
    }
    nothing = shrink(made(llama), DATA, structure="heads", ratio=0.25)
    assert nothing.report.compressed == ()
    assert "25% of 2 heads is none" in nothing.report.skipped[0].reason
    assert any("nothing was removed" in w for w in nothing.report.warnings)


def test_needs_data():
    with pytest.raises(ValueError, match="data: got none"):
        shrink(made(bert), None, structure="channels", ratio=0.5)


@pytest.mark.parametrize(
    "step",
    [
        {"structure": "rows", "ratio": 0.5},
        {"structure": "heads", "ratio": 1.0},
        {"structure": "heads", "ratio": 0.5, "importance": "cosine"},
        {"structure": "layers", "ratio": 0.5, "importance": "taylor"},
    ],
)
def test_steps_that_make_no_sense(step):
    with pytest.raises(ValueError, match="got .*expected"):
        shrink(made(bert), DATA, **step)
