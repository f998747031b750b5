import json
import re

import pytest
import yaml
from pydantic import ValidationError

from tcompress import _C, QuantArgs, Quantize, Recipe, Scheme, presets, use_cpu_path
from tcompress.quantize import PerToken
from tcompress.recipe import MIN_COSINE, Prune, Sparse

#: `where: argument: got X, expected Y`
FORM = re.compile(r"^[^:]+: [^:]+: .*got .+, expected .+", re.DOTALL)
CONTENT = {"steps": [{"scheme": "W8A8", "targets": ["Linear"], "ignore": ["lm_head", "re:.*head"]}]}


def error_of(content, kind=ValueError):
    with pytest.raises(kind) as caught:
        Recipe.load(content)
    assert FORM.match(str(caught.value)), str(caught.value)
    return str(caught.value)


def test_the_int8_preset():
    assert "int8" in presets()
    recipe = Recipe.load("int8")
    assert recipe.version == 1
    linear, embedding, attention = recipe.steps
    assert (linear.targets, linear.ignore) == (("Linear", "Conv1D"), ("lm_head",))
    assert (embedding.scheme.name, embedding.targets, embedding.ignore) == ("W8A16", ("Embedding",), ("lm_head",))
    assert attention.scheme is None
    assert (attention.targets, attention.ignore, attention.min_cosine) == (("*",), (), 0.999)


@pytest.mark.parametrize("path", [p for p in _C.all_paths() if not _C.why_not_usable(p)])
def test_the_int8_preset_suits_the_processor(path):
    with use_cpu_path(path):
        steps = Recipe.load("int8").steps
    scheme = steps[0].scheme
    assert scheme.name == ("W7A7" if path in ("scalar", "avx2") else "W8A8")
    bits = 8 if path in ("avx512vnni", "amx") else 12
    assert (steps[2].attention, steps[2].attention_bits) == (f"int{bits}", bits)
    assert "int8" not in Recipe(steps=(Quantize(scheme=scheme),)).to_yaml()  # what is recorded is the scheme itself


def test_presets_are_sorted_and_all_load():
    assert presets() == sorted(presets())
    assert all(isinstance(Recipe.load(name), Recipe) for name in presets())


def test_dict():
    (step,) = Recipe.load(CONTENT).steps
    assert step == Quantize(scheme="W8A8", targets=("Linear",), ignore=("lm_head", "re:.*head"))


def test_a_recipe_is_returned_as_it_is():
    recipe = Recipe.load(CONTENT)
    assert Recipe.load(recipe) is recipe


def test_defaults():
    step = Quantize(scheme="W8A8")
    assert (step.step, step.targets, step.ignore) == ("quantize", ("Linear", "Conv1D"), ("lm_head",))


def test_defaults_of_an_attention_step():
    step = Quantize(attention="int12")
    assert (step.targets, step.ignore, step.scheme, step.attention_bits) == (("*",), (), None, 12)
    assert step.min_cosine == MIN_COSINE
    assert Quantize(attention="int8", min_cosine=None, targets="a").min_cosine == MIN_COSINE
    assert Quantize(scheme="W8A8").attention_bits is None
    assert Quantize(scheme="W8A8").min_cosine is None


def test_an_attention_step_in_yaml():
    text = "steps:\n  - {step: quantize, attention: int8, ignore: [decoder.*], min_cosine: 0.9}\n"
    (step,) = Recipe.from_yaml(text).steps
    assert step == Quantize(attention="int8", ignore="decoder.*", min_cosine=0.9)
    assert yaml.safe_load(Recipe(steps=(step,)).to_yaml())["steps"] == [
        {"step": "quantize", "attention": "int8", "targets": ["*"], "ignore": ["decoder.*"], "min_cosine": 0.9}
    ]


def test_defaults_of_the_sparse_steps():
    step = Sparse()
    assert (step.step, step.scheme, step.tokens, step.min_sparsity) == ("sparse", None, 128, 0.1)
    assert (step.targets, step.ignore) == (("Linear", "Conv1D"), ("lm_head",))
    assert Sparse(scheme="W7A7", targets="a").scheme.name == "W7A7"
    step = Prune(sparsity=0.8)
    assert (step.step, step.pattern, step.sparsity, step.algorithm) == ("prune", "8x4", 0.8, "magnitude")
    assert (step.targets, step.ignore) == (("Linear", "Conv1D"), ("lm_head",))
    assert Prune(pattern="2:4").sparsity is None
    assert Prune(pattern="1:4", sparsity=0.75).sparsity == 0.75
    assert [type(s) for s in Recipe.load("sparse").steps] == [Sparse]
    sparse, linear, embedding, attention = Recipe.load("sparse-int8").steps
    assert (sparse.scheme, linear, embedding) == (linear.scheme, *Recipe.load("int8").steps[:2])
    assert attention.attention is not None


def test_sparse_steps_in_yaml():
    text = "steps:\n  - {step: prune, pattern: '2:4', targets: fc}\n  - {step: sparse, scheme: W8A8, tokens: 1}\n"
    recipe = Recipe.from_yaml(text)
    assert recipe.steps == (Prune(pattern="2:4", targets="fc"), Sparse(scheme="W8A8", tokens=1))
    written = yaml.safe_load(recipe.to_yaml())["steps"]
    assert written[0] == {
        "step": "prune",
        "pattern": "2:4",
        "algorithm": "magnitude",
        "scope": "layer",
        "targets": ["fc"],
        "ignore": ["lm_head"],
    }
    assert "scheme" not in yaml.safe_load(Recipe(steps=(Sparse(),)).to_yaml())["steps"][0]


def test_one_pattern_may_stand_without_a_list():
    step = Quantize(scheme="W8A8", targets="Linear", ignore="head")
    assert (step.targets, step.ignore) == (("Linear",), ("head",))


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_yaml_path(tmp_path, suffix, kind):
    path = tmp_path / f"recipe{suffix}"
    path.write_text("version: 1\nsteps:\n  - scheme: W7A7\n    targets: query\n")
    (step,) = Recipe.load(kind(path)).steps
    assert (step.scheme.name, step.targets) == ("W7A7", ("query",))


def test_json_path(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(CONTENT))
    assert Recipe.load(path) == Recipe.load(CONTENT)


def test_a_scheme_spelled_out_equals_the_named_one():
    activations = {"bits": 7, "symmetric": False, "granularity": {"kind": "per_token"}, "dynamic": True}
    spelled = {"weights": {"bits": 8}, "activations": activations}
    assert Recipe.load({"steps": [{"scheme": spelled}]}) == Recipe.load({"steps": [{"scheme": "W8A7"}]})


@pytest.mark.parametrize("name", ["int8", "content", "custom", "attention", "sparse", "sparse-int8", "pruned"])
def test_yaml_and_json_round_trip(tmp_path, name):
    activations = QuantArgs(bits=3, symmetric=False, dynamic=True, granularity=PerToken())
    custom = Scheme(weights=QuantArgs(bits=5), activations=activations)
    recipes = {
        "int8": Recipe.load("int8"),
        "content": Recipe.load(CONTENT),
        "sparse": Recipe.load("sparse"),
        "sparse-int8": Recipe.load("sparse-int8"),
        "pruned": Recipe(
            steps=(Prune(pattern="2:4"), Prune(pattern="16x16", sparsity=0), Sparse(scheme=custom, min_sparsity=1))
        ),
        "attention": Recipe(steps=(Quantize(attention="int12", min_cosine=-1),)),
        "custom": Recipe(steps=(Quantize(scheme=custom, targets=("re:a'\"\\.b",), ignore=()),)),
    }
    recipe = recipes[name]
    path = tmp_path / "r.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe
    assert yaml.safe_load(recipe.to_yaml())["version"] == 1
    path = tmp_path / "r.json"
    path.write_text(recipe.model_dump_json())
    assert Recipe.load(path) == recipe


def test_frozen():
    recipe = Recipe.load("int8")
    with pytest.raises(ValidationError):
        recipe.version = 2
    with pytest.raises(ValidationError):
        recipe.steps[0].targets = ()
    with pytest.raises(ValidationError):
        recipe.steps[0].scheme.weights.bits = 4
    assert hash(recipe) == hash(Recipe.load("int8"))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({**CONTENT, "comment": "?"}, ["comment: got an unknown field"]),
        ({"steps": [{"scheme": "W8A8", "colour": "red"}]}, ["steps.0.colour: got an unknown field"]),
        ({"steps": [{"scheme": {"weights": {"bit": 8}}}]}, ["weights.bit: got an unknown field"]),
        ({"steps": [{"scheme": "W9A9"}]}, ["'W9A9'", "W8A7", "W8A16"]),
        ({"steps": [{"scheme": {"weights": {"bits": 9}}}]}, ["weights.bits: got 9", "8"]),
        ({"steps": [{"targets": ["Linear"]}]}, ["steps.0.scheme: got nothing", "attention"]),
        ({"steps": [{"scheme": "W8A8", "attention": "int8"}]}, ["steps.0.scheme: got a scheme beside attention"]),
        ({"steps": [{"attention": "int9"}]}, ["steps.0.attention: got 'int9', expected 'int8', 'int12' or 'auto'"]),
        ({"steps": [{"attention": True}]}, ["steps.0.attention: got True"]),
        ({"steps": [{"attention": "int8", "min_cosine": 2}]}, ["steps.0.min_cosine: got 2"]),
        ({"steps": [{"scheme": "W8A8", "min_cosine": 0.9}]}, ["steps.0.min_cosine: got 0.9", "attention only"]),
        ({"steps": [{"step": "melt", "scheme": "W8A8"}]}, ["steps.0.step: got 'melt'", "'quantize'"]),
        ({"steps": [{"step": None, "scheme": "W8A8"}]}, ["steps.0.step: got None", "'sparse', 'prune'"]),
        ({"steps": [{"step": ["prune"]}]}, ["steps.0.step: got ['prune'], expected 'quantize'"]),
        ({"steps": [{"step": "None"}]}, ["steps.0.step: got 'None'"]),
        ({"steps": ["prune"]}, ["steps.0: got 'prune', expected a step: a mapping"]),
        ({"steps": [CONTENT["steps"][0], None]}, ["steps.1: got None, expected a step: a mapping"]),
        ({"steps": 3}, ["steps: got 3"]),
        ({"steps": [{"step": "prune"}]}, ["steps.0.sparsity: got nothing, expected 0 to 1 for 8x4"]),
        ({"steps": [{"step": "prune", "pattern": "4x1"}]}, ["steps.0.sparsity: got nothing, expected 0 to 1 for 4x1"]),
        ({"steps": [{"step": "prune", "sparsity": 1.5}]}, ["steps.0.sparsity: got 1.5", "1"]),
        ({"steps": [{"step": "prune", "sparsity": -0.1}]}, ["steps.0.sparsity: got -0.1"]),
        ({"steps": [{"step": "prune", "sparsity": float("nan")}]}, ["steps.0.sparsity: got nan"]),
        ({"steps": [{"step": "prune", "sparsity": "much"}]}, ["steps.0.sparsity: got 'much'"]),
        (
            {"steps": [{"step": "prune", "pattern": "2:4", "sparsity": 0.6}]},
            ["steps.0.sparsity: got 0.6, expected 0.5 or nothing for 2:4"],
        ),
        ({"steps": [{"step": "prune", "pattern": "stripes", "sparsity": 0.5}]}, ["steps.0.pattern: ", "got 'stripes'"]),
        ({"steps": [{"step": "prune", "pattern": "4:2"}]}, ["steps.0.pattern: ", "1 ≤ N < M"]),
        ({"steps": [{"step": "prune", "pattern": 124}]}, ["steps.0.pattern: got 124, expected text", 'write "2:4" in']),
        ({"steps": [{"step": "prune", "pattern": None}]}, ["steps.0.pattern: got None, expected text such as '8x4'"]),
        (
            {"steps": [{"step": "prune", "sparsity": 0.5, "scores": "luck"}]},
            ["steps.0.scores: got 'luck'", "magnitude"],
        ),
        ({"steps": [{"step": "prune", "sparsity": 0.5, "scheme": "W8A8"}]}, ["steps.0.scheme: got an unknown field"]),
        ({"steps": [{"step": "sparse", "scheme": "W8A16"}]}, ["steps.0.scheme: got W8A16, expected 5 to 8 bits"]),
        ({"steps": [{"step": "sparse", "scheme": "W4A8"}]}, ["steps.0.scheme: got W4A8, expected 5 to 8 bits"]),
        ({"steps": [{"step": "sparse", "scheme": "W9A9"}]}, ["steps.0.scheme: ", "'W9A9'", "W8A7"]),
        ({"steps": [{"step": "sparse", "tokens": 0}]}, ["steps.0.tokens: got 0"]),
        ({"steps": [{"step": "sparse", "min_sparsity": 2}]}, ["steps.0.min_sparsity: got 2"]),
        ({"steps": [{"step": "sparse", "pattern": "8x4"}]}, ["steps.0.pattern: got an unknown field"]),
        ({"steps": [{"step": "sparse", "targets": 3}]}, ["steps.0.targets: got 3"]),
        ({"steps": [{"step": "prune", "sparsity": 0.5, "ignore": [3]}]}, ["steps.0.ignore.0: got 3"]),
        ({"steps": [{"scheme": "W8A8", "targets": 3}]}, ["steps.0.targets: got 3"]),
        ({"steps": [{"scheme": "W8A8", "targets": [3]}]}, ["steps.0.targets.0: got 3"]),
        ({"steps": []}, ["steps: got none, expected at least one"]),
        ({}, ["steps: got nothing"]),
        ({**CONTENT, "version": 2}, ["version: got 2, expected 1"]),
        ({**CONTENT, "version": "new"}, ["version: got 'new'"]),
    ],
)
def test_wrong_content(content, parts):
    text = error_of(content)
    assert text.startswith("Recipe: the dict: ")
    assert all(part in text for part in parts), text


def test_all_problems_are_told_at_once():
    text = error_of({"colour": 1, "steps": [{"scheme": "W9A9"}]})
    assert "colour" in text
    assert "W9A9" in text


def test_an_error_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("steps: []\n")
    assert str(path) in error_of(path)


@pytest.mark.parametrize(
    ("text", "part"),
    [("steps: [", "no YAML"), ("- W8A8\n", "list"), ("", "NoneType"), ("W8A8", "str")],
)
def test_a_file_that_is_no_mapping(tmp_path, text, part):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert part in error_of(path)


def test_yaml_does_not_build_python_objects(tmp_path):
    path, witness = tmp_path / "r.yaml", tmp_path / "witness"
    path.write_text(f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{witness}]]\n")
    error_of(path)
    assert not witness.exists()


def test_an_unquoted_pattern_in_yaml():
    """YAML reads 2:4 as a number of base 60."""
    with pytest.raises(ValueError, match='pattern: got 124, expected text such as .8x4.; write "2:4" in quotes'):
        Recipe.from_yaml("steps:\n  - {step: prune, pattern: 2:4}\n")


def test_unknown_preset():
    text = error_of("int9")
    assert "'int9'" in text
    assert "'int8'" in text


def test_missing_file(tmp_path):
    assert "none.yaml" in error_of(tmp_path / "none.yaml", FileNotFoundError)
    (tmp_path / "folder.yaml").mkdir()
    error_of(tmp_path / "folder.yaml", FileNotFoundError)


@pytest.mark.parametrize("recipe", [None, 8, ["W8A8"], b"int8"])
def test_wrong_type(recipe):
    assert type(recipe).__name__ in error_of(recipe, TypeError)


def test_algorithms():
    assert Quantize(scheme="W8A8").algorithm == "rtn"
    assert not Quantize(scheme="W8A8").needs_data
    assert Quantize(scheme="W4A16-g64", algorithm="gptq").needs_data
    assert Quantize(attention="int8").algorithm is None
    assert not Quantize(attention="int8").needs_data
    assert not Prune(sparsity=0.5).needs_data
    assert Prune(sparsity=0.5, algorithm="wanda").needs_data
    assert Prune.model_validate({"sparsity": 0.5, "scores": "magnitude"}).algorithm == "magnitude"  # its former name
    text = "inputs: original\nsteps:\n  - {step: prune, pattern: '2:4', algorithm: sparsegpt}\n"
    recipe = Recipe.from_yaml(text)
    assert (recipe.inputs, recipe.steps[0].algorithm) == ("original", "sparsegpt")
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert "gptq" in error_of({"steps": [{"scheme": "W8A8", "algorithm": "luck"}]})
    assert "steps.0.algorithm: got 'gptq', expected it in a step with a scheme only" in error_of(
        {"steps": [{"step": "quantize", "attention": "int8", "algorithm": "gptq"}]}
    )


def test_a_misspelt_field_is_named_with_the_one_that_is_like_it():
    with pytest.raises(ValueError, match="steps.0.algoritm: got an unknown field, expected no such field; algorithm.$"):
        Recipe.load({"steps": [{"scheme": "W8A8", "algoritm": "gptq"}]})
    with pytest.raises(ValueError, match="dict: step: got an unknown field, expected no such field; steps.$"):
        Recipe.load({"steps": [{"scheme": "W8A8"}], "step": []})
    with pytest.raises(ValueError, match="the dict: steps: got finetune without quantize"):
        Recipe.load({"steps": [{"step": "finetune"}]})
    with pytest.raises(ValueError, match=r"steps.0.losses: got \[\], expected at least 1$"):
        Recipe.load({"steps": [{"step": "distill", "losses": []}]})
