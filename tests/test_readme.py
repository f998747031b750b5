"""The README's example runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml

from tcompress.nn import QuantizedLinear
from tcompress.recipe import Recipe

README = Path(__file__).parent.parent / "README.md"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.S)


def test_python_example(tmp_path, monkeypatch, capsys):
    (example,) = _blocks("python")
    assert len(example.strip().splitlines()) <= 12, "the example is meant to fit in about 10 lines"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert "layers compressed" in capsys.readouterr().out
    assert any(isinstance(m, QuantizedLinear) for m in names["same"].modules())
    with torch.inference_mode():
        assert torch.equal(names["same"](names["x"]), names["y"])


def test_recipe_example():
    (example,) = _blocks("yaml")
    recipe = Recipe.load(yaml.safe_load(example))
    assert [step.scheme.name for step in recipe.steps] == ["W8A8", "W8A16"]
