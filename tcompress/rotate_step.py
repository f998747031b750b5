"""Runs the step that rotates the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from tcompress.calibrate import evaluating, first_tensor, run
from tcompress.match import module_names
from tcompress.pairs import find_pairs
from tcompress.pairs.find import is_linear
from tcompress.pairs.gain import may_have_gain
from tcompress.pairs.stream import Stream, StreamTrace
from tcompress.quantize.hadamard import mean_preserving, randomized_hadamard
from tcompress.recipe import Rotate
from tcompress.report.report import MIB, LayerReport
from tcompress.report.size import model_sizes
from tcompress.rotation import Rotation, rotation_of
from tcompress.transform import Work, transforms

#: How far outputs may be from the original's, relative to their norm, in units of their precision, and at most.
_TOLERANCE, _AT_MOST = 1000, 0.2


@transforms(Rotate)
def rotate(work: Work, step: Rotate) -> None:
    """Finds the residual streams, and rotates those that everything around them allows (`Rotation`).

    An RMS norm commutes with every rotation, and gets a randomized Hadamard matrix; a LayerNorm, which subtracts the
    mean, with those that keep the mean, and gets a random one of these. Any other norm, and any other operation on the
    stream, leaves it as it is, with the reason. Before anything is changed, the rotated model is computed on the first
    sample and compared.

    A layer whose weight is an embedding's too (a tied head) gets a weight of its own, since the norm before the head
    has a weight and the embedding has none to fold; that adds its bytes.
    """
    model, sample = work.model, work.data(step, "one shows which weights there are to rotate")[0]
    untied = _untie(model)
    names = {module: paths[0] for module, paths in module_names(model, {}).items()}
    watched = {m: n for m, n in names.items() if is_linear(m) or may_have_gain(m) or isinstance(m, nn.Embedding)}
    done: list[Rotation] = []
    left: dict[str, list[int]] = {}
    with evaluating(model):
        pairs = {pair.source: pair for pair in find_pairs(model, sample)[0]}
        trace = StreamTrace(watched)
        streams = [s for s in trace.run(model, sample) if _is_residual(s)]
        before = first_tensor(run(model, sample))
        for stream in streams:
            reason = ""
            for matrix, kind in _matrices(stream.size, step.seed):
                rotation = rotation_of(stream, pairs, trace.inputs, names, matrix, kind)
                if isinstance(rotation, Rotation):
                    with rotation.tried():
                        after = first_tensor(run(model, sample))
                    if _same(before, after):
                        rotation.fold()
                        done.append(rotation)
                        break
                    rotation = "the rotated model computes something else on the first sample"
                reason = rotation  # of the last one: what is not a LayerNorm either
            else:
                left.setdefault(reason, []).append(stream.size)
    for reason, sizes in left.items():
        more = f" and {len(sizes) - 1} more" if len(sizes) > 1 else ""
        work.notes.append(f"rotate: a residual stream of {sizes[0]} channels{more} is left as it is: {reason}")
    if not streams:
        work.notes.append("rotate: no residual stream was found: nothing was changed")
    _retie(work, untied, names, bool(done))
    work.layers += [_report(rotation, names) for rotation in done]


def _is_residual(stream: Stream) -> bool:
    return any(may_have_gain(m) for m in stream.readers) and any(is_linear(m) for m in stream.writers)


def _matrices(size: int, seed: int) -> Iterator[tuple[torch.Tensor, str]]:
    yield randomized_hadamard(size, seed)
    yield mean_preserving(size, seed), "random orthogonal matrix that keeps the mean"


def _untie(model: nn.Module) -> dict[nn.Module, tuple[nn.Parameter, str]]:
    """Gives linear layers that share an embedding's weight one of their own. Returns the shared one by layer."""
    tables = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    untied = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and is_linear(module) and id(weight) in tables:
            untied[module] = (weight, tables[id(weight)])
            module._parameters["weight"] = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    return untied


def _retie(
    work: Work, untied: Mapping[nn.Module, tuple[nn.Parameter, str]], names: Mapping[nn.Module, str], rotated: bool
) -> None:
    """Undoes `_untie` where nothing was rotated; else says what it costs."""
    for module, (weight, owner) in untied.items():
        if not rotated:
            module._parameters["weight"] = weight
            continue
        size = weight.nbytes / MIB
        work.notes.append(f"rotate: {names[module]} no longer shares its weight with {owner}: {size:.1f} MiB more")
    config = getattr(work.model, "config", None)
    if rotated and untied and config is not None and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False


def _same(before: torch.Tensor | None, after: torch.Tensor | None) -> bool:
    if before is None or after is None or before.shape != after.shape:
        return False
    limit = min(_TOLERANCE * torch.finfo(before.dtype).eps, _AT_MOST)
    return bool((after.double() - before.double()).norm() <= limit * before.double().norm())


def _report(rotation: Rotation, names: Mapping[nn.Module, str]) -> LayerReport:
    first = rotation.writers[0]
    size = model_sizes(first).disk
    weight = first._parameters["weight"]
    assert weight is not None
    what = f"{len(rotation.writers)} writers and {len(rotation.readers)} readers of the stream"
    return LayerReport(
        name=names[first],
        kind=type(first).__name__,
        action="rotate",
        reason=f"{rotation.kind} of order {len(rotation.matrix)} into {what}",
        shape=tuple(weight.shape),
        bytes_before=size,
        bytes_after=size,
    )
