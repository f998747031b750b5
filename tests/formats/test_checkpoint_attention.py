"""Checkpoints keep attention: which is quantized, with how many bits, and the same output bit for bit."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as hf
from torch import nn

import tcompress
from tcompress.nn import Int8Attention, Int8MultiheadAttention, TransformerEncoder

X = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(12).view(2, 6)


def torch_encoder(seed=0, **arguments):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, **arguments)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def bert(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return hf.BertModel(hf.BertConfig(**sizes, intermediate_size=32)).eval()


MODELS = {
    "torch": (torch_encoder, X),
    "tcompress": (lambda seed=0: TransformerEncoder.from_torch(torch_encoder(seed)), X),
    "transformers": (bert, IDS),
}
RECIPES = {
    "preset": "int8",
    "attention alone": {"steps": [{"attention": "int12"}]},
    "one layer": {"steps": [{"attention": "int8", "ignore": "re:.*layers?.1"}, {"scheme": "W8A8", "ignore": "k_proj"}]},
}


def outputs(model, x):
    with torch.inference_mode():
        return tcompress.calibrate.first_tensor(model(x))


def attentions(model):
    return {n: (m.precision, m.bits) for n, m in model.named_modules() if isinstance(m, Int8Attention)}


def edit(folder, change):
    path = folder / "tcompress.json"
    content = json.loads(path.read_text())
    change(content["modules"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("target", ["fresh", "compressed"])
def test_round_trip(tmp_path, kind, recipe, target):
    make, x = MODELS[kind]
    model = tcompress.compress(make(), RECIPES[recipe]).model
    tcompress.save(model, tmp_path)
    other = make(seed=1)
    if target == "compressed":
        other = tcompress.compress(other, RECIPES[recipe]).model
        for module in other.modules():
            if isinstance(module, Int8Attention):  # what the checkpoint says holds
                module.bits, module.precision = 8, "float" if module.precision == "int8" else "int8"
    loaded = tcompress.load(tmp_path, other)
    assert loaded is other
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    assert attentions(loaded) == attentions(model)
    assert "int8" in {precision for precision, _ in attentions(loaded).values()}
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    if kind == "transformers":
        assert torch.equal(outputs(tcompress.load(tmp_path), x), outputs(model, x))


@pytest.mark.parametrize("arguments", [{"bias": False}, {"norm_first": True, "dropout": 0.3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_s_variants(tmp_path, arguments, dtype):
    model = torch_encoder(**arguments).to(dtype)
    compressed = tcompress.compress(model, RECIPES["one layer"]).model
    tcompress.save(compressed, tmp_path)
    loaded = tcompress.load(tmp_path, torch_encoder(1, **arguments))
    assert torch.equal(outputs(loaded, X.to(dtype)), outputs(compressed, X.to(dtype)))
    assert loaded.layers[0].self_attn.dropout == model.layers[0].self_attn.dropout
    assert loaded.layers[0].self_attn.k_proj.weight.dtype == dtype


def test_keys_and_values_of_other_sizes(tmp_path):
    def make():
        return nn.ModuleDict({"a": nn.MultiheadAttention(32, 4, kdim=8, vdim=12, bias=False)}).eval()

    compressed = tcompress.compress(make(), "int8").model
    tcompress.save(compressed, tmp_path)
    loaded = tcompress.load(tmp_path, make())
    q, k, v = torch.randn(5, 1, 32), torch.randn(7, 1, 8), torch.randn(7, 1, 12)
    expected = compressed["a"](q, k, v, need_weights=False)[0]
    assert torch.equal(loaded["a"](q, k, v, need_weights=False)[0], expected)


def test_shared_attention(tmp_path):
    def make():
        mha = nn.MultiheadAttention(32, 4)
        return nn.ModuleDict({"a": mha, "b": nn.ModuleList([mha])}).eval()

    compressed = tcompress.compress(make(), "int8").model
    tcompress.save(compressed, tmp_path)
    loaded = tcompress.load(tmp_path, make())
    assert loaded["a"] is loaded["b"][0]
    assert isinstance(loaded["a"], Int8MultiheadAttention)
    x = torch.randn(3, 1, 32)
    expected = compressed["a"](x, x, x, need_weights=False)[0]
    assert torch.equal(loaded["a"](x, x, x, need_weights=False)[0], expected)


def test_floating_point_is_kept_too(tmp_path):
    recipe = {"steps": [{"attention": "int8", "ignore": "encoder.layer.1.*"}]}
    model = tcompress.compress(bert(), recipe).model
    tcompress.save(model, tmp_path)
    loaded = tcompress.load(tmp_path)
    name = "encoder.layer.{}.attention.self.tcompress_attention"
    assert attentions(loaded) == {name.format(0): ("int8", 8), name.format(1): ("float", "auto")}
    assert loaded.config._attn_implementation == "tcompress"


@pytest.mark.parametrize("kind", ["tcompress", "transformers"])
def test_a_checkpoint_from_before_there_was_attention(tmp_path, kind):
    make, x = MODELS[kind]
    model = tcompress.compress(make(), {"steps": [{"scheme": "W8A8"}]}).model
    tcompress.save(model, tmp_path)
    edit(tmp_path, lambda modules: [modules.pop(n) for n in list(modules) if n.endswith("attention")])
    loaded = tcompress.load(tmp_path, make(1))
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    assert {precision for precision, _ in attentions(loaded).values()} <= {"float"}


def test_a_model_with_attention_in_floating_point_is_not_compressed(tmp_path):
    with pytest.raises(ValueError, match="without compressed modules"):
        tcompress.save(MODELS["tcompress"][0](), tmp_path)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 48), 2),
            "2 heads over 32, .* expected .* 4 heads",
        ),
        (lambda: nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])}), "no module 'layers.0.self_attn'"),
        (lambda: torch_encoder(bias=False), "keys|linear layer|missing|unexpected"),
    ],
)
def test_wrong_architecture_changes_nothing(tmp_path, target, problem):
    tcompress.save(tcompress.compress(torch_encoder(), "int8").model, tmp_path)
    model = target()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=problem):
        tcompress.load(tmp_path, model)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_attention_for_a_module_that_cannot_take_it(tmp_path):
    tcompress.save(tcompress.compress(bert(), "int8").model, tmp_path)

    def move(modules):
        modules["encoder.layer.0.output.tcompress_attention"] = modules.pop(
            "encoder.layer.0.attention.self.tcompress_attention"
        )

    edit(tmp_path, move)
    with pytest.raises(ValueError, match="no module 'encoder.layer.0.output.tcompress_attention'"):
        tcompress.load(tmp_path)


@pytest.mark.parametrize("change", [{"bits": 9}, {"precision": "fp8"}, {"extra": 1}])
def test_damaged_description(tmp_path, change):
    tcompress.save(tcompress.compress(torch_encoder(), "int8").model, tmp_path)
    edit(tmp_path, lambda modules: modules["layers.0.self_attn.attention"].update(change))
    with pytest.raises(ValueError, match="wrong content"):
        tcompress.load(tmp_path, torch_encoder())
