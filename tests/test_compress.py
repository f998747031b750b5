"""The front door, on plain torch modules."""

from __future__ import annotations

import copy
import warnings
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tcompress
from tcompress.errors import CompressionWarning
from tcompress.nn import QuantizedEmbedding, QuantizedLinear, TransformerEncoder

W8A8 = {"steps": [{"step": "quantize", "scheme": "W8A8", "ignore": []}]}


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    return float(nn.functional.cosine_similarity(a, b, dim=0))


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def _same(model: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == weights.keys() and all(torch.equal(now[k], v) for k, v in weights.items())


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_torch_transformer_encoder(norm_first, padded, grad):
    """In evaluation mode torch would hand the float weights to a native function, past the replacement."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x = torch.randn(2, 10, 64)
    mask = torch.tensor([[False] * 10, [False] * 6 + [True] * 4]) if padded else None
    result = tcompress.compress(model, "int8", data={"src": x, "src_key_padding_mask": mask})
    called = []
    for m in result.model.modules():
        if isinstance(m, QuantizedLinear):
            m.register_forward_hook(lambda module, args, out: called.append(module))
    with torch.set_grad_enabled(grad):
        got = result.model(x, src_key_padding_mask=mask)
        expected = model(x, src_key_padding_mask=mask)
    assert len(called) == 12
    valid = ~mask if padded else torch.ones(2, 10, dtype=torch.bool)
    assert 0.999 <= _cosine(got[valid], expected[valid]) < 1
    assert not result.report.skipped
    assert [(a.name, a.quantized) for a in result.report.attention] == [(f"layers.{i}.self_attn", True) for i in (0, 1)]


def test_our_transformer_encoder():
    torch.manual_seed(0)
    model = TransformerEncoder(2, 4, 64, 16, 128).eval()
    x = torch.randn(2, 10, 64)
    result = tcompress.compress(model, "int8", data=x)
    assert len(result.report.compressed) == 12
    assert _cosine(result.model(x), model(x)) >= 0.999


def test_single_layer():
    linear = nn.Linear(8, 4)
    result = tcompress.compress(linear, W8A8)
    assert isinstance(result.model, QuantizedLinear)
    assert isinstance(linear, nn.Linear)
    with pytest.raises(ValueError, match="inplace: got True .*inplace=False"):
        tcompress.compress(linear, W8A8, inplace=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_shared_modules_are_replaced_at_every_place(inplace):
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared)})
    result = tcompress.compress(model, W8A8, inplace=inplace)
    assert isinstance(result.model["a"], QuantizedLinear)
    assert result.model["a"] is result.model["b"][1]
    assert (result.model is model) == inplace
    assert isinstance(model["a"], QuantizedLinear if inplace else nn.Linear)
    assert result.report.layers[0].aliases == ("b.1",)


def test_tied_weights_share_their_integers():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    compressed = tcompress.compress(model, W8A8).model
    assert compressed[0].kernel_weight is compressed[1].kernel_weight
    assert compressed[0].scale is compressed[1].scale


def test_an_embedding_tied_to_the_output_layer_is_held_once(tmp_path):
    """One layout in memory and one tensor on disk, and the same numbers as untied."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(50, 24), nn.Linear(24, 50, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.embedding(ids))

    steps = [{"step": "quantize", "scheme": "W8A16", "targets": "Embedding"}, {"step": "quantize", "scheme": "W8A8"}]
    model, ids = Tied().eval(), torch.tensor([[0, 49, 7], [7, 7, 1]])
    result = tcompress.compress(model, {"steps": [{**step, "ignore": []} for step in steps]})
    held = result.model
    assert held.embedding.kernel_weight is held.head.kernel_weight
    assert held.embedding.qdata is None
    assert result.report.after.disk == 50 * 24 + 50 * 4
    assert result.report.after.resident == held.head.kernel_weight.nbytes + 50 * 4
    untied = copy.deepcopy(model)
    untied.head.weight = nn.Parameter(model.head.weight.detach().clone())
    other = tcompress.compress(untied, {"steps": [{**step, "ignore": []} for step in steps]}).model
    assert other.embedding.kernel_weight is None
    assert torch.equal(held(ids), other(ids))
    tcompress.save(held, tmp_path)
    loaded = tcompress.load(tmp_path, Tied().eval())
    assert loaded.embedding.kernel_weight is loaded.head.kernel_weight
    assert torch.equal(held(ids), loaded(ids))


def test_resident_memory():
    model = nn.Sequential(nn.Linear(768, 3072), nn.Linear(3072, 768))
    for scheme in ("W8A8", "W7A7", "W4A8-g32", "W4A16-g128-asym"):
        result = tcompress.compress(model, {"steps": [{"step": "quantize", "scheme": scheme}]})
        packed = sum(layer.packed.nbytes for layer in result.model)
        assert result.report.after.resident <= 1.1 * packed + 4 * (3072 + 768)


def test_original_stays_and_nothing_is_shared():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    before = _weights(model)
    result = tcompress.compress(model, W8A8)
    result.model[1].weight.data.fill_(7)
    result.model[0].bias.data.fill_(7)
    assert _same(model, before)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weight_leaves_the_model_unchanged(inplace, value):
    model = _mlp()
    model[2].weight.data[3, 5] = value
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="compress: 2: .*1 values NaN or infinite"):
        tcompress.compress(model, W8A8, inplace=inplace)
    assert [type(m) for m in model] == [type(m) for m in before]
    assert torch.equal(model[0].weight, before[0].weight)


@pytest.mark.parametrize("training", [False, True])
def test_training_flag_is_kept(training):
    result = tcompress.compress(_mlp().train(training), W8A8, data=torch.randn(3, 16))
    assert all(m.training == training for m in result.model.modules())


def _data_forms() -> dict[str, object]:
    x = torch.randn(6, 16)
    return {
        "tensor": x,
        "mapping": {"input": x},
        "user_dict": UserDict(input=x),
        "arguments": (x,),
        "list": [x, x],
        "loader": DataLoader(TensorDataset(x), batch_size=2),
        "generator": (batch for batch in x.split(3)),
    }


@pytest.mark.parametrize("form", list(_data_forms()))
def test_forms_of_data(form):
    report = tcompress.compress(_mlp(), W8A8, data=_data_forms()[form]).report
    assert all(layer.output_sqnr_db is not None and layer.output_sqnr_db > 30 for layer in report.compressed)
    assert report.output_cosine is not None
    assert report.output_cosine > 0.999


def test_output_ratio_is_the_layers_own():
    """Against a computation by hand on the layer's true input."""
    model, x = _mlp(), torch.randn(5, 16)
    layer = tcompress.compress(model, W8A8, data=x).report.compressed[1]
    hidden = model[:2](x).detach()
    got = QuantizedLinear.from_linear(model[2])(hidden).double()
    want = model[2](hidden).double()
    expected = 10 * torch.log10(want.square().sum() / (got - want).square().sum())
    assert layer.output_sqnr_db == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(("data", "error"), [([], ValueError), (3, TypeError), ("text", TypeError)])
def test_unusable_data(data, error):
    model = _mlp()
    with pytest.raises(error, match="compress: data: got"):
        tcompress.compress(model, W8A8, data=data, inplace=True)
    assert isinstance(model[0], nn.Linear)
    assert not model[0]._forward_hooks


def test_failing_data_leaves_no_hooks():
    model = _mlp()
    with pytest.raises(RuntimeError):
        tcompress.compress(model, W8A8, data=torch.randn(2, 9))
    assert not model[0]._forward_hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_layer_that_the_data_never_reaches():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.warns(CompressionWarning, match="idle was never called"):
        report = tcompress.compress(Model(), W8A8, data=torch.randn(2, 8)).report
    assert report.warnings == ("idle was never called on the data",)
    assert {layer.name: layer.output_sqnr_db is None for layer in report.compressed} == {"used": False, "idle": True}


class _Log(nn.Module):
    """Finite as long as the first output is not zero."""

    def __init__(self, small: float) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 1, bias=False)
        self.fc.weight.data = torch.tensor([[1.0, small]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).log()


@pytest.mark.parametrize(
    ("small", "warning"),
    [(1e-4, "NaN or infinity where the model's does not"), (0.0, "not finite on the data, before compression")],
)
def test_warns_of_outputs_that_are_not_finite(small, warning):
    x = torch.tensor([[0.0, 1.0]])  # sees the small weight alone, which rounds to zero beside the large one
    with pytest.warns(CompressionWarning, match=warning):
        report = tcompress.compress(_Log(small), W8A8, data=x).report
    assert report.output_cosine is None


def test_warns_when_the_model_did_not_shrink():
    model = nn.Sequential(nn.Embedding(100, 2))
    recipe = {"steps": [{"step": "quantize", "scheme": "W8A16", "targets": ["Embedding"]}]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tcompress.compress(model, recipe)  # 8 bytes a row become 6
    thin = nn.Sequential(nn.Linear(1, 100))  # 8 bytes an output become 9
    with pytest.warns(CompressionWarning, match="did not get smaller: 800 bytes before, 900 after"):
        tcompress.compress(thin, W8A8)


def test_wrong_kinds():
    with pytest.raises(TypeError, match="compress: model: got dict, expected a torch.nn.Module"):
        tcompress.compress({}, "int8")
    with pytest.raises(ValueError, match="Recipe: recipe: got 'int9'"):
        tcompress.compress(_mlp(), "int9")


def test_report_sizes_by_hand():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 16), nn.LayerNorm(16))
    result = tcompress.compress(model, "int8")
    assert isinstance(result.model[0], QuantizedEmbedding)
    assert result.report.before.disk == 4 * (80 + 128 + 16 + 32)
    assert result.report.after.disk == (80 + 40) + (128 + 64 + 64) + 128
    assert result.report.after.resident == (80 + 40) + (result.model[1].kernel_weight.nbytes + 64 + 64) + 128


def test_compressing_twice_in_steps():
    model = _mlp()
    once = tcompress.compress(model, {"steps": [{"step": "quantize", "scheme": "W8A8", "targets": ["0"]}]}).model
    twice = tcompress.compress(once, {"steps": [{"step": "quantize", "scheme": "W7A7"}]}).model
    assert [m.scheme.name for m in twice if isinstance(m, QuantizedLinear)] == ["W8A8", "W7A7"]


def test_targets_that_match_nothing_are_told():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    steps = [{"scheme": "W8A8", "targets": "0"}, {"scheme": "W8A8", "targets": "liner2"}]
    with pytest.warns(CompressionWarning, match="quantize: targets .'liner2'. match nothing in the model"):
        tcompress.compress(model, {"steps": steps})
    transform = [{"step": "low_rank", "ratio": 0.5, "targets": "0"}, {"scheme": "W8A8", "targets": "liner2"}]
    with pytest.warns(CompressionWarning, match="quantize: targets .'liner2'. match nothing in the model"):
        tcompress.compress(model, {"steps": transform}, torch.randn(4, 8))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"targets": ["0", "kproj"]}, "targets ['kproj']"),
        ({"ignore": ["lm_haed", "1"]}, "ignore ['lm_haed']"),
        ({"ignore": ["lm_head"]}, None),
    ],
)
def test_each_pattern_that_matches_nothing_is_told(fields, told):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        report = tcompress.compress(model, {"steps": [{"scheme": "W8A8", **fields}]}).report
    assert [note for note in report.warnings if "match nothing" in note] == (
        [f"quantize: {told} match nothing in the model"] if told else []
    )


def test_a_layer_that_several_steps_change_counts_once():
    model, data = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), torch.randn(8, 32)
    train = {"step": "distill", "steps": 1, "losses": ["cosine"]}
    steps = [{"step": "prune", "sparsity": 0.5}, train, {"scheme": "W8A8"}]
    result = tcompress.compress(model, {"steps": steps}, data)
    report = result.report
    assert repr(result) == "CompressResult(Sequential, 2 layers compressed, 1 prepared or trained, 0 skipped)"
    assert len(report.compressed) == 5
    assert report.counts == "2 layers compressed, 1 prepared or trained, 0 skipped"


def test_resume_without_anything_to_keep_is_told(tmp_path):
    with pytest.warns(CompressionWarning, match="resume: no step of this recipe keeps what it has finished there"):
        tcompress.compress(nn.Sequential(nn.Linear(8, 8)), {"steps": [{"scheme": "W8A8"}]}, resume=tmp_path / "run")


def test_a_step_that_trains_keeps_what_it_finished_and_does_not_keep_to_a_limit(tmp_path):
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(8, 32)
    finetune = {"step": "finetune", "steps": 1, "losses": [{"loss": "logits"}]}
    for more, resume in (({}, tmp_path / "run"), ({"algorithm": "gptq"}, None)):
        steps = [{"scheme": "W4A16-g32", **more}, finetune]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompressionWarning)
            report = tcompress.compress(model, {"steps": steps}, x, resume=resume, max_memory="1 GB").report
        assert not any(note.startswith("resume: ") for note in report.warnings)
        assert [note for note in report.warnings if note.startswith("max_memory: ")] == [
            "max_memory: of this recipe's steps only algorithms with data that prune and quantize keep to it"
        ]
    assert [folder.name.partition("-")[0] for folder in (tmp_path / "run").iterdir()] == ["finetune"]


@pytest.mark.parametrize("returned", ["mapping", "tuple"])
def test_a_loss_is_not_what_a_model_is_judged_by(returned):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 16)

        def forward(self, x):
            logits = self.layer(x)
            return {"loss": logits.mean(), "logits": logits} if returned == "mapping" else (logits.mean(), logits)

    torch.manual_seed(0)
    report = tcompress.compress(Model(), {"steps": [{"scheme": "W4A16"}]}, torch.randn(4, 64)).report
    assert 0.9 < report.output_cosine < 0.9999
