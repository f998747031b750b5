"""The attention step, from the front door: torch's modules, ours and those of transformers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers as hf
from torch import nn

import tcompress
from tcompress.errors import CompressionWarning
from tcompress.nn import Int8Attention, Int8MultiheadAttention, QuantizedLinear, TransformerEncoder

ONLY = {"steps": [{"attention": "int8"}]}
LENIENT = {"attention": "int8", "min_cosine": -1}


def torch_encoder(seed=0, **arguments):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, **arguments)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def bert(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return hf.BertModel(hf.BertConfig(**sizes, intermediate_size=32, **fields)).eval()


IDS = torch.arange(12).view(2, 6)
X = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))


def attentions(model):
    return {n: (m.precision, m.bits) for n, m in model.named_modules() if isinstance(m, Int8Attention)}


def outputs(model, x):
    with torch.inference_mode():
        return tcompress.calibrate.first_tensor(model(x))


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


MODELS = {
    "torch": (torch_encoder, X, "layers.0.self_attn.attention"),
    "tcompress": (lambda: TransformerEncoder.from_torch(torch_encoder()), X, "layers.0.self_attn.attention"),
    "transformers": (bert, IDS, "encoder.layer.0.attention.self.tcompress_attention"),
}
pytestmark = pytest.mark.filterwarnings("error::tcompress.errors.CompressionWarning")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_attention_alone(kind, data, inplace):
    make, x, name = MODELS[kind]
    model = make()
    expected, before = outputs(model, x), {k: v.clone() for k, v in model.state_dict().items()}
    result = tcompress.compress(model, ONLY, data=x if data else None, inplace=inplace)
    assert attentions(result.model)[name] == ("int8", 8)
    assert len(attentions(result.model)) == 2
    got = outputs(result.model, x)
    assert 0 < relative(got, expected) < 0.02
    assert (result.model is model) == inplace
    if not inplace:
        assert torch.equal(outputs(model, x), expected)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
        assert all(m.precision == "float" for m in model.modules() if isinstance(m, Int8Attention))
    assert not result.report.layers
    for report in result.report.attention:
        assert report.action == "int8"
        if data:
            assert 0.999 < report.total.cosine <= 1
            assert 0 < report.total.relative_l1 < 0.03
            assert len(report.heads) == 4
            assert report.reason == ""
        else:
            assert report.total is None
            assert report.reason == "accuracy not checked: no data"
    if data:
        assert result.report.output_cosine > 0.999
    assert not any(m._forward_hooks for m in result.model.modules())


@pytest.mark.parametrize("kind", MODELS)
def test_what_loses_too_much_stays_in_floating_point(kind):
    make, x, name = MODELS[kind]
    model, recipe = make(), {"steps": [{"attention": "int8", "min_cosine": 1.0}]}
    with pytest.warns(CompressionWarning, match=r"attention .*: cosine 0.99\d+ with int8 is below 1.0"):
        result = tcompress.compress(model, recipe, data=x)
    for report in result.report.attention:
        assert report.action == "float"
        assert "is below 1.0" in report.reason
        assert report.total.cosine < 1
    assert relative(outputs(result.model, x), outputs(model, x)) < 1e-6
    assert all(precision == "float" for precision, _ in attentions(result.model).values())
    unchecked = tcompress.compress(model, recipe).model
    assert attentions(unchecked)[name] == ("int8", 8)
    kept = tcompress.compress(model, {"steps": [LENIENT]}, data=x).model
    assert attentions(kept)[name] == ("int8", 8)


@pytest.mark.parametrize("kind", MODELS)
def test_each_layer_for_itself(kind):
    """The second layer's queries are made so large that a score rounded otherwise picks another key."""
    make, x, name = MODELS[kind]
    model = make()
    query = {
        "torch": "layers.1.self_attn.in_proj_weight",
        "tcompress": "layers.1.self_attn.q_proj.weight",
        "transformers": "encoder.layer.1.attention.self.query.weight",
    }[kind]
    with torch.no_grad():
        dict(model.named_parameters())[query][:32] *= 1000
    first, second = (r.total.cosine for r in tcompress.compress(model, {"steps": [LENIENT]}, data=x).report.attention)
    assert second < first
    recipe = {"steps": [{"attention": "int8", "min_cosine": (first + second) / 2}]}
    with pytest.warns(CompressionWarning, match="is below"):
        result = tcompress.compress(model, recipe, data=x)
    assert [r.action for r in result.report.attention] == ["int8", "float"]
    assert attentions(result.model)[name][0] == "int8"
    assert attentions(result.model)[name.replace(".0.", ".1.")][0] == "float"


@pytest.mark.parametrize("kind", MODELS)
def test_ignored_layers_stay_in_floating_point(kind):
    make, x, name = MODELS[kind]
    result = tcompress.compress(make(), {"steps": [{"attention": "int12", "ignore": "re:.*layers?.1"}]}, data=x)
    found = attentions(result.model)
    assert found.pop(name) == ("int8", 12)
    assert [precision for precision, _ in found.values()] == ([] if kind == "torch" else ["float"])
    assert [(r.action, r.reason) for r in result.report.attention] == [
        ("int12", ""),
        ("skipped", "ignored by 're:.*layers?.1'"),
    ]


def test_projections_of_torch_s_attention():
    model = torch_encoder()
    result = tcompress.compress(model, "int8", data=X)
    first = result.model.layers[0].self_attn
    assert isinstance(first, Int8MultiheadAttention)
    assert all(isinstance(getattr(first, n), QuantizedLinear) for n in ("q_proj", "k_proj", "v_proj", "out_proj"))
    layers = {layer.name: layer for layer in result.report.layers}
    assert len(layers) == len(result.report.compressed) == 12
    weight = model.layers[0].self_attn.in_proj_weight.chunk(3)[1]
    assert layers["layers.0.self_attn.k_proj"].shape == (32, 32)
    assert layers["layers.0.self_attn.k_proj"].bytes_before == weight.nbytes + 32 * 4
    assert all(layer.output_sqnr_db > 30 for layer in layers.values())
    assert relative(first.k_proj.packed.dequantize(), weight.detach()) < 0.02
    assert result.report.after.disk < 0.35 * result.report.before.disk


def test_projections_that_no_step_covers_are_copied():
    model = torch_encoder()
    steps = [{"attention": "int8"}, {"scheme": "W8A8", "targets": "q_proj"}]
    compressed = tcompress.compress(model, {"steps": steps}).model
    first = compressed.layers[0].self_attn
    assert isinstance(first.q_proj, QuantizedLinear)
    assert type(first.k_proj) is type(first.out_proj) is nn.Linear
    kept = first.k_proj.weight.clone()
    nn.init.zeros_(model.layers[0].self_attn.in_proj_weight)
    assert torch.equal(first.k_proj.weight, kept)
    assert not first.k_proj.weight.untyped_storage().nbytes() > kept.nbytes


def test_a_module_by_itself():
    mha = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    with pytest.warns(CompressionWarning, match=r"\(root\): never called"):  # torch's default asks for the weights
        result = tcompress.compress(mha, "int8", data=(X, X, X))
    assert isinstance(result.model, Int8MultiheadAttention)
    report = result.report.attention[0]
    assert (report.name, report.quantized, report.total) == ("", True, None)
    checked = {"query": X, "key": X, "value": X, "need_weights": False}
    assert tcompress.compress(mha, "int8", data=checked).report.attention[0].total.cosine > 0.999
    with torch.no_grad():
        assert relative(result.model(**checked)[0], mha(**checked)[0]) < 0.05


def test_attention_that_the_data_never_reaches():
    model = nn.ModuleDict({"used": nn.MultiheadAttention(32, 4), "idle": nn.MultiheadAttention(32, 4)}).eval()
    model.forward = lambda x: model["used"](x, x, x, need_weights=False)[0]
    with pytest.warns(CompressionWarning, match="attention idle: never called"):
        result = tcompress.compress(model, ONLY, data=X, inplace=True)
    assert result.report.warnings == ("attention idle: never called on the data: accuracy not checked",)
    assert [r.action for r in result.report.attention] == ["int8", "int8"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_training_flag(kind, training):
    make, x, _ = MODELS[kind]
    model = make().train(training)
    result = tcompress.compress(model, "int8", data=x)
    assert all(m.training == training for m in result.model.modules())
    assert all(m.training == training for m in model.modules())


def test_the_model_s_own_attention_function_is_restored():
    model = bert(attn_implementation="eager")
    failing = {"input_ids": torch.full((1, 3), 10**6)}
    with pytest.raises(IndexError):
        tcompress.compress(model, ONLY, data=[IDS, failing])
    assert model.config._attn_implementation == "eager"
    result = tcompress.compress(model, ONLY, data=IDS)
    assert model.config._attn_implementation == "eager"
    assert result.model.config._attn_implementation == "tcompress"
    assert not attentions(model)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_model_whose_output_depends_on_the_name_of_its_attention_function():
    class Odd(hf.BertModel):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.last_hidden_state = output.last_hidden_state.clone()
            if self.config._attn_implementation == "tcompress":
                output.last_hidden_state[:, 0] *= -1
            return output

    model = Odd(bert().config).eval()
    with pytest.warns(CompressionWarning, match="depends on more than its attention function is told"):
        result = tcompress.compress(model, ONLY, data=IDS)
    assert [r.action for r in result.report.attention] == ["skipped", "skipped"]
    assert torch.equal(outputs(result.model, IDS), outputs(model, IDS))


def test_several_transformers_models_in_one():
    model = nn.ModuleDict({"a": bert(), "b": bert()})
    steps = [{"attention": "int8", "targets": "a.*"}]
    compressed = tcompress.compress(model, {"steps": steps}).model
    assert [m.config._attn_implementation for m in compressed.values()] == ["tcompress", "sdpa"]
    assert len(attentions(compressed)) == 2
    assert torch.equal(outputs(compressed["b"], IDS), outputs(model["b"], IDS))


def test_backward_raises():
    compressed = tcompress.compress(torch_encoder(), ONLY).model
    with pytest.raises(RuntimeError, match="quantized_attention: backward"):
        compressed(X).sum().backward()


@pytest.mark.parametrize("kind", MODELS)
def test_fullgraph(kind):
    make, x, _ = MODELS[kind]
    compressed = tcompress.compress(make(), "int8").model
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with torch.no_grad():
        got = tcompress.calibrate.first_tensor(torch.compile(compressed, fullgraph=True, backend=backend)(x))
        assert relative(got, outputs(compressed, x)) < 1e-5
    assert sum("quantized_attention" in name for name in seen) == 2


def test_copies_of_compressed_models():
    for make, x, name in MODELS.values():
        compressed = tcompress.compress(make(), "int8").model
        copied = copy.deepcopy(compressed)
        assert attentions(copied)[name] == ("int8", attentions(compressed)[name][1])
        assert torch.equal(outputs(copied, x), outputs(compressed, x))


def test_no_attention_no_difference():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = tcompress.compress(nn.Sequential(nn.Linear(64, 64)), "int8").report
    assert report.attention == ()
    assert "attention" not in str(report)
    with pytest.raises(ValueError, match="match nothing"):
        tcompress.compress(nn.Sequential(nn.Linear(64, 64)), ONLY)


@pytest.mark.parametrize(
    ("steps", "action"),
    [
        ([{"scheme": "W8A8"}], "W8A8"),
        ([{"scheme": "W8A8-static"}], "W8A8-static"),
        ([{"scheme": "W4A16-g32", "algorithm": "gptq"}], "W4A16-g32 gptq"),
        ([{"scheme": "W4A16-g32"}, {"step": "finetune", "steps": 2}], "W4A16-g32"),
    ],
)
def test_a_model_that_is_attention_itself(steps, action):
    """Its projections are layers of what takes its place, which is in no module's."""
    if "step" in steps[-1]:
        pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    before = copy.deepcopy(model)
    batch = {"query": X, "key": X, "value": X, "need_weights": False}
    recipe = {"steps": [{"attention": "int8"}, *steps]}
    with warnings.catch_warnings():  # it has no blocks
        warnings.simplefilter("ignore", CompressionWarning)
        result = tcompress.compress(model, recipe, [batch], progress=False)
    layers = {layer.name: layer for layer in result.report.layers if layer.name}
    assert {layer.action for layer in layers.values()} == {action}
    assert set(layers) == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert not any("no calibration inputs" in note for note in result.report.warnings)
    with torch.inference_mode():
        assert relative(result.model(**batch)[0], before(**batch)[0]) < 0.2
    assert type(model) is nn.MultiheadAttention
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.state_dict().items())
    expected = tcompress.estimate(model, recipe, [batch], seconds=0)
    assert (expected.memory.hessians > 0) == ("gptq" in action)
