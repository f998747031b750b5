"""The step that stores weights as indices into codebooks."""

from __future__ import annotations

import torch
from torch import nn

from tcompress import calibrate
from tcompress.block_walk import Stage, collect
from tcompress.nn.codebook_linear import CodebookLinear
from tcompress.packing.codebook import CodebookWeight
from tcompress.recipe import Codebook
from tcompress.share.kmeans import kmeans_codebook
from tcompress.structure import carry
from tcompress.targeted import left_report, put, replaced_report, target_layers
from tcompress.transform import Work, transforms
from tcompress.weights import linear_bias, linear_weight, weight_key


@transforms(Codebook)
def run(work: Work, step: Codebook) -> None:
    """Replaces the targeted layers; those with one weight share its codebooks."""
    layers, skips = target_layers(work.model, step)
    importance = _importance(work, step, list(layers)) if step.weighting == "inputs" else {}
    cache: dict[tuple[int, bool], CodebookWeight] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for module, names in layers.items():
        key = weight_key(module)
        if key not in cache:
            try:
                cache[key] = kmeans_codebook(
                    linear_weight(module),
                    step.bits,
                    step.rows,
                    step.columns,
                    importance=importance.get(key),
                    init=step.init,
                    iterations=step.iterations,
                    dtype=getattr(torch, step.values),
                    seed=step.seed,
                )
            except ValueError as error:
                raise ValueError(f"compress: {names[0] or '(root)'}: {error}") from error
        bias = linear_bias(module)
        layer = CodebookLinear.from_codebook(cache[key], bias, module.weight.dtype, step.held)  # type: ignore[arg-type]
        replacements[module] = carry(module, layer.train(module.training))
        action = f"codebook {step.bits} bit"
        work.layers.append(replaced_report(names, module, layer, action, f"tiles of {layer.rows}x{layer.columns}"))
    work.layers += map(left_report, skips)
    put(work.model, replacements)
    if not replacements:
        work.notes.append("codebook: no layer was replaced")


def _importance(work: Work, step: Codebook, layers: list[nn.Module]) -> dict[tuple[int, bool], torch.Tensor]:
    """The mean square of each layer's inputs, of the model as it is."""
    samples = work.data(step, "weighting 'inputs' counts each weight by its inputs")

    def run_all() -> None:
        for sample in samples:
            calibrate.run(work.model, sample)

    with calibrate.evaluating(work.model):
        found = collect(Stage(work.model, layers, run_all, ""), hessian=False)
    idle = [key for key, statistics in found.items() if statistics.count == 0]
    if idle:
        work.notes.append(f"codebook: {len(idle)} layers have no calibration inputs: all their weights count alike")
    return {key: s.norm.square() / s.count for key, s in found.items() if s.count}
