"""Checkpoints of sparse layers: bit for bit there and back, and no model harmed by a damaged one."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import tcompress
from tcompress import use_backend
from tcompress.nn import QuantizedLinear, SparseLinear
from tcompress.prune import magnitude_mask

FLOATS = {"steps": [{"step": "sparse", "min_sparsity": 0}]}
INTEGERS = {"steps": [{"step": "sparse", "scheme": "W8A8", "min_sparsity": 0}]}
pytestmark = pytest.mark.filterwarnings("ignore::tcompress.errors.CompressionWarning")


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch):
    monkeypatch.setenv("TCOMPRESS_TUNE", "0")


def _plain(seed: int = 0, pattern: str = "unstructured", sparsity: float = 0.6) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(40, 24), nn.LayerNorm(24), nn.Linear(24, 17, False))
    with torch.no_grad():
        for i in (0, 2):
            mask = magnitude_mask(model[i].weight, pattern, None if ":" in pattern else sparsity)
            model[i].weight.mul_(mask)
    return model


def _compressed(recipe: dict[str, object] = INTEGERS, **kwargs) -> nn.Module:
    return tcompress.compress(_plain(**kwargs), recipe).model


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def _edit(folder: Path, module: str, **changes: object) -> None:
    path = folder / "tcompress.json"
    content = json.loads(path.read_text())
    content["modules"][module] |= changes
    path.write_text(json.dumps(content))


def _replace_tensors(folder: Path, change) -> None:
    """Writes other tensors, with the size of the file made right: what is wrong is inside."""
    (file,) = folder.glob("*.safetensors")
    save_file(change(load_file(file)), file)
    path = folder / "tcompress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tensors_bytes": file.stat().st_size}))


@pytest.fixture
def saved(tmp_path) -> Path:
    return tcompress.save(_compressed(pattern="unstructured"), tmp_path / "model")


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x4", "8x4", "16x16"])
@pytest.mark.parametrize(("sparsity", "kind"), [(0.6, "bitmap"), (0.97, "delta")])
@pytest.mark.parametrize("recipe", [FLOATS, INTEGERS])
def test_round_trip_is_bit_exact(tmp_path, recipe, sparsity, kind, pattern):
    model = _compressed(recipe, pattern=pattern, sparsity=sparsity)
    tcompress.save(model, tmp_path)
    assert not any("kernel" in name for name in load_file(next(tmp_path.glob("*.safetensors"))))
    before = _plain(seed=1)
    loaded = tcompress.load(tmp_path, before)
    assert loaded is before
    assert _equal(_state(loaded), _state(model))
    assert [type(m) for m in loaded] == [SparseLinear, nn.LayerNorm, SparseLinear]
    for ours, theirs in ((loaded[0], model[0]), (loaded[2], model[2])):
        assert repr(ours) == repr(theirs)
        assert ours.training == theirs.training
    x = torch.randn(5, 40)
    assert torch.equal(loaded(x), model(x))
    if pattern == "unstructured":
        assert f"0.weight_{kind}" in loaded.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(tmp_path, dtype):
    model = tcompress.compress(_plain().to(dtype), FLOATS).model
    tcompress.save(model, tmp_path)
    loaded = tcompress.load(tmp_path, _plain(1).to(dtype))
    assert _equal(_state(loaded), _state(model))
    assert loaded[0].bias.dtype == loaded[0].weight.dtype == dtype
    half_way = tcompress.load(tmp_path, _plain(1))  # the checkpoint's types, whatever the model's
    assert _equal(_state(half_way), _state(model))


def test_a_cast_model_keeps_its_values(tmp_path):
    model = _compressed(FLOATS).half()
    tcompress.save(model, tmp_path)
    loaded = tcompress.load(tmp_path, _plain(1).half())
    assert _equal(_state(loaded), _state(model))
    assert loaded[0].packed.values.dtype == torch.float32
    x = torch.randn(5, 40, dtype=torch.float16)
    assert torch.equal(loaded(x), model(x))


def test_into_compressed_models(saved):
    expected = _state(_compressed())
    for target in (_compressed(seed=3, sparsity=0.9), _compressed(FLOATS, pattern="8x4"), _quantized()):
        assert _equal(_state(tcompress.load(saved, target)), expected)


def _quantized() -> nn.Module:
    return tcompress.compress(_plain(), {"steps": [{"step": "quantize", "scheme": "W8A8"}]}).model


def test_an_int8_checkpoint_into_a_sparse_model(tmp_path):
    model = _quantized()
    tcompress.save(model, tmp_path)
    loaded = tcompress.load(tmp_path, _compressed())
    assert isinstance(loaded[0], QuantizedLinear)
    assert _equal(_state(loaded), _state(model))


def test_on_a_machine_without_kernels(saved):
    model, x = _compressed(), torch.randn(5, 40)
    with use_backend("reference"):
        loaded = tcompress.load(saved, _plain(1))
        assert torch.equal(loaded(x), model(x))
        assert _equal(_state(loaded), _state(model))
        tcompress.save(loaded, saved)
    assert _equal(_state(tcompress.load(saved, _plain(1))), _state(model))


def test_shared_modules(tmp_path):
    def make() -> nn.Module:
        linear = _plain()[0]
        return nn.ModuleDict({"a": linear, "b": nn.Sequential(linear), "c": _plain(1)[0]})

    model = tcompress.compress(make(), INTEGERS).model
    tcompress.save(model, tmp_path)
    loaded = tcompress.load(tmp_path, make())
    assert loaded["a"] is loaded["b"][0]
    assert _equal(_state(loaded), _state(model))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"in_features": 41}, r"\[24, 40\]"),
        ({"in_features": -40}, r"\[24, 40\]"),
        ({"out_features": 10**15}, r"\[24, 40\]"),
        ({"in_features": 24, "out_features": 40}, r"\[24, 40\]"),
        ({"scheme": None}, "wrong description .*scale: got None"),
        ({"dtype": "float32"}, "wrong description"),
        ({"dtype": "float64"}, "wrong content"),
        ({"dtype": "save"}, "wrong content"),
        ({"bias": None}, "without bias"),
        ({"bias": "int8"}, "wrong content"),
        ({"bias": "float16"}, "dtype of 0.bias"),
        ({"pattern": "stripes"}, "wrong description .*'stripes'"),
        ({"pattern": "99x99"}, "wrong description"),
        ({"pattern": "2:4"}, "wrong description .*index_kind"),
        ({"pattern": "8x4"}, "a damaged weight"),
        ({"index_kind": "delta"}, "missing key 0.weight_delta"),
        ({"index_kind": "positions"}, "wrong description"),
        ({"index_kind": "magic"}, "wrong content"),
        ({"values": 3}, "shape of 0.weight_values"),
        ({"values": -1}, "wrong content"),
        ({"values": 10**15}, "shape of 0.weight_values"),
        ({"index": 10**15}, "shape of 0.weight_bitmap"),
        ({"index": None}, "wrong content"),
        ({"layout": "16x16"}, "wrong description .*layout: got '16x16'"),
        ({"layout": "unstructured"}, "wrong description .*layout: got 'unstructured'"),
        ({"activation": "__import__"}, "wrong description .*activation"),
        ({"kind": "QuantizedLinear"}, "wrong content"),
        ({"extra": 1}, "wrong content"),
    ],
)
def test_a_hostile_description_changes_nothing(saved, changes, problem):
    _edit(saved, "0", **changes)
    target = _plain(1)
    before = _state(target)
    with pytest.raises(ValueError, match="load: ") as caught:
        tcompress.load(saved, target)
    assert re.search(problem, str(caught.value)), str(caught.value)
    assert _equal(_state(target), before)
    assert [type(m) for m in target] == [nn.Linear, nn.LayerNorm, nn.Linear]


@pytest.mark.parametrize("scheme", ["W8A16", "W4A8"])
def test_a_scheme_that_no_sparse_layer_computes(saved, scheme):
    _edit(saved, "0", scheme=tcompress.Scheme.named(scheme).model_dump(mode="json"))
    with pytest.raises(ValueError, match="wrong description .*scheme"):
        tcompress.load(saved, _plain(1))


@pytest.mark.parametrize("key", ["weight_values", "weight_bitmap"])
@pytest.mark.parametrize("recipe", [FLOATS, INTEGERS])
def test_damaged_tensors_change_nothing(tmp_path, recipe, key):
    """Of the right shape and type, and an index that no weight has: found before the model is touched."""
    tcompress.save(_compressed(recipe), tmp_path)
    damaged = {
        "weight_bitmap": lambda t: torch.full_like(t, 255),
        "weight_values": lambda t: t[:-1].clone(),
    }[key]
    _replace_tensors(tmp_path, lambda tensors: tensors | {f"2.{key}": damaged(tensors[f"2.{key}"])})
    if key == "weight_values":
        content = json.loads((tmp_path / "tcompress.json").read_text())["modules"]["2"]
        _edit(tmp_path, "2", values=content["values"] - 1)
    for target in (_plain(1), _compressed(recipe, seed=1)):
        before, kinds = _state(target), [type(m) for m in target]
        with pytest.raises(ValueError, match="load: module 2: got a damaged weight .*values: got .* by the index"):
            tcompress.load(tmp_path, target)
        assert _equal(_state(target), before)
        assert [type(m) for m in target] == kinds


@pytest.mark.parametrize("index", [[255] * 4, [255, 255, 255, 200], [254] * 4])
def test_a_malformed_delta_index(tmp_path, index):
    tcompress.save(_compressed(sparsity=0.99), tmp_path)
    _replace_tensors(tmp_path, lambda t: t | {"2.weight_delta": torch.tensor(index, dtype=torch.uint8)})
    _edit(tmp_path, "2", index=4)
    with pytest.raises(ValueError, match="load: module 2: got a damaged weight"):
        tcompress.load(tmp_path, _plain(1))


def test_positions_that_no_group_has(tmp_path):
    tcompress.save(_compressed(pattern="2:4"), tmp_path)
    _replace_tensors(tmp_path, lambda t: t | {"2.weight_positions": torch.zeros_like(t["2.weight_positions"])})
    with pytest.raises(ValueError, match="load: module 2: got a damaged weight"):
        tcompress.load(tmp_path, _plain(1))


def test_missing_and_additional_tensors(saved):
    def without(tensors):
        return {key: value for key, value in tensors.items() if key != "0.weight_scale"}

    _replace_tensors(saved, without)
    with pytest.raises(ValueError, match="missing key 0.weight_scale"):
        tcompress.load(saved, _plain(1))
    _replace_tensors(saved, lambda t: t | {"0.weight_scale": torch.ones(24), "0.weight_delta": torch.ones(3)})
    with pytest.raises(ValueError, match="unexpected key 0.weight_delta"):
        tcompress.load(saved, _plain(1))


def test_a_layer_on_the_meta_device_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="meta device"):
        tcompress.save(_compressed().to("meta"), tmp_path)


def test_the_file_is_as_small_as_the_report_says(tmp_path):
    result = tcompress.compress(_plain(sparsity=0.9), FLOATS)
    tcompress.save(result.model, tmp_path)
    tensors = load_file(next(tmp_path.glob("*.safetensors")))
    assert sum(t.nbytes for t in tensors.values()) == result.report.after.disk < 0.3 * result.report.before.disk


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    bias=st.booleans(),
    sparsity=st.floats(0, 1),
    recipe=st.sampled_from([FLOATS, INTEGERS]),
)
def test_any_shape(tmp_path, n, k, bias, sparsity, recipe):
    torch.manual_seed(n)
    plain = nn.Sequential(nn.Linear(k, n, bias))
    with torch.no_grad():
        plain[0].weight.mul_(torch.rand(n, k) > sparsity)
    model = tcompress.compress(plain, recipe, progress=False).model
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    tcompress.save(model, folder)
    loaded = tcompress.load(folder, copy.deepcopy(plain))
    assert _equal(_state(loaded), _state(model))
