"""The command line."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, LlamaConfig, LlamaForCausalLM, LlamaModel
from typer.testing import CliRunner

import tcompress
from tcompress.cli import app
from tcompress.demo import runner
from tcompress.demo.tasks import Metric
from tcompress.errors import CompressionWarning
from tcompress.timing import Timing


def _result(before: float, after: float) -> runner.DemoResult:
    timing = Timing(1e-3, (1e-3, 1e-3), 5)
    metrics = tuple(Metric("rho", value, 3, "", "") for value in (before, after))
    return runner.DemoResult((runner.Latency(1, 32, timing, timing),), (metrics,), (100, 25))


def test_info_lists_every_path():
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    for path in tcompress._extension.C.all_paths():
        assert path in result.output
    assert "(chosen)" in result.output


def test_demo_fails_when_accuracy_falls(monkeypatch):
    monkeypatch.setattr(runner, "run", lambda seconds: _result(0.7, 0.6))
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert "rho fell from 0.7000 to 0.6000" in result.output


def test_demo_fails_on_nan(monkeypatch):
    monkeypatch.setattr(runner, "run", lambda seconds: _result(0.7, float("nan")))
    assert CliRunner().invoke(app, ["demo"]).exit_code == 1


def test_demo_passes_within_the_bound(monkeypatch):
    monkeypatch.setattr(runner, "run", lambda seconds: _result(0.7, 0.7 - runner.MAX_LOSS / 2))
    assert CliRunner().invoke(app, ["demo"]).exit_code == 0


def test_compress_and_load(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(app, ["compress", str(tmp_path / "model"), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "layers compressed" in result.output
    model = tcompress.load(tmp_path / "out")
    with torch.inference_mode():
        assert model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape == (1, 3, 32)


def bert_folder(folder):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(folder / "model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (folder / "words.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "words.txt")).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("a b c d e f\n\nh g f\n")
    return str(folder / "model")


def test_compress_calibrates_on_a_text_file(tmp_path):
    recipe = tmp_path / "gptq.yaml"
    recipe.write_text("steps: [{scheme: W4A16-g32, algorithm: gptq}]")
    arguments = [bert_folder(tmp_path), str(tmp_path / "out"), "--recipe", str(recipe)]
    with pytest.warns(CompressionWarning, match="1 of 2 calibration samples clipped to 5 tokens"):
        result = CliRunner().invoke(
            app, ["compress", *arguments, "--data", str(tmp_path / "text.txt"), "--max-length", "5"]
        )
    assert result.exit_code == 0, result.output
    assert "gptq" in result.output


def test_a_model_keeps_its_head(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / "model")
    arguments = ["compress", str(tmp_path / "model")]
    assert CliRunner().invoke(app, [*arguments, str(tmp_path / "out")]).exit_code == 0
    assert isinstance(tcompress.load(tmp_path / "out"), LlamaForCausalLM)
    arguments += [str(tmp_path / "bare"), "--model-class"]
    assert CliRunner().invoke(app, [*arguments, "AutoModel"]).exit_code == 0
    assert isinstance(tcompress.load(tmp_path / "bare"), LlamaModel)
    result = CliRunner().invoke(app, [*arguments, "Lama"])
    assert result.exit_code == 2
    assert "model-class: got 'Lama', expected a class of transformers" in result.output


def test_a_run_goes_on(tmp_path):
    recipe = tmp_path / "gptq.yaml"
    recipe.write_text("steps: [{scheme: W4A16-g32, algorithm: gptq}]")
    arguments = ["compress", bert_folder(tmp_path), str(tmp_path / "out"), "--recipe", str(recipe)]
    arguments += ["--data", str(tmp_path / "text.txt"), "--resume", str(tmp_path / "kept")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (tmp_path / "kept" / "run.json").exists()


@pytest.mark.parametrize("case", ["file", "source", "recipe", "step", "data"])
def test_errors_are_a_line(tmp_path, monkeypatch, case):
    source, out, more = bert_folder(tmp_path), tmp_path / "out", []
    monkeypatch.setattr(tcompress, "compress", None)  # all of it is found before
    if case == "file":
        out = tmp_path / "text.txt"
        problem = "expected another folder"
    elif case == "source":
        out, problem = tmp_path / "model", "the model's own folder, expected another folder"
    elif case == "recipe":
        more, problem = ["--recipe", "int9"], "int9"
    elif case == "step":
        (tmp_path / "r.yaml").write_text("steps: [{step: quantise, scheme: W8A8}]")
        more, problem = ["--recipe", str(tmp_path / "r.yaml")], "quantise"
    else:
        more, problem = ["--data", str(tmp_path / "nothing.txt")], "nothing.txt"
    before = (tmp_path / "text.txt").read_text()
    result = CliRunner().invoke(app, ["compress", source, str(out), *more])
    assert result.exit_code == 2
    assert result.output.startswith("tcompress: ")
    assert problem in result.output
    assert "Traceback" not in result.output
    assert (tmp_path / "text.txt").read_text() == before


def test_estimate(tmp_path):
    arguments = ["estimate", bert_folder(tmp_path), "--data", str(tmp_path / "text.txt"), "--recipe"]
    recipe = tmp_path / "gptq.yaml"
    recipe.write_text("steps: [{scheme: W4A16-g32, algorithm: gptq}]")
    result = CliRunner().invoke(app, [*arguments, str(recipe)])
    assert result.exit_code == 0, result.output
    assert "7 layers, 2 samples: about " in result.output
    assert "peak" in result.output
    result = CliRunner().invoke(app, [*arguments, str(recipe), "--max-memory", "1 kB"])
    assert result.exit_code == 2
    assert "tcompress: compress: max_memory: got 1.0 kB, expected at least " in result.output


def test_advise(tmp_path):
    arguments = ["advise", bert_folder(tmp_path), "--recipe-out", str(tmp_path / "best.yaml")]
    result = CliRunner().invoke(app, [*arguments, "--disk", "1 B"])
    assert result.exit_code == 1, result.output
    assert not (tmp_path / "best.yaml").exists()
    result = CliRunner().invoke(app, [*arguments, "--disk", "1 MB"])
    assert result.exit_code == 0, result.output
    assert "take '" in result.output
    assert tcompress.Recipe.load(tmp_path / "best.yaml").steps
