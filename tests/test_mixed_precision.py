"""Mixed precision on a model in which one layer is much more sensitive than the others."""

import pytest
import torch
import transformers as hf
from torch import nn

import tcompress
from tcompress.mixed_precision import mixed_precision
from tcompress.nn import QuantizedLinear


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(64, 64) for _ in range(3))
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        return self.head(torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x)))))))


def model():
    torch.manual_seed(0)
    m = Model().eval()
    with torch.no_grad():
        m.second.weight[0] *= 40  # of one row in groups the others do not know, but the output does
        m.third.weight[:, 0] *= 3
    return m


def samples():
    return [torch.randn(16, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]


NAMES = {"W4A16-g32", "W8A8", "float"}


@pytest.mark.parametrize("measure", ["model", "layer"])
def test_size(measure):
    m = model()
    bits = {}
    for budget in (5.01, 7, 13):  # biases are half a bit
        found = mixed_precision(m, samples(), bits_per_weight=budget, measure=measure)
        assert found.cost <= budget
        bits[budget] = found
        assert [choice.name for choice in found.layers] == ["first", "second", "third", "head"]
        assert all(set(choice.candidates) == NAMES for choice in found.layers)
    assert {choice.chosen for choice in bits[5.01].layers} == {"W4A16-g32"}
    losses = [bits[b].loss for b in (5.01, 7, 13)]
    assert losses[0] > losses[1] > losses[2]


def test_the_recipe_does_what_was_chosen():
    m = model()
    found = mixed_precision(m, samples(), size_mb=0.013)
    result = tcompress.compress(m, found.recipe, data=samples())
    for choice in found.layers:
        layer = result.model.get_submodule(choice.name)
        name = layer.scheme.name if isinstance(layer, QuantizedLinear) else "float"
        assert name == choice.chosen
    stored = sum(r.bytes_after for r in result.report.compressed)
    floats = sum(m.get_submodule(c.name).weight.nbytes + 4 * 64 for c in found.layers if c.chosen == "float")
    assert (stored + floats) / 1e6 == pytest.approx(found.cost, rel=0.01)
    assert tcompress.Recipe.from_yaml(found.recipe.to_yaml()) == found.recipe


def test_losses_are_those_of_one_layer_at_a_time():
    m, data = model(), samples()
    found = mixed_precision(m, data, bits_per_weight=6)
    single = tcompress.compress(m, {"steps": [{"step": "quantize", "scheme": "W4A16-g32", "targets": "third"}]}).model
    with torch.no_grad():
        expected = sum(float((single(x) - m(x)).square().sum() / m(x).square().sum()) for x in data) / len(data)
    assert found.layers[2].candidates["W4A16-g32"].loss == pytest.approx(expected, rel=1e-3)
    assert found.layers[2].candidates["float"].loss == 0


def test_loss_as_the_bound():
    m = model()
    whole = mixed_precision(m, samples(), bits_per_weight=6)
    everything = sum(choice.candidates["W4A16-g32"].loss for choice in whole.layers)
    found = mixed_precision(m, samples(), max_loss=everything / 3)
    assert found.loss <= everything / 3
    assert any(choice.chosen != "W4A16-g32" for choice in found.layers)
    assert any(choice.chosen == "W4A16-g32" for choice in found.layers)


def test_latency():
    found = mixed_precision(model(), samples(), latency_ms=1e3, tokens=4, schemes=("W4A16-g32", "W8A8"))
    assert all(c.cost > 0 for choice in found.layers for c in choice.candidates.values())
    assert found.cost < 1e3


def test_a_decoder_is_judged_by_its_distribution():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    decoder = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=48, **sizes)).eval()
    ids = torch.randint(3, 40, (2, 8))
    found = mixed_precision(decoder, [{"input_ids": ids}], bits_per_weight=6, algorithm="gptq")
    name = "model.layers.0.mlp.down_proj"
    single = tcompress.compress(
        decoder, {"steps": [{"step": "quantize", "scheme": "W4A16-g32", "targets": name}]}
    ).model
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (decoder, single))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    (choice,) = [choice for choice in found.layers if choice.name == name]
    assert choice.candidates["W4A16-g32"].loss == pytest.approx(expected, rel=1e-3)
    assert "lm_head" not in {choice.name for choice in found.layers}
    assert {step.algorithm for step in found.recipe.steps} == {"gptq"}


class Tied(Model):
    """The second and the third layer have one weight, and each its bias."""

    def __init__(self):
        super().__init__()
        self.third.weight = self.second.weight


@pytest.mark.parametrize("measure", ["model", "layer"])
def test_a_tied_weight_is_counted_once_and_stays_tied(measure):
    torch.manual_seed(0)
    m = Tied().eval()
    found = mixed_precision(m, samples(), bits_per_weight=6, measure=measure)
    assert [(choice.name, choice.aliases) for choice in found.layers] == [
        ("first", ()),
        ("second", ("third",)),
        ("head", ()),
    ]
    costs = {choice.name: choice.candidates["W8A8"].cost for choice in found.layers}
    assert costs["second"] == costs["first"] + 4 * 64  # one bias more
    assert found.layers[1].candidates["float"].cost == 4 * (64 * 64 + 2 * 64)
    losses = {}
    for budget in (5.25, 9.3):  # each scheme for all
        schemes = ("W4A16-g32", "W8A8")
        found = mixed_precision(m, samples(), bits_per_weight=budget, measure=measure, schemes=schemes)
        model = tcompress.compress(m, found.recipe, data=samples()).model
        name = found.layers[1].chosen
        losses[name] = found.layers[1].candidates[name].loss
        assert model.second.scheme.name == model.third.scheme.name == name
        shared = [
            layer.qdata if layer.kernel_weight is None else layer.kernel_weight for layer in (model.second, model.third)
        ]
        assert shared[0].data_ptr() == shared[1].data_ptr()
    assert len(losses) == 2
    single = {"steps": [{"step": "quantize", "scheme": "W8A8", "targets": ["second", "third"]}]}
    if measure == "model":
        other = tcompress.compress(m, single).model
        with torch.no_grad():
            expected = sum(float((other(x) - m(x)).square().sum() / m(x).square().sum()) for x in samples()) / 2
        assert losses["W8A8"] == pytest.approx(expected, rel=1e-3)


def test_latency_of_tied_layers():
    found = mixed_precision(Tied().eval(), samples(), latency_ms=1e3, tokens=4, schemes=("W8A8",))
    assert len(found.layers) == 3


def test_errors():
    with pytest.raises(ValueError, match=r"mixed_precision: budget: got none, expected one of"):
        mixed_precision(model(), samples())
    with pytest.raises(ValueError, match=r"mixed_precision: budget: got \['max_loss', 'size_mb'\], expected one of"):
        mixed_precision(model(), samples(), size_mb=1, max_loss=1)
    with pytest.raises(ValueError, match=r"mixed_precision: bits_per_weight: budget: got .*, expected at least"):
        mixed_precision(model(), samples(), bits_per_weight=3)
    with pytest.raises(ValueError, match="got one in which no layer is quantized"):
        mixed_precision(model(), samples(), size_mb=10)
    with pytest.raises(ValueError, match="Scheme: name: got 'W9'"):
        mixed_precision(model(), samples(), size_mb=1, schemes=("W9",))
    with pytest.raises(ValueError, match=r"mixed_precision: schemes: got \['W8A8-static'\], expected dynamic"):
        mixed_precision(model(), samples(), size_mb=1, schemes=("W8A8-static",))
