"""Distillation as a step of a recipe, and what is found out before training."""

import copy

import pytest
import torch
from torch import nn
from toy_models import Toy, batches

import tcompress
from tcompress.errors import CompressionWarning
from tcompress.prune import magnitude_mask
from tcompress.recipe import Distill, Prune, Quantize, Recipe, Sparse

pytest.importorskip("accelerate", reason="the engine of training: pip install tcompress[train]")
TRAIN = {"step": "distill", "losses": ["logits", "hidden"], "steps": 20, "lr": 6e-3}
LINEAR = [f"layers.{i}.{name}" for i in range(4) for name in ("qkv", "out", "up", "down")] + ["head"]


def compress(steps, model=None, **more):
    return tcompress.compress(model or Toy(width=32), {"steps": steps}, batches(), progress=False, **more)


def error(model, other):
    with torch.no_grad():
        return sum(float((model.eval()(**b) - other.eval()(**b)).square().mean()) for b in batches())


def mask_of(weight):
    return weight != 0


@pytest.mark.parametrize("algorithm", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["8x4", "2:4"])
def test_prune_distill_quantize(algorithm, pattern):
    model = Toy(width=32)
    before = copy.deepcopy(model)
    prune = {"step": "prune", "pattern": pattern, "algorithm": algorithm}
    prune |= {} if ":" in pattern else {"sparsity": 0.5}
    pruned = compress([prune], model).model
    plain = compress([prune, {"scheme": "W8A8"}], model).model
    healed = compress([prune, TRAIN, {"scheme": "W8A8"}], model)
    for name in LINEAR:
        kept = mask_of(pruned.get_submodule(name).weight)
        got = healed.model.get_submodule(name).packed
        assert not got.dequantize()[~kept].any()  # exactly zero, in the places that the algorithm chose
        assert (got.dequantize() != plain.get_submodule(name).packed.dequantize())[kept].any()
        if algorithm == "magnitude":
            assert torch.equal(kept, magnitude_mask(before.get_submodule(name).weight, pattern, 0.5))
    assert error(healed.model, before) < 0.6 * error(plain, before)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    actions = [layer.action for layer in healed.report.layers if layer.action != "skipped"]
    last = f"pruned {pattern}" + (" sparsegpt" if algorithm == "sparsegpt" else "")
    assert actions == [last] * 17 + ["distilled"] + ["W8A8"] * 17
    (trained,) = [layer for layer in healed.report.layers if layer.action == "distilled"]
    assert trained.reason.startswith("20 steps, loss ")
    assert healed.report.output_cosine > 0.9


def test_the_packed_integers_are_those_of_the_training():
    """The loss that the packed model has is that which the training saw at its end."""
    model = Toy(width=32)
    recipe = {"steps": [{"step": "prune", "sparsity": 0.5}, TRAIN, {"scheme": "W4A8", "ignore": []}]}
    student = compress(recipe["steps"][:1], model).model
    simulated = {}

    def evaluate(found):
        simulated["out"] = found(**batches(1)[0])
        return 0.0

    settings = {k: v for k, v in TRAIN.items() if k != "step"}
    tcompress.distill(student, model, batches(), recipe=recipe, evaluate=evaluate, **settings)
    packed = tcompress.compress(student, {"steps": recipe["steps"][2:]}, progress=False).model.eval()
    again = tcompress.compress(model, recipe, batches(), progress=False).model
    for name in LINEAR:  # the recipe and its steps one by one are one thing
        assert torch.equal(packed.get_submodule(name).packed.qdata, again.get_submodule(name).packed.qdata)
    got = packed(**batches(1)[0])
    assert (got - simulated["out"]).abs().max() < 0.02 * got.abs().max()


def test_sparse_layers_see_the_zeros():
    steps = [{"step": "prune", "sparsity": 0.75}, TRAIN | {"steps": 3}, {"step": "sparse", "scheme": "W8A8"}]
    result = compress(steps)
    layers = [m for m in result.model.modules() if isinstance(m, tcompress.nn.SparseLinear)]
    assert len(layers) == 17
    assert all(layer.sparsity >= 0.75 for layer in result.report.layers if layer.action.startswith("W8A8 sparse"))


@pytest.mark.parametrize("method", ["magnitude", "movement", "admm"])
def test_pruning_in_the_training(method):
    prune = {"method": method, "pattern": "8x4", "sparsity": 0.5, "ignore": "head", "every": 2}
    result = compress([TRAIN | {"prune": prune}, {"step": "sparse", "ignore": "head"}])
    for name in LINEAR[:-1]:
        weight = result.model.get_submodule(name).packed.dequantize()
        blocks = (weight == 0).view(weight.shape[0] // 8, 8, -1, 4).float().mean((1, 3))
        assert set(blocks.unique().tolist()) <= {0.0, 1.0}
        assert int(blocks.sum()) == round(0.5 * blocks.numel())
    assert (result.model.head.weight != 0).all()


def test_what_is_pruned_before_goes_on_being_pruned_in_the_training():
    first = {"step": "prune", "pattern": "unstructured", "sparsity": 0.3}
    model = Toy(width=32)
    gone = compress([first], model).model
    more = {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.6}
    result = compress([first, TRAIN | {"prune": more}], model).model
    for name in LINEAR:
        weight = result.get_submodule(name).weight
        assert float((weight == 0).float().mean()) == pytest.approx(0.6, abs=0.01)
        assert (weight[gone.get_submodule(name).weight == 0] == 0).all()


def test_zeros_may_be_given_up():
    steps = [{"step": "prune", "sparsity": 0.5}, TRAIN | {"keep_zeros": False, "steps": 3}]
    assert (compress(steps).model.head.weight != 0).all()


def test_a_pruning_step_that_stands_after_comes_after():
    result = compress([TRAIN | {"steps": 2}, {"step": "prune", "pattern": "unstructured", "sparsity": 0.5}])
    actions = [layer.action for layer in result.report.compressed]
    assert actions == ["distilled"] + ["pruned unstructured"] * 17
    assert all((result.model.get_submodule(name).weight == 0).float().mean() == 0.5 for name in LINEAR[:-1])


def test_in_place_the_teacher_is_the_model_as_it_was():
    model = Toy(width=32)
    before = copy.deepcopy(model)
    steps = [{"step": "prune", "sparsity": 0.5}, TRAIN]
    result = compress(steps, model, inplace=True).model
    assert result is model
    other = compress(steps, before).model
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_single_layer():
    layer = nn.Linear(16, 16)
    x = [torch.randn(8, 16) for _ in range(3)]
    steps = [{"step": "prune", "sparsity": 0.5}, {"step": "distill", "losses": ["cosine"], "steps": 3}]
    result = tcompress.compress(layer, {"steps": steps}, x, progress=False).model
    assert (result.weight == 0).float().mean() == 0.5
    quantized = tcompress.compress(layer, {"steps": [*steps, {"scheme": "W8A8"}]}, x, progress=False).model
    assert isinstance(quantized, tcompress.nn.QuantizedLinear)


def test_what_went_wrong_is_said():
    with pytest.raises(ValueError, match="compress: data: got none, expected calibration samples; distill: it trains"):
        tcompress.compress(Toy(), {"steps": [TRAIN]}, progress=False)
    with pytest.warns(CompressionWarning, match="distill: the loss rose from .* to .*: lower lr"):
        compress([{"step": "prune", "sparsity": 0.1}, TRAIN | {"lr": 3.0, "steps": 3, "schedule": "constant"}])


def test_a_recipe_in_yaml():
    text = """
    steps:
    - {step: prune, pattern: 8x4, sparsity: 0.5}
    - step: distill
      losses: [logits, {loss: hidden, weight: 3}, {loss: cosine, pooled: true}]
      steps: 500
      lr: 1.0e-4
      ignore: Embedding
      prune: {method: movement, pattern: 1x4, sparsity: 0.6}
    - {scheme: W8A8}
    """
    recipe = Recipe.from_yaml(text)
    assert [type(step) for step in recipe.steps] == [Prune, Distill, Quantize]
    step = recipe.steps[1]
    assert [(loss.loss, loss.weight) for loss in step.losses] == [("logits", 1), ("hidden", 3), ("cosine", 1)]
    assert (step.steps, step.lr, step.targets, step.ignore) == (500, 1e-4, ("*",), ("Embedding",))
    assert (step.prune.method, step.prune.sparsity, step.keep_zeros) == ("movement", 0.6, True)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert isinstance(Recipe.load({"steps": [{"step": "sparse"}]}).steps[0], Sparse)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"losses": ["logits", "logits"]}, "losses: got .*, expected each kind once"),
        ({"losses": []}, "steps.0.losses: got .*, expected"),
        ({"losses": ["logit"]}, "steps.0.losses.0"),
        ({"steps": 0}, "steps.0.steps: got 0, expected"),
        ({"warmup": 2}, "steps.0.warmup: got 2, expected"),
        ({"prune": {"method": "movement"}}, "steps.0.prune.sparsity: got nothing, expected 0 to 1 for 8x4"),
        ({"speed": 1}, "steps.0.speed: got an unknown field"),
    ],
)
def test_settings_that_are_wrong(content, match):
    with pytest.raises(ValueError, match=match):
        tcompress.distill(Toy(), Toy(), batches(), **content)


@pytest.mark.parametrize(
    ("student", "losses", "match"),
    [
        (
            {"classes": 5},
            ["logits"],
            r"logits: got 5 \(vocabulary or classes\) in the student, expected the teacher's 7",
        ),
        ({"classes": 5}, ["cosine"], r"cosine: got 5 \(features\) in the student, expected the teacher's 7"),
        ({"vocabulary": 21}, ["hidden"], "vocabulary: got 21 tokens in the student, expected the teacher's 20"),
        ({"blocks": 6}, ["hidden"], "blocks: got 6 of the student, expected at most the teacher's 4"),
        ({"heads": 4}, ["attention"], r"heads: got Q \[4, 4, 6, 4\] in the student, expected .*\[4, 2, 6, 8\]"),
        ({}, [{"loss": "relations", "heads": 3}], "heads: got a student of width 16, expected one that 3"),
        (
            {},
            [{"loss": "relations", "teacher_layer": 4}],
            "teacher_layer: got 4, expected one of the teacher's 4 blocks",
        ),
        ({}, ["labels"], "labels: got a batch"),
    ],
)
def test_what_does_not_fit_is_found_before_training(student, losses, match):
    model = Toy(seed=1, **student)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="distill.*" + match):
        tcompress.distill(model, Toy(), batches(), losses=losses, steps=2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_students_that_cannot_be_trained():
    packed = tcompress.compress(Toy(), {"steps": [{"scheme": "W8A8"}]}, progress=False).model
    with pytest.raises(ValueError, match="distill: student: got 17 compressed layers .* distill before quantizing"):
        tcompress.distill(packed, Toy(), batches())
    with pytest.raises(ValueError, match="distill: student: got parameters in torch.bfloat16, expected float32"):
        tcompress.distill(Toy().bfloat16(), Toy(), batches())
    model = Toy()
    with pytest.raises(ValueError, match="distill: student: got the teacher itself, expected another model"):
        tcompress.distill(model, model, batches())
    with pytest.raises(TypeError, match="distill: settings: got step and lr, expected a step or keywords"):
        tcompress.distill(Toy(), Toy(), batches(), Distill(), lr=1.0)


@pytest.mark.parametrize("losses", [["hidden"], ["relations"], ["hidden", "relations", "cosine", "logits"]])
def test_a_narrower_and_shallower_student(losses):
    student = Toy(width=12, blocks=2, heads=3, seed=1)
    settings = {"steps": 40, "lr": 1e-2}
    losses = [{"loss": "relations", "heads": 4} if name == "relations" else name for name in losses]
    result = tcompress.distill(student, Toy(), batches(), losses=losses, **settings)
    first, last = (result.history.losses[i]["total"] for i in (0, -1))
    assert last < 0.9 * first
    assert [name for name, _ in student.named_parameters()] == [n for n, _ in Toy(blocks=2).named_parameters()]


def test_labels_and_attention_maps():
    result = tcompress.distill(
        Toy(seed=1), Toy(), batches(labels=True), losses=["labels", "attention"], steps=60, lr=1e-2
    )
    losses = result.history.losses
    assert losses[-1]["labels"] < 0.7 * losses[0]["labels"]
    assert losses[-1]["attention"] < 0.7 * losses[0]["attention"]
