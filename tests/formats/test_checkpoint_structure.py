"""Checkpoints of models whose structure is not that of their architecture: narrower, shorter, tied, factored."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import tcompress
from tcompress.structure import carry, describe_structure, is_marked, mark_attributes, mark_kept, mark_size, restore


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x))) * (self.index + 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(i) for i in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def net(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


DATA = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
STEPS = [
    {"step": "shrink", "structure": "channels", "ratio": 0.5},
    {"step": "share", "group": 2},
    {"step": "low_rank", "ratio": 0.6, "targets": ["down"]},
    {"step": "codebook", "bits": 3},
]


def compressed(*steps, model=None):
    return tcompress.compress(model or net(), {"steps": list(steps)}, DATA).model


@pytest.mark.parametrize("count", range(1, 5))
def test_one_step_after_another(count, tmp_path):
    model = compressed(*STEPS[:count])
    loaded = tcompress.load(tcompress.save(model, tmp_path), net(seed=1))
    assert torch.equal(loaded(DATA), model(DATA))
    again = tcompress.load(tcompress.save(loaded, tmp_path / "again"), net(seed=2))
    assert torch.equal(again(DATA), model(DATA))


def test_several_calls(tmp_path):
    model = net()
    for step in STEPS[:3]:
        model = compressed(step, model=model)
    loaded = tcompress.load(tcompress.save(model, tmp_path), net(seed=1))
    assert torch.equal(loaded(DATA), model(DATA))
    assert loaded.layers[0].up.weight is loaded.layers[1].up.weight


def dropped(model, kept):
    model.layers = nn.ModuleList(model.layers[i] for i in kept)
    mark_kept(model.layers, kept)
    return model


def test_which_layers_are_left(tmp_path):
    """Where the blocks differ, by what they know of their place here, it matters which of them are left."""
    model = dropped(net(), [0, 1, 3])
    loaded = tcompress.load(tcompress.save(model, tmp_path), net(seed=1))
    assert [block.index for block in loaded.layers] == [0, 1, 3]
    assert torch.equal(loaded(DATA), model(DATA))
    short = nn.ModuleList(model.layers[i] for i in (0, 2))
    carry(model.layers, short)
    mark_kept(short, [0, 2])  # of what was left
    model.layers = short
    assert describe_structure(model)["layers"].kept == (0, 3)
    loaded = tcompress.load(tcompress.save(model, tmp_path), net(seed=1))
    assert torch.equal(loaded(DATA), model(DATA))


def test_marks_go_along():
    model = net()
    assert not is_marked(model)
    mark_size(model.layers[1].up)
    mark_attributes(model.layers[1], ["index"])
    found = describe_structure(copy.deepcopy(model))
    assert found["layers.1.up"].size == (16, 8)
    assert found["layers.1"].attributes == {"index": 1}
    assert set(found) == {"layers.1.up", "layers.1"}
    new = carry(model.layers[1].up, nn.Linear(8, 12))
    assert is_marked(new)
    assert not is_marked(carry(model.layers[0].up, nn.Linear(8, 12)))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"layers.9": {}}, "no module 'layers.9'"),
        ({"layers": {"kept": [0, 7]}}, "got 4 members"),
        ({"layers.0": {"kept": [0]}}, "got Block, expected a ModuleList"),
        ({"layers.0": {"attributes": {"heads": 3}}}, "without a whole number 'heads'"),
        ({"layers.0": {"attributes": {"forward": 3}}}, "without a whole number 'forward'"),
        ({"layers.0.up": {"size": [5, 8]}}, "does not fit"),
    ],
)
def test_a_model_that_it_does_not_fit_is_left_as_it_was(tmp_path, change, problem):
    folder = tcompress.save(compressed(STEPS[0]), tmp_path)
    content = json.loads((folder / "tcompress.json").read_text())
    content["structure"] |= change
    (folder / "tcompress.json").write_text(json.dumps(content))
    model = net(seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=problem):
        tcompress.load(folder, model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [block.index for block in model.layers] == [0, 1, 2, 3]
    assert (model.layers[0].up.out_features, len(model.layers)) == (16, 4)
    assert not is_marked(model)
    model(DATA)


def test_it_can_be_undone():
    model = net()
    expected = model(DATA)
    undo = restore(model, describe_structure(dropped(net(), [0, 2])))
    assert len(model.layers) == 2
    undo()
    assert torch.equal(model(DATA), expected)


@pytest.mark.parametrize("steps", [STEPS[:1], STEPS[2:3], STEPS[3:], STEPS[:1] + STEPS[3:]])
def test_torchs_encoder(steps, tmp_path):
    """In evaluation mode it would read the weights of its layers instead of calling them."""

    def make():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    x = torch.randn(4, 6, 16)
    steps = [{**step, "targets": ["linear1", "linear2"]} for step in steps]
    model = tcompress.compress(make(), {"steps": steps}, x).model
    assert any("linear" in name for name in describe_structure(model)) == ("shrink" in {s["step"] for s in steps})
    loaded = tcompress.load(tcompress.save(model, tmp_path), make())
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        assert torch.nn.functional.cosine_similarity(model(x).flatten(), make()(x).flatten(), 0) > 0.8


def test_a_plain_model_is_still_refused(tmp_path):
    with pytest.raises(ValueError, match="without compressed modules"):
        tcompress.save(net(), tmp_path)
