"""Checkpoints: bit for bit there and back, and no way to lose or to misread one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig

import tcompress
from tcompress.formats import checkpoint
from tcompress.nn import QuantizedEmbedding, QuantizedLinear

RECIPE = {
    "steps": [
        {"step": "quantize", "scheme": "W8A8", "ignore": []},
        {"step": "quantize", "scheme": "W8A16", "targets": ["Embedding"], "ignore": []},
    ]
}


def _plain(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(7, 12, padding_idx=1), nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 3, False))


def _compressed(seed: int = 0) -> nn.Module:
    return tcompress.compress(_plain(seed), RECIPE).model


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "tcompress.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


def _tensors(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


@pytest.fixture
def saved(tmp_path) -> Path:
    return tcompress.save(_compressed(), tmp_path / "model")


def test_round_trip_is_bit_exact(saved):
    model = _compressed()
    loaded = tcompress.load(saved, _plain(seed=1))
    assert _equal(_state(loaded), _state(model))
    assert [type(m) for m in loaded] == [type(m) for m in model]
    assert loaded[0].padding_idx == 1
    assert loaded[1].scheme == model[1].scheme
    ids = torch.tensor([[0, 1, 6]])
    assert torch.equal(loaded(ids), model(ids))


def test_two_plain_files(saved):
    assert sorted(p.suffix for p in saved.iterdir()) == [".json", ".safetensors"]
    header = int.from_bytes(_tensors(saved).read_bytes()[:8], "little")
    names = json.loads(_tensors(saved).read_bytes()[8 : 8 + header])
    assert set(names) - {"__metadata__"} == set(_compressed().state_dict())
    assert not any("kernel" in name for name in names)


def test_into_an_already_compressed_model(saved):
    target = _compressed(seed=3)
    assert _equal(_state(tcompress.load(saved, target)), _state(_compressed()))


@pytest.mark.parametrize("config", [BertConfig, LlamaConfig])
def test_into_a_compressed_model_whose_activations_are_fused(tmp_path, config):
    """They stand in the kernels that the checkpoint's layers take the place of."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        plain = AutoModel.from_config(config(vocab_size=64, **sizes)).eval()
        models.append(tcompress.compress(plain, RECIPE).model)
    tcompress.save(models[0], tmp_path)
    ids = torch.arange(6)[None]
    expected = models[0](ids)[0]
    assert not torch.equal(models[1](ids)[0], expected)
    assert torch.equal(tcompress.load(tmp_path, models[1])(ids)[0], expected)


def test_shared_modules_and_tied_parameters(tmp_path):
    def make() -> nn.Module:
        linear, norm = nn.Linear(4, 4), nn.LayerNorm(4)
        return nn.ModuleDict({"a": linear, "b": nn.Sequential(linear, norm), "c": norm})

    model = tcompress.compress(make(), RECIPE).model
    tcompress.save(model, tmp_path)
    loaded = tcompress.load(tmp_path, make())
    assert loaded["a"] is loaded["b"][0]
    assert loaded["c"].weight is loaded["b"][1].weight
    assert _equal(_state(loaded), _state(model))
    assert _tensors(tmp_path).stat().st_size < 1500


def test_hugging_face_model_needs_no_model(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    original = GPT2LMHeadModel(config).bfloat16().eval()
    original.generation_config.max_new_tokens = 3
    model = tcompress.compress(original).model
    tcompress.save(model, tmp_path)
    loaded = tcompress.load(tmp_path)
    assert isinstance(loaded, GPT2LMHeadModel)
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert loaded.generation_config.max_new_tokens == 3
    assert _equal(_state(loaded), _state(model))
    ids = torch.arange(6)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_other_models_need_one(saved):
    with pytest.raises(ValueError, match="load: model: got None, expected a model of the original architecture"):
        tcompress.load(saved)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (nn.Sequential(nn.Embedding(7, 12), nn.Linear(12, 8)), "no module '3'"),
        (nn.Sequential(nn.Embedding(7, 12), nn.Linear(12, 9), nn.LayerNorm(8), nn.Linear(8, 3, False)), r"\[9, 12\]"),
        (nn.Sequential(nn.Embedding(7, 12), nn.Linear(12, 8), nn.LayerNorm(9), nn.Linear(8, 3, False)), "shape of 2."),
        (nn.Sequential(nn.Embedding(7, 12), nn.Linear(12, 8), nn.Identity(), nn.Linear(8, 3, False)), "unexpected key"),
        (nn.Sequential(nn.Linear(7, 12), nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 3, False)), "embedding"),
        (nn.Sequential(*_plain(), nn.LayerNorm(3)), "missing key 4.weight"),
    ],
)
def test_wrong_architecture_changes_nothing(saved, target, problem):
    before, kinds = _state(target), [type(m) for m in target]
    with pytest.raises(ValueError, match=problem):
        tcompress.load(saved, target)
    assert _equal(_state(target), before)
    assert [type(m) for m in target] == kinds


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_file(saved, keep):
    path = _tensors(saved)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="bytes, expected .*truncated"):
        tcompress.load(saved, _plain())


def test_damaged_header(saved):
    path = _tensors(saved)
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no safetensors"):
        tcompress.load(saved, _plain())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": 2}, "load: version: got 2, expected 1"),
        ({"version": None}, "load: version: got None"),
        ({"extra": 1}, "wrong content"),
        ({"tensors": "../elsewhere.safetensors"}, "without folders"),
        ({"aliases": {"x": "y"}}, "missing key y"),
        ({"modules": {"1": "9"}}, "a reference to '9'"),
    ],
)
def test_damaged_metadata(saved, changes, problem):
    _edit(saved, **changes)
    with pytest.raises(ValueError, match=problem):
        tcompress.load(saved, _plain())


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_metadata_that_is_no_json_object(saved, text):
    (saved / "tcompress.json").write_text(text)
    with pytest.raises(ValueError, match="load: "):
        tcompress.load(saved, _plain())


def test_unknown_model_class(tmp_path):
    model = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    tcompress.save(tcompress.compress(model).model, tmp_path)
    info = json.loads((tmp_path / "tcompress.json").read_text())["transformers"]
    for name in ("NoSuchModel", "AutoTokenizer", "__name__"):
        _edit(tmp_path, transformers=info | {"class": name})
        with pytest.raises(ValueError, match="load: class: got"):
            tcompress.load(tmp_path)


def test_missing_files(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"load: directory: got .*tcompress.json"):
        tcompress.load(tmp_path / "nowhere", _plain())
    _tensors(saved).unlink()
    with pytest.raises(FileNotFoundError, match="load: tensors"):
        tcompress.load(saved, _plain())


def test_saving_over_a_checkpoint_leaves_two_files(saved):
    other = saved / "model-0001.safetensors"
    other.write_bytes(b"someone else's")
    tcompress.save(_compressed(seed=5), saved)
    assert other.exists()
    other.unlink()
    assert len(list(saved.iterdir())) == 2
    assert _equal(_state(tcompress.load(saved, _plain())), _state(_compressed(seed=5)))


def _full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


def _half_written(tensors: dict[str, torch.Tensor], path: Path, metadata: object = None) -> None:
    Path(path).write_bytes(b"half")
    raise SafetensorError("I/O error: No space left on device")


@pytest.mark.parametrize(
    ("place", "name", "failure"),
    [
        (checkpoint, "save_file", _half_written),
        (checkpoint, "hugging_face_info", _full_disk),
        (os, "replace", _full_disk),
        (Path, "write_text", _full_disk),
    ],
)
def test_failed_save_leaves_the_old_checkpoint(saved, monkeypatch, place, name, failure):
    files = sorted(saved.iterdir())
    with monkeypatch.context() as m:
        m.setattr(place, name, failure)
        with pytest.raises(OSError, match="No space left"):
            tcompress.save(_compressed(seed=5), saved)
    assert sorted(saved.iterdir()) == files
    assert _equal(_state(tcompress.load(saved, _plain())), _state(_compressed()))


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(TypeError, match="save: model: got dict"):
        tcompress.save({}, tmp_path)
    with pytest.raises(ValueError, match="without compressed modules"):
        tcompress.save(_plain(), tmp_path / "a")
    with pytest.raises(ValueError, match="meta device"):
        tcompress.save(nn.Sequential(QuantizedLinear(4, 4, device="meta")), tmp_path / "a")
    with pytest.raises(ValueError, match="single compressed layer"):
        tcompress.save(QuantizedEmbedding(4, 4), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        tcompress.save(_compressed(), tmp_path / "file")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 40), k=st.integers(1, 40), bias=st.booleans(), seed=st.integers(0, 9))
def test_any_shape(tmp_path, n, k, bias, seed):
    torch.manual_seed(seed)
    model = tcompress.compress(nn.Sequential(nn.Linear(k, n, bias)), RECIPE, progress=False).model
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    tcompress.save(model, folder)
    assert _equal(_state(tcompress.load(folder, nn.Sequential(nn.Linear(k, n, bias)))), _state(model))


def test_an_interrupt_just_after_the_new_checkpoint_is_in_place(saved, monkeypatch):
    replace = os.replace

    def interrupted(source, target):
        replace(source, target)
        raise KeyboardInterrupt

    newer = _compressed(seed=1)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tcompress.save(newer, saved)
    monkeypatch.undo()
    assert _equal(_state(tcompress.load(saved, _plain())), _state(newer))
