"""Pruning through the front door, alone and before other steps."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from pruned_models import PRUNE, SPARSE, SPARSE_INT8, W8A8, mlp, steps, zeros
from torch import nn

import tcompress
from tcompress import tune
from tcompress.errors import CompressionWarning
from tcompress.nn import SparseLinear
from tcompress.prune import magnitude_mask


@pytest.fixture(autouse=True)
def seconds(monkeypatch, tmp_path):
    """What the measurement finds: sparse layouts are faster, unless a test says otherwise."""
    found = {"dense": 4e-3, "unstructured": 3e-3, "1x4": 3e-3, "8x4": 2e-3, "2:4": 3e-3}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        tune, "measure", lambda w, kernels, m, dtype: ({k.layout: found[k.layout] for k in kernels}, False)
    )
    return found


# ---- prune ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("8x4", 0.75), ("unstructured", 0.3), ("2:4", None), ("16x16", 0.5), ("8x4", 0.0)]
)
def test_prune_only(pattern, sparsity, inplace):
    model = mlp()
    before = copy.deepcopy(model)
    step = {"step": "prune", "pattern": pattern} | ({} if sparsity is None else {"sparsity": sparsity})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = tcompress.compress(model, {"steps": [step]}, data=torch.randn(5, 32), inplace=inplace)
    assert (result.model is model) == inplace
    for i in (0, 2):
        assert type(result.model[i]) is nn.Linear
        mask = magnitude_mask(before[i].weight, pattern, sparsity)
        assert torch.equal(result.model[i].weight, before[i].weight * mask)
        assert torch.equal(result.model[i].bias, before[i].bias)
        assert result.model[i].weight.requires_grad
        if not inplace:
            assert torch.equal(model[i].weight, before[i].weight)
    report = result.report
    assert [layer.action for layer in report.compressed] == [f"pruned {pattern}"] * 2
    assert [layer.sparsity for layer in report.layers] == [zeros(result.model[i].weight) for i in (0, 2)]
    assert all(layer.output_sqnr_db is not None for layer in report.layers)
    assert report.before == report.after


def test_prune_and_ignore():
    result = tcompress.compress(mlp(), {"steps": [{**PRUNE, "ignore": ["2"]}]})
    assert zeros(result.model[0].weight) == 0.75
    assert zeros(result.model[2].weight) == 0
    assert [(layer.name, layer.reason) for layer in result.report.skipped] == [("2", "not pruned: ignored by '2'")]
    assert result.report.skipped[0].sparsity is None


def test_the_first_pruning_step_counts():
    recipe = {"steps": [{**PRUNE, "targets": "0"}, {"step": "prune", "pattern": "unstructured", "sparsity": 0.25}]}
    model = tcompress.compress(mlp(), recipe).model
    assert zeros(model[0].weight) == 0.75
    assert zeros(model[2].weight) == 0.25


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", [steps(PRUNE), steps(SPARSE, min_sparsity=0), steps(PRUNE, SPARSE_INT8)])
def test_bad_weight_leaves_the_model_unchanged(inplace, value, recipe):
    model = mlp()
    model[2].weight.data[3, 5] = value
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="compress: 2: .*NaN or infinit"):
        tcompress.compress(model, recipe, inplace=inplace)
    assert [type(m) for m in model] == [type(m) for m in before]
    assert torch.equal(model[0].weight, before[0].weight)


def test_pruning_that_finds_nothing_says_so():
    with pytest.raises(ValueError, match="compress: recipe: got targets .*Conv9.* match nothing"):
        tcompress.compress(mlp(), steps(PRUNE, targets="Conv9"))
    with pytest.warns(CompressionWarning, match="no layer was pruned"):
        report = tcompress.compress(mlp(), {"steps": [{**PRUNE, "targets": "Conv9"}, W8A8]}).report
    assert report.warnings == ("prune: targets ['Conv9'] match nothing in the model", "no layer was pruned")
    model = nn.Sequential(nn.Embedding(5, 4))
    with pytest.raises(ValueError, match="0: not pruned: an embedding is looked up, not multiplied"):
        tcompress.compress(model, steps(PRUNE, targets="Embedding"))


def test_a_layer_that_is_not_pruned_but_quantized_says_so():
    model = nn.Sequential(nn.Embedding(5, 8), *mlp()[2:], nn.Linear(8, 8))
    recipe = {"steps": [{**PRUNE, "ignore": "1"}, W8A8]}
    report = tcompress.compress(model, recipe).report
    reasons = {layer.name: layer.reason for layer in report.compressed}
    assert reasons == {"1": "not pruned: ignored by '1'", "2": ""}


# ---- shared and tied ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [steps(PRUNE), steps(PRUNE, SPARSE)])
@pytest.mark.parametrize("inplace", [False, True])
def test_shared_modules(recipe, inplace):
    shared = nn.Linear(16, 16)
    result = tcompress.compress(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), recipe, inplace=inplace)
    assert result.model["a"] is result.model["b"][0]
    (layer,) = result.report.layers
    assert (layer.name, layer.aliases) == ("a", ("b.0",))
    assert result.report.before.disk == 4 * (16 * 16 + 16)


def tied_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    return model


def test_tied_weights_stay_tied():
    result = tcompress.compress(tied_layers(), steps(PRUNE))
    assert result.model[0].weight is result.model[1].weight
    assert zeros(result.model[0].weight) == 0.75
    assert result.report.after == result.report.before
    compressed = tcompress.compress(tied_layers(), steps(PRUNE, W8A8)).model
    assert compressed[0].kernel_weight is compressed[1].kernel_weight
    assert zeros(compressed[0].weight_packed) >= 0.75
    sparse = tcompress.compress(tied_layers(), steps(PRUNE, SPARSE)).model
    assert torch.equal(sparse[0].packed.floats(), sparse[1].packed.floats())


@pytest.mark.parametrize("more", [[], [W8A8], [SPARSE]])
def test_a_weight_that_another_layer_uses_as_it_is(more):
    """Tied to one that is not pruned: pruning would make a second weight of it."""
    model, recipe = tied_layers(), {"steps": [{**PRUNE, "targets": "0"}, *more]}
    reason = "not pruned: its weight is also 1.weight, which stays"
    if more != [W8A8]:
        with pytest.raises(ValueError, match=reason if not more else "0% of its weight is zero"):
            tcompress.compress(model, recipe)
        return
    with pytest.warns(CompressionWarning, match="no layer was pruned"):
        result = tcompress.compress(model, recipe)
    assert result.model[0].kernel_weight is result.model[1].kernel_weight
    assert zeros(result.model[0].weight_packed) < 0.1
    assert [layer.reason for layer in result.report.compressed] == [reason, ""]


def test_a_head_tied_to_an_embedding_is_not_pruned():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.fc, self.head = nn.Embedding(50, 24), nn.Linear(24, 24), nn.Linear(24, 50, False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.fc(self.embedding(ids)))

    result = tcompress.compress(Tied(), steps(PRUNE, SPARSE, ignore=[]))
    assert result.model.head.weight is result.model.embedding.weight
    assert isinstance(result.model.fc, SparseLinear)
    assert [layer.name for layer in result.report.skipped] == ["head"]
    assert result.report.after.disk < result.report.before.disk
