"""The README's examples run as printed."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml

import tcompress
from tcompress.nn import QuantizedLinear
from tcompress.ops.attention_options import auto_bits
from tcompress.recipe import Recipe

README = Path(__file__).parent.parent / "README.md"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.S)


def test_python_example(tmp_path, monkeypatch, capsys):
    example, _ = _blocks("python")
    assert len(example.strip().splitlines()) <= 12, "the example is meant to fit in about 10 lines"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert "layers compressed" in capsys.readouterr().out
    assert any(isinstance(m, QuantizedLinear) for m in names["same"].modules())
    with torch.inference_mode():
        assert torch.equal(names["same"](names["x"]), names["y"])


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_cache_example(capsys):
    _, example = _blocks("python")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=96, pad_token_id=0, **sizes)).eval()
    ids = torch.randint(3, 90, (2, 12))
    names: dict[str, Any] = {
        "model": model,
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids), "min_new_tokens": 64},
    }
    exec(compile(example, "README.md", "exec"), names)
    assert names["tokens"].shape == (2, 76)
    cache = names["cache"]
    assert cache.get_seq_length() == 75
    assert capsys.readouterr().out == f"{cache.nbytes_used} {cache.float_nbytes}\n"


def test_recipe_example():
    (example,) = _blocks("yaml")
    recipe = Recipe.load(yaml.safe_load(example))
    assert [step.scheme and step.scheme.name for step in recipe.steps] == ["W8A8", "W8A16", None]
    assert [step.attention for step in recipe.steps] == [None, None, f"int{auto_bits()}"]


def test_sparse_example(capsys):
    (example,) = _blocks("py")
    names: dict[str, Any] = {
        "tcompress": tcompress,
        "model": torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 64)).eval(),
        "x": torch.randn(5, 64),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tcompress.errors.CompressionWarning)  # so small a layer may well run dense
        exec(compile(example, "README.md", "exec"), names)
    assert names["layer"].pattern == "8x4"
    assert "dense" in capsys.readouterr().out
