"""A run with transforms that is cut off goes on behind the last one that was finished; `test_resume_run` kills some."""

from __future__ import annotations

import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

import tcompress
from tcompress import transform
from tcompress.errors import CompressionWarning
from tcompress.resume import StageStore

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent / "integrations"))
from tiny_models import bert, ids, llama, made

GPTQ = {"step": "quantize", "scheme": "W4A16-g32", "algorithm": "gptq"}
#: By name: a model, and steps, of which the last is no transform.
RUNS = {
    "scales": (llama, {"tie_word_embeddings": True}, [{"step": "rotate"}, {"step": "smooth"}, {"step": "awq"}, GPTQ]),
    "structure": (
        llama,
        {"num_hidden_layers": 4, "initializer_range": 0.02},
        [
            {"step": "shrink", "structure": "layers", "ratio": 0.25},
            {"step": "shrink", "structure": "channels", "ratio": 0.5},
            {"step": "low_rank", "ratio": 0.5, "targets": ["*down_proj"]},
            {"step": "codebook", "targets": ["*up_proj"]},
            {"step": "share", "targets": ["*q_proj"], "group": 3},
            GPTQ,
        ],
    ),
}


def compressed(name, folder=None, steps=None, **options):
    factory, changes, own = RUNS[name]
    model, data = made(factory, **changes), [{"input_ids": ids(2, seed=i)} for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        recipe = {"steps": own if steps is None else steps}
        return tcompress.compress(model, recipe, data, resume=folder, progress=False, **options)


@cache
def whole(name):
    return compressed(name)


def same(one, other):
    a, b = ({k: v for k, v in r.model.state_dict().items() if v is not None} for r in (one, other))
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key
    assert one.report == other.report
    assert one.model.config.to_dict() == other.model.config.to_dict()
    assert [str(m) for m in one.model.modules()] == [str(m) for m in other.model.modules()]
    assert len(list(one.model.parameters())) == len(list(other.model.parameters()))  # tied ones once
    x = {"input_ids": ids(1, seed=9)}
    with torch.no_grad():
        assert torch.equal(one.model(**x).logits, other.model(**x).logits)


class Cut(Exception):
    """Ends a run."""


def cut(after, name, folder):
    """A run that ends when so many stages were kept."""
    save, done = StageStore.save, []

    def counted(self, *args):
        save(self, *args)
        done.append(1)
        if len(done) == after:
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageStore, "save", counted)
        with pytest.raises(Cut):
            compressed(name, folder)


@pytest.fixture
def ran(monkeypatch):
    """The kinds of the transforms that were run."""
    kinds = []
    for kind, run in list(transform._RUN.items()):

        def noted(work, step, run=run):
            kinds.append(step.step)
            run(work, step)

        monkeypatch.setitem(transform._RUN, kind, noted)
    return kinds


@pytest.mark.parametrize(("name", "after"), [("scales", 1), ("scales", 4), ("structure", 2), ("structure", 5)])
def test_a_run_that_was_cut_off_goes_on(tmp_path, name, after, ran):
    cut(after, name, tmp_path)
    transforms = [step["step"] for step in RUNS[name][2][:-1]]
    kept = min(after, len(transforms))
    assert f"transform-{kept - 1}" in [p.stem for p in tmp_path.glob("*.safetensors")]
    ran.clear()
    result = compressed(name, tmp_path)
    assert ran == transforms[kept:]
    same(result, whole(name))


def test_a_finished_run_is_read_again(tmp_path, ran):
    same(compressed("scales", tmp_path), whole("scales"))
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", "transform-2.safetensors", "layers"}
    assert (tmp_path / "layers" / "run.json").is_file()
    ran.clear()
    same(compressed("scales", tmp_path), whole("scales"))
    assert ran == []


def test_transforms_alone(tmp_path, ran):
    steps = RUNS["structure"][2][:2]
    first = compressed("structure", tmp_path, steps)
    assert not any("resume" in warning for warning in first.report.warnings)
    ran.clear()
    again = compressed("structure", tmp_path, steps, inplace=True)
    assert ran == []
    same(again, first)
    tcompress.save(again.model, tmp_path.parent / "saved")
    assert torch.equal(tcompress.load(tmp_path.parent / "saved").lm_head.weight, again.model.lm_head.weight)


def test_another_run_is_refused(tmp_path):
    compressed("structure", tmp_path, RUNS["structure"][2][:1])
    for steps in (RUNS["structure"][2][:2], [GPTQ]):
        with pytest.raises(ValueError, match="compress: resume: got .*, the folder of another run, expected its own"):
            compressed("structure", tmp_path, steps)


def test_a_damaged_transform_stops_the_run(tmp_path):
    compressed("structure", tmp_path, RUNS["structure"][2][:1])
    (tmp_path / "transform-0.safetensors").write_bytes(b"\0")
    with pytest.raises(ValueError, match="compress: resume: got .*transform-0.safetensors, damaged"):
        compressed("structure", tmp_path, RUNS["structure"][2][:1])


def test_distillation_that_is_done_is_not_run_again(tmp_path, ran):
    prune = {"step": "prune", "pattern": "unstructured", "sparsity": 0.5}
    distill = {"step": "distill", "steps": 2}
    steps = [prune, distill, {"step": "smooth"}, {"step": "quantize", "scheme": "W8A8"}]
    first = compressed("scales", tmp_path, steps)
    ran.clear()
    again = compressed("scales", tmp_path, steps)
    assert ran == []
    same(again, first)
    assert float((again.model.model.layers[0].mlp.up_proj.weight_packed == 0).float().mean()) > 0.45


def test_layouts_in_memory_are_kept(tmp_path):
    from tcompress.transform_store import TransformStore

    model, other = (made(bert) for _ in range(2))
    layer = model.encoder.layer[0].attention.output.dense
    layer.weight.data = torch.randn(64, 64).t()
    store = TransformStore(tmp_path, "one", model)
    store.save(0, model, ["a note"], [])
    assert store.last(3) == 0
    notes, layers = store.load(0, other)
    assert (notes, layers) == (["a note"], [])
    weight = other.encoder.layer[0].attention.output.dense.weight
    assert torch.equal(weight, layer.weight)
    assert weight.stride() == layer.weight.stride() == (1, 64)
    assert all(p.data_ptr() % 64 == 0 for p in other.parameters())
