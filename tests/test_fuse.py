"""Activations and gates that move into the kernels: where they do, that the numbers stay, and where they must not."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import tcompress
from tcompress.fuse import activation_of, fuse
from tcompress.nn import FeedForward, GatedFeedForward, QuantizedLinear, SparseLinear

RECIPES = {
    name: {"steps": [{"step": "quantize", "scheme": name}]} for name in ("W8A8", "W7A7", "W4A8-g32", "W4A16-g32")
}
W8A8 = RECIPES["W8A8"]


class Nested(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, 40), act or nn.GELU(), nn.Linear(40, 16)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Statements(Nested):
    def forward(self, x):
        h = self.fc1(x)
        h = self.act(h)
        return self.fc2(h)


class Branch(Nested):
    def forward(self, x):
        h = self.fc1(x)
        if x.dim() > 1:
            h = self.act(h)
        return self.fc2(h)


class UsedTwice(Nested):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) + self.fc2(self.fc1(x))


class OtherName(Nested):
    def forward(self, x):
        h = self.fc1(x)
        a = self.act(h)
        return self.fc2(a + h)


class UsedByAnotherMethod(Nested):
    def inspect(self, x):
        return self.fc1(x)


class Inherits(Nested):
    pass


class Gated(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 70), nn.Linear(32, 70)
        self.down_proj, self.act_fn = nn.Linear(70, 32), act or nn.SiLU()

    def forward(self, x):
        """With a docstring."""
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class GatedWithDropout(Gated):
    def forward(self, x):
        return F.dropout(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), 0.1, self.training)


def compressed(model, recipe=W8A8):
    """The model unfused and fused."""
    fused = tcompress.compress(model.eval(), recipe).model
    plain = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            plain.get_submodule(parent)._modules[child] = QuantizedLinear.from_linear(module, _scheme(recipe))
    return plain.eval(), fused


def _scheme(recipe):
    return recipe["steps"][0]["scheme"]


def fused_layers(model):
    kinds = QuantizedLinear | SparseLinear
    return sorted(n for n, m in model.named_modules() if isinstance(m, kinds) and m.fused_activation != "none")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model_class", [Nested, Statements, Inherits])
def test_calls(model_class, recipe):
    torch.manual_seed(0)
    plain, fused = compressed(nn.Sequential(model_class()), RECIPES[recipe])
    assert fused_layers(fused) == ["0.fc1"]
    assert isinstance(fused[0].act, nn.Identity)
    x = torch.randn(5, 16)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_class", [Branch, UsedTwice, OtherName, UsedByAnotherMethod])
def test_what_is_not_safe_stays(model_class):
    plain, fused = compressed(nn.Sequential(model_class()))
    assert fused_layers(fused) == []
    x = torch.randn(5, 16)
    assert torch.equal(fused(x), plain(x))


@pytest.mark.parametrize("act", [nn.Tanh(), nn.LeakyReLU(), nn.PReLU(), nn.Softmax(-1), nn.Sigmoid(), nn.Dropout(0.0)])
def test_other_activations_stay(act):
    _, fused = compressed(nn.Sequential(Nested(act)))
    assert fused_layers(fused) == []
    assert type(fused[0].act) is type(act)


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (transformers.activations.ACT2FN["gelu_new"], "gelu_tanh"),
        (transformers.activations.ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
        (transformers.activations.ACT2FN["gelu"], "gelu"),
        (transformers.activations.ACT2FN["quick_gelu"], None),
        (transformers.activations.ACT2FN["relu2"], None),
        (nn.Tanh(), None),
        (nn.Identity(), None),
        (nn.LayerNorm(3), None),
    ],
)
def test_activation_of(act, name):
    assert activation_of(act) == name


def test_sequential():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Dropout(0.1), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3))
    plain, fused = compressed(model)
    assert fused_layers(fused) == ["0"]
    x = torch.randn(4, 8)
    assert torch.equal(fused(x), plain(x))


def test_a_layer_at_two_places_stays():
    shared = nn.Linear(8, 8)
    _, fused = compressed(nn.Sequential(shared, nn.ReLU(), shared))
    assert fused_layers(fused) == []


def test_hooks_stay():
    model = Nested()
    model.act.register_forward_hook(lambda *args: None)
    _, fused = compressed(nn.Sequential(model))
    assert fused_layers(fused) == []


def test_our_feed_forward():
    torch.manual_seed(0)
    plain, fused = compressed(nn.Sequential(FeedForward(16, 40, "gelu")))
    assert fused_layers(fused) == ["0.linear1"]
    x = torch.randn(5, 16)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU("tanh")])
def test_gated(act, recipe):
    torch.manual_seed(0)
    plain, fused = compressed(nn.Sequential(Gated(act)), RECIPES[recipe])
    assert isinstance(fused[0], GatedFeedForward)
    assert plain.state_dict().keys() == fused.state_dict().keys()
    for shape in ((1, 32), (3, 7, 32), (0, 32)):
        x = torch.randn(shape)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)


def test_gated_with_more_to_do_keeps_its_forward():
    plain, fused = compressed(nn.Sequential(GatedWithDropout()))
    assert fused_layers(fused) == ["0.gate_proj"]
    assert type(fused[0]) is GatedWithDropout
    x = torch.randn(5, 32)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)


def test_gated_layers_of_two_schemes_stay_apart():
    steps = [{"step": "quantize", "scheme": "W7A7", "targets": "up_proj"}, {"step": "quantize", "scheme": "W8A8"}]
    _, fused = compressed(nn.Sequential(Gated()), {"steps": steps[1:]})
    assert isinstance(fused[0], GatedFeedForward)
    mixed = tcompress.compress(nn.Sequential(Gated()).eval(), {"steps": steps}).model
    assert type(mixed[0]) is Gated


@pytest.mark.parametrize("model_class", [Nested, Gated])
def test_checkpoint(tmp_path, model_class):
    torch.manual_seed(0)
    _, fused = compressed(nn.Sequential(model_class()))
    tcompress.save(fused, tmp_path)
    loaded = tcompress.load(tmp_path, nn.Sequential(model_class()).eval())
    assert fused_layers(loaded) == fused_layers(fused)
    x = torch.randn(5, 16 if model_class is Nested else 32)
    assert torch.equal(loaded(x), fused(x))


def test_fusing_twice_changes_nothing():
    _, fused = compressed(nn.Sequential(Nested(), Gated()))
    assert fuse(fused) == []


SPARSE = {"steps": [{"step": "prune", "pattern": "8x4", "sparsity": 0.5}, {"step": "sparse"}]}
SPARSE_INT8 = {"steps": [SPARSE["steps"][0], {"step": "sparse", "scheme": "W8A8"}]}


@pytest.mark.parametrize("recipe", [SPARSE, SPARSE_INT8])
@pytest.mark.parametrize("make", [Nested, Statements, lambda: FeedForward(16, 40, "gelu")])
def test_an_activation_moves_into_a_sparse_layer(recipe, make, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(make(), nn.Linear(16, 16), nn.ReLU()).eval(), torch.randn(5, 16)
    fused = tcompress.compress(model, recipe).model
    assert fused_layers(fused) == ["0.linear1" if isinstance(model[0], FeedForward) else "0.fc1", "1"]
    assert isinstance(fused[1], SparseLinear)
    assert isinstance(fused[2], nn.Identity)
    plain = copy.deepcopy(fused)
    for module, act in ((plain[0], "act"), (plain, "2")):
        if act in module._modules:
            module._modules[act] = nn.GELU() if act == "act" else nn.ReLU()
    for module in plain.modules():
        if isinstance(module, SparseLinear):
            module.fused_activation = "none"
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    tcompress.save(fused, tmp_path)
    loaded = tcompress.load(tmp_path, nn.Sequential(make(), nn.Linear(16, 16), nn.ReLU()).eval())
    assert torch.equal(loaded(x), fused(x))
    assert torch.equal(tcompress.load(tmp_path, copy.deepcopy(fused))(x), fused(x))  # the model's activations are gone


def test_a_gated_network_of_sparse_layers_keeps_its_forward():
    torch.manual_seed(0)
    model, x = nn.Sequential(Gated()).eval(), torch.randn(5, 32)
    fused = tcompress.compress(model, SPARSE).model
    assert type(fused[0]) is Gated
    assert fused_layers(fused) == ["0.gate_proj"]
    pruned = tcompress.compress(model, {"steps": SPARSE["steps"][:1]}).model
    torch.testing.assert_close(fused(x), pruned(x), rtol=1e-4, atol=1e-5)


def test_in_place():
    model = nn.Sequential(Gated()).eval()
    tcompress.compress(model, W8A8, inplace=True)
    assert isinstance(model[0], GatedFeedForward)


def test_compile():
    torch._dynamo.reset()
    _, fused = compressed(nn.Sequential(Gated(), nn.Linear(32, 8)))
    x = torch.randn(5, 32)
    assert torch.equal(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), fused(x))
