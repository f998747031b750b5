"""What the benchmark of models reads and computes by itself: files, tokens, distances, scores."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="the models of model_quality.py are of transformers")

import model_quality  # noqa: E402
from quality import albert, assets, glassllm, whisper  # noqa: E402
from quality.ctranslate2_file import read_variables  # noqa: E402
from quality.dinov2 import Probe  # noqa: E402
from quality.subject import Scores, Subject  # noqa: E402

import tcompress  # noqa: E402


def _subject(**options: object) -> Subject:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4)).eval()
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))

    def evaluate(m: nn.Module) -> Scores:
        with torch.inference_mode():
            y = m(x)
        return Scores(float(y.square().mean()), y)

    return Subject("two layers", model, [x], evaluate, "mean square", "8 rows", **options)  # type: ignore[arg-type]


def test_loss_is_positive_where_the_metric_got_worse():
    before, after = Scores(0.8, torch.ones(1, 1)), Scores(0.6, torch.ones(1, 1))
    assert _subject().loss(before, after) == pytest.approx(0.25)
    assert _subject(higher=False).loss(before, after) == pytest.approx(-0.25)
    assert _subject(change="points").loss(before, after) == pytest.approx(0.2)


def test_distance_of_embeddings_and_of_logits():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    b = torch.tensor([[1.0, 1.0], [0.0, 5.0]])
    expected = (1 - 2**-0.5) / 2  # the second pair has one direction
    assert _subject().distance(Scores(0, a), Scores(0, b)) == pytest.approx(expected)

    logits = Scores(0, torch.tensor([[0.0, 0.0]])), Scores(0, torch.tensor([[np.log(3.0), 0.0]]))
    expected = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert _subject(outputs="logits").distance(*logits) == pytest.approx(expected)


def test_every_setting_is_a_recipe():
    for steps in model_quality.SETTINGS.values():
        tcompress.Recipe.load({"steps": steps})


def test_a_model_is_measured_before_and_after():
    recipes = {name: {"steps": model_quality.SETTINGS[name]} for name in ("W4A16-g32 rtn", "W4A16-g32 gptq")}
    found = model_quality.measure(_subject(), recipes)
    base, rtn, gptq = found["rows"]
    assert base["recipe"] == "float32"
    assert rtn["compressed"] == gptq["compressed"] == 2
    assert 0 < gptq["distance"] < rtn["distance"] < 0.1
    assert rtn["MB"] < base["MB"]
    assert [len(row["worst"].split(", ")) for row in (rtn, gptq)] == [2, 2]
    assert model_quality.table(_subject(), found).row_count == 3


def test_variables_of_ctranslate2(tmp_path: Path):
    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    half = np.arange(6, dtype=np.float16).reshape(2, 3)
    ints = np.array([-3, 7], dtype=np.int32)
    content = struct.pack("<I", 6) + string("Spec") + struct.pack("<II", 3, 2)
    content += string("a/weight") + struct.pack("<BIIBI", 2, 2, 3, 4, half.nbytes) + half.tobytes()
    content += string("b") + struct.pack("<BIBI", 1, 2, 3, ints.nbytes) + ints.tobytes()
    content += struct.pack("<I", 1) + string("c/weight") + string("a/weight")
    (tmp_path / "model.bin").write_bytes(content)
    found = read_variables(tmp_path / "model.bin")
    assert set(found) == {"a/weight", "b", "c/weight"}
    assert found["a/weight"].dtype == torch.float32
    assert found["c/weight"].equal(torch.arange(6.0).reshape(2, 3))
    assert found["b"].tolist() == [-3, 7]


def test_linear_weights_of_an_onnx_file(tmp_path: Path):
    onnx = pytest.importorskip("onnx", reason="reads an ONNX file")
    from onnx import TensorProto, helper, numpy_helper
    from quality.onnx_weights import OnnxWeights

    weight = np.arange(6, dtype=np.float32).reshape(3, 2)
    constant = np.ones((1, 1, 2), dtype=np.float32)
    initializers = [
        numpy_helper.from_array(weight, "onnx::MatMul_7"),
        numpy_helper.from_array(np.zeros(2, np.float32), "m.encoder.dense.bias"),
        numpy_helper.from_array(constant, "folded"),
    ]
    node = helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/m/encoder/dense/MatMul")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, k]) for n, k in (("x", 3), ("y", 2)))
    onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y], initializers)), tmp_path / "m.onnx")
    found = OnnxWeights(tmp_path / "m.onnx", "m.")
    assert set(found.named) == {"encoder.dense.bias", "encoder.dense.weight"}
    assert found.named["encoder.dense.weight"].equal(torch.from_numpy(weight.T.copy()))
    assert found.one((1, 1, 2)).equal(torch.ones(1, 1, 2))
    with pytest.raises(ValueError, match="got 0, expected 1"):
        found.one((1, 1, 2), but=torch.ones(1, 1, 2))


def test_words_and_their_edit_distance():
    assert whisper.words("Dial-tone: it's [beep] (noise) ON!") == ["dial", "tone", "it's", "on"]
    assert whisper.edit_distance(["a", "b", "c", "d"], ["a", "x", "c", "d", "e"]) == 2
    assert whisper.edit_distance(["a", "b", "c"], []) == 3
    assert whisper.edit_distance([], ["a"]) == 1
    assert whisper.edit_distance(["k", "i", "t", "t", "e", "n"], ["s", "i", "t", "t", "i", "n", "g"]) == 3


def test_byte_pairs_are_merged_by_rank(tmp_path: Path):
    merges = [["▁", "a"], ["b", "a"], ["▁a", "b"]]
    (tmp_path / "t.json").write_text(json.dumps({"alphabet": ["a", "b", "▁"], "merges": merges}))
    encode = glassllm.Encoder(tmp_path / "t.json")
    # "▁aba": ▁a is merged first; then b and a, whose rank is before that of ▁a and b.
    assert encode(" ab").tolist() == [encode.ids["▁ab"]]
    assert encode("ba").tolist() == [encode.ids["ba"]]
    assert encode(" aba").tolist() == [encode.ids["▁a"], encode.ids["ba"]]
    assert encode("z").tolist() == [encode.ids["<unk>"]]
    assert encode("ba ba ba", 2).tolist() == [encode.ids["ba"], encode.ids["▁"]]


def test_rotated_pairs_become_halves():
    # Scores of one head under rotary embeddings are the same in both orders.
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)  # one head of 4, 5 inputs
    x = torch.randn(5, generator=generator, dtype=torch.float64)
    angle = torch.tensor([0.3, 1.1], dtype=torch.float64)

    def in_pairs(v: torch.Tensor) -> torch.Tensor:
        a, b = v[0::2], v[1::2]
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], 1).flatten()

    def in_halves(v: torch.Tensor) -> torch.Tensor:
        a, b = v[:2], v[2:]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()])

    expected = in_pairs(q @ x) @ (k @ x)
    assert torch.allclose(in_halves(glassllm._halves(q, 1) @ x) @ (glassllm._halves(k, 1) @ x), expected)


def test_reactions_lose_the_numbers_of_atoms_and_count_once(tmp_path: Path):
    mapped = '"Br[CH2:2][CH3:1].[Na+]~[O-:3][CH2:4][CH3:5]>>[CH3:1][CH2:2][O:3][CH2:4][CH3:5]"'
    (tmp_path / "test_mapper.py").write_text(f'x = [{mapped}, "CC[O-]~[Na+].BrCC>>CCOCC", ">>CC", "A>>wrong"]')
    (tmp_path / "test_batched_mapper.py").write_text('"CCCCc1cc[nH]c1>>CCCC"')
    vocabulary = {t: i for i, t in enumerate(["Br", "C", "O", "c", "1", "[nH]", "[Na+]", "[O-]", "~", ".", ">>"])}
    first, second = albert._reactions(tmp_path, vocabulary)
    assert first == ["Br", "C", "C", ".", "[Na+]", "~", "[O-]", "C", "C", ">>", "C", "C", "O", "C", "C"]
    assert "".join(second) == "CCCCc1cc[nH]c1>>CCCC"


def test_probe_finds_classes_that_a_plane_parts():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.randn(90, 6, generator=generator) + 5 * torch.eye(3, 6)[labels]
    assert (Probe(features[:60], labels[:60], penalty=1.0)(features[60:]) == labels[60:]).float().mean() > 0.95


def test_missing_files_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TCOMPRESS_CACHE", "unset by the test")
    monkeypatch.setattr(assets, "_folder", None)
    monkeypatch.setattr(assets, "_download", False)
    with pytest.raises(RuntimeError, match="call use"):
        assets.folder()
    assets.use(tmp_path, download=False)
    with pytest.raises(RuntimeError, match="glassllm==0.1.0: not in .*--download fetches it"):
        assets.wheel_files(assets.GLASSLLM)
    with pytest.raises(RuntimeError, match="dataset-fashion-mnist=.*--download fetches it"):
        assets.debian_files(assets.FASHION)
