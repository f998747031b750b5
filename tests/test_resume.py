from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tcompress import Recipe
from tcompress.resume import StageStore, fingerprint

RECIPE = Recipe.load({"steps": [{"scheme": "W4A16-g32", "algorithm": "gptq"}]})


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def samples():
    return [{"x": torch.arange(8.0), "mask": None}, (torch.ones(2, 8, dtype=torch.bfloat16), 3)]


def test_the_fingerprint_is_of_contents():
    expected = fingerprint(model(), RECIPE, samples())
    assert fingerprint(copy.deepcopy(model()), RECIPE, samples()) == expected
    half = model()
    half[0].bias.data[3] += 1e-3
    changed = samples()
    changed[1][0][1, 7] = 2
    others = [
        fingerprint(half, RECIPE, samples()),
        fingerprint(model().half(), RECIPE, samples()),
        fingerprint(model(), RECIPE.model_copy(update={"inputs": "original"}), samples()),
        fingerprint(model(), RECIPE, changed),
        fingerprint(model(), RECIPE, samples()[:1]),
        fingerprint(model(), RECIPE, [{"y": torch.arange(8.0), "mask": None}, samples()[1]]),
    ]
    assert len({expected, *others}) == 7


def test_what_is_saved_is_loaded(tmp_path):
    tensors = {"a": torch.arange(6, dtype=torch.int8).view(2, 3).t(), "b": torch.tensor([torch.nan, torch.inf])}
    StageStore(tmp_path / "new" / "run", "one").save("0-1", tensors, {"notes": ["ä"]})
    store = StageStore(tmp_path / "new" / "run", "one")
    found, info = store.load("0-1")
    assert torch.equal(found["a"], tensors["a"])
    assert torch.equal(found["b"].nan_to_num(1), tensors["b"].nan_to_num(1))
    assert info == {"notes": ["ä"]}
    assert store.load("0-2") is None


def test_nothing_half_written_counts(tmp_path):
    store = StageStore(tmp_path, "one")
    (tmp_path / "0.safetensors.tmp").write_bytes(b"cut")
    assert StageStore(tmp_path, "one").load("0") is None
    store.save("0", {}, [])
    assert store.load("0") == ({}, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.safetensors", "run.json"]


def test_another_run_is_refused_and_kept(tmp_path):
    StageStore(tmp_path, "one").save("0", {"a": torch.ones(1)}, 1)
    with pytest.raises(ValueError, match=r"^compress: resume: got .*, the folder of another run, expected its own; "):
        StageStore(tmp_path, "two")
    assert StageStore(tmp_path, "one").load("0") is not None


@pytest.mark.parametrize("content", ["{", "[]", b"\xff\xfe"])
def test_a_damaged_run_file(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="the folder of another run"):
        StageStore(tmp_path, "one")


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"^compress: resume: got .*, which holds other files, expected "):
        StageStore(tmp_path, "one")
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("content", [b"", b"\x10" + bytes(30), None])
def test_a_damaged_stage(tmp_path, content):
    store = StageStore(tmp_path, "one")
    store.save("0", {"a": torch.ones(100)}, 1)
    path = tmp_path / "0.safetensors"
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    with pytest.raises(ValueError, match=r"^compress: resume: got .*0.safetensors, damaged .*, expected "):
        store.load("0")
