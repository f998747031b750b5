"""What a training simulates is what the packed layers compute."""

import copy

import pytest
import torch
from torch import nn
from toy_models import Toy, batches

import tcompress
from tcompress.distill.effective import computing_with, straight_through
from tcompress.distill.fake_quantize import fake_quantize_input, fake_quantize_weight, simulated
from tcompress.quantize import Scheme
from tcompress.recipe import Recipe

W8A8 = {"scheme": "W8A8"}
EMBEDDING = {"scheme": "W8A16", "targets": "Embedding"}
NAMES = ["W8A8", "W7A7", "W4A8", "W4A8-g32", "W4A7-g64-asym", "W4A16-g32-asym"]


def test_straight_through():
    x = torch.randn(5, requires_grad=True)
    y = straight_through(x, x.detach().round())
    assert torch.equal(y, x.round())
    (3 * y).sum().backward()
    assert torch.equal(x.grad, torch.full((5,), 3.0))


def test_the_grid_by_hand():
    weight = torch.tensor([[0.5, -2.0, 1.27, 0.0], [0.1, 0.02, -0.05, 0.03]], requires_grad=True)
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    fake = fake_quantize_weight(weight, Scheme.named("W8A8").weights)
    assert torch.equal(fake, (weight.detach() / scale).round() * scale)
    fake.square().sum().backward()
    assert torch.equal(weight.grad, 2 * fake.detach())
    x = torch.tensor([[0.5, -2.0], [0.1, 0.3]], requires_grad=True)
    fake = fake_quantize_input(x, Scheme.named("W8A8").activations)
    expected = (x / x.abs().amax(1, keepdim=True) * 127).round() * x.abs().amax(1, keepdim=True) / 127
    assert torch.allclose(fake, expected, rtol=1e-6)
    fake.sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 2))


@pytest.mark.parametrize("name", NAMES)
def test_the_packed_layer_has_the_simulated_weight(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 24), nn.Tanh(), nn.Linear(24, 9))
    recipe = Recipe.load({"steps": [{"scheme": name}]})
    x = torch.randn(5, 70)
    effective, _ = simulated(model, recipe)
    with computing_with(effective), torch.no_grad():
        weights = [effective[model[i]].weight_of(model[i]).clone() for i in (0, 2)]
        expected = model(x)
        inputs = [x, model[1](model[0](x))]
        outputs = [model[0](x), model[2](inputs[1])]
    packed = tcompress.compress(model, recipe, progress=False).model
    for i, weight, given, out in zip((0, 2), weights, inputs, outputs, strict=True):
        assert torch.equal(packed[i].packed.dequantize(), weight)  # bit for bit
        assert torch.allclose(packed[i](given), out, rtol=1e-5, atol=1e-5)
    # Between the layers a last bit may move an input to the next step of its grid.
    assert (packed(x) - expected).abs().max() < 0.05 * expected.abs().max()
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize("method", ["mse", "percentile"])
def test_the_range_of_the_step_is_simulated(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 9))
    recipe = Recipe.load({"steps": [{"scheme": "W4A16-g32", "range": method}]})
    effective, notes = simulated(model, recipe)
    assert notes == []
    packed = tcompress.compress(model, recipe, progress=False).model
    for i in (0, 2):
        with computing_with(effective):
            weight = effective[model[i]].weight_of(model[i])
            assert torch.equal(packed[i].packed.dequantize(), weight)
            assert not torch.equal(fake_quantize_weight(model[i].weight, Scheme.named("W4A16-g32").weights), weight)
            (gradient,) = torch.autograd.grad(weight.sum(), model[i].weight)
            assert torch.equal(gradient, torch.ones_like(gradient))


def test_embeddings_are_simulated():
    model = Toy()
    recipe = Recipe.load({"steps": [EMBEDDING, W8A8]})
    effective, _ = simulated(model, recipe)
    assert len(effective) == sum(isinstance(m, nn.Linear | nn.Embedding) for m in model.modules())
    ids = batches(1)[0]["input_ids"]
    with computing_with(effective), torch.no_grad():
        looked_up = model.embedding(ids)
    packed = tcompress.compress(model, recipe, progress=False).model
    assert torch.equal(packed.embedding(ids), looked_up)
    assert effective[model.embedding].input is None


def test_other_algorithms_are_named():
    effective, notes = simulated(Toy(), Recipe.load({"steps": [{"scheme": "W8A8", "algorithm": "gptq"}]}))
    assert effective
    assert notes == ["training simulated rounding to nearest; gptq then gave other integers"]
    _, notes = simulated(Toy(), Recipe.load({"steps": [{**W8A8, "outliers": 4, "bias_correction": True}]}))
    assert notes == ["training did not simulate bias_correction, outliers, which data decide afterwards"]
    _, notes = simulated(Toy(), Recipe.load({"steps": [{**W8A8, "range": "mse", "bias_correction": True}]}))
    assert notes[0].startswith("training did not simulate bias_correction, the inputs' weight in range mse")
    _, notes = simulated(Toy(), Recipe.load({"steps": [{"scheme": "W8A8-static"}]}))
    assert notes == ["training simulated a scale for each token; data then fixed one for all"]
    assert simulated(Toy(), Recipe.load({"steps": [{"attention": "int8"}]})) == ({}, [])


def test_training_with_simulated_integers_beats_training_without():
    """At 4 bits: what was trained for the grid loses less when it is packed."""
    pytest.importorskip("accelerate", reason="the engine of training: pip install tcompress[train]")
    teacher, data = Toy(seed=0, width=32), batches()
    recipe = {"steps": [{"scheme": "W4A8"}]}
    errors = {}
    for aware in (True, False):
        student = copy.deepcopy(teacher)
        settings = {"losses": ["logits", "hidden"], "steps": 80, "lr": 2e-3, "quantization_aware": aware}
        result = tcompress.distill(student, teacher, data, recipe=recipe, **settings)
        packed = tcompress.compress(student, recipe, progress=False).model.eval()
        plain = [{k: b[k] for k in ("input_ids", "attention_mask")} for b in data]
        with torch.no_grad():
            errors[aware] = sum(float((packed(**b) - teacher.eval()(**b)).square().mean()) for b in plain)
        assert result.history.losses[0]["total"] > 0 or not aware
    assert errors[True] < 0.7 * errors[False]
