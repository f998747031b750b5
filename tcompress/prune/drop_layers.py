"""Takes whole blocks out of a model: those that change what passes through them least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from tcompress import calibrate
from tcompress.blocks import find_chains, forward_replaced
from tcompress.match import Skip, any_matches, ignored, module_names
from tcompress.prune.config import fit_count
from tcompress.prune.importance import BlockInfluence
from tcompress.recipe import Shrink
from tcompress.report.report import LayerReport
from tcompress.report.size import model_sizes
from tcompress.structure import keep_members, mark_attributes, mark_kept
from tcompress.targeted import left_report
from tcompress.transform import Work


def drop_layers(work: Work, step: Shrink, samples: Sequence[Any]) -> bool:
    """Removes the blocks of smallest influence from each chain; Men et al., "ShortGPT", arXiv 2403.03853, section 3.

    A block may go only if the model without it computes what it computes when that block hands on its input: the first
    block of T5, which has the position bias of all, may not. Numbers that count the blocks (the index of a cache) are
    renumbered, the configuration of a `transformers` model is fitted.
    """
    model, removed = work.model, False
    names = module_names(model, {})
    with calibrate.evaluating(model):
        chains = find_chains(model, samples[0])
        if not chains:
            work.notes.append("shrink: no sequence of blocks was found")
        influence = {block: BlockInfluence() for chain in chains for block in chain}
        with ExitStack() as stack:
            for block, found in influence.items():
                stack.callback(block.register_forward_hook(found.hook, with_kwargs=True).remove)
            for sample in samples:
                calibrate.run(model, sample)
        for chain in chains:
            removed |= _shorten(work, step, chain, influence, samples[0], names)
    return removed


def _shorten(
    work: Work,
    step: Shrink,
    chain: list[nn.Module],
    influence: dict[nn.Module, BlockInfluence],
    sample: Any,
    names: dict[nn.Module, list[str]],
) -> bool:
    holder = next(m for m in work.model.modules() if isinstance(m, nn.ModuleList) and list(m) == chain)
    number = int(step.ratio * len(chain))
    targeted = []
    for block in chain:
        if any_matches(step.targets, names[block], block):
            reason = ignored(step, names[block], block, None)
            if reason is None:
                targeted.append(block)
            else:
                work.layers.append(left_report(Skip(tuple(names[block]), block, reason)))
    if number == 0:
        work.notes.append(f"shrink: {step.ratio:.0%} of the {len(chain)} blocks of {names[holder][0]} is none")
    gone: list[nn.Module] = []
    for block in sorted(targeted, key=lambda b: influence[b].value):
        if len(gone) == number:
            break
        reason = _why_needed(work.model, holder, chain, gone, block, sample)
        if reason is not None:
            work.layers.append(left_report(Skip(tuple(names[block]), block, reason)))
            continue
        gone.append(block)
    if not gone:
        return False
    kept = [i for i, block in enumerate(chain) if block not in gone]
    _renumber(chain, kept)
    keep_members(holder, kept)
    mark_kept(holder, kept)
    fit_count(work.model, len(chain), kept)
    for block in (b for b in chain if b in gone):
        work.layers.append(
            LayerReport(
                name=names[block][0],
                kind=type(block).__name__,
                action="removed",
                reason=f"1 - cos of input and output {influence[block].value:.4f}",
                shape=(),
                bytes_before=model_sizes(block).disk,
                bytes_after=0,
            )
        )
    return True


def _why_needed(
    model: nn.Module,
    holder: nn.ModuleList,
    chain: list[nn.Module],
    gone: list[nn.Module],
    block: nn.Module,
    sample: Any,
) -> str | None:
    """Why the model cannot do without a block, or None."""
    left = [i for i, b in enumerate(chain) if b not in gone]
    without = [i for i in left if chain[i] is not block]
    if not without:
        return "it is the last one left"
    keep_members(holder, left)
    try:
        with forward_replaced(block, _handing_on(block)):
            expected = calibrate.first_tensor(calibrate.run(model, sample))
        members = dict(holder._modules)
        del members[str(left.index(chain.index(block)))]
        holder._modules = {str(i): m for i, m in enumerate(members.values())}
        try:
            got = calibrate.first_tensor(calibrate.run(model, sample))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            return f"the model does not run without it: {str(error).splitlines()[0][:100] if str(error) else error!r}"
    finally:
        holder._modules = {str(i): b for i, b in enumerate(chain)}
    if got is None or expected is None or got.shape != expected.shape:
        return "the model's output has another shape without it"
    tolerance = 3 * torch.finfo(expected.dtype).eps ** 0.5
    if float((got.float() - expected.float()).norm()) > tolerance * float(expected.float().norm()):
        return "the model needs it for more than what it hands on"
    return None


def _handing_on(block: nn.Module) -> Any:
    """A forward that returns what the block returns, but with its input as the first tensor."""
    forward = block.forward

    def handing_on(*args: Any, **kwargs: Any) -> Any:
        given = calibrate.first_tensor([*args, *kwargs.values()])
        output = forward(*args, **kwargs)
        return given if isinstance(output, torch.Tensor) else type(output)((given, *output[1:]))

    return handing_on


def _renumber(chain: list[nn.Module], kept: Sequence[int]) -> None:
    """Gives the numbers that count the blocks to those that stay."""
    for position in list(_counting(chain)):
        values = [getattr(module, name) for module, name in position]
        for new, old in enumerate(kept):
            module, name = position[old]
            setattr(module, name, values[new])
            mark_attributes(module, [name])


def _counting(chain: list[nn.Module]) -> Iterator[list[tuple[nn.Module, str]]]:
    """Whole numbers at one place of all blocks, that are one more in each than in the one before."""
    inside = [dict(block.named_modules()) for block in chain]
    for path, module in inside[0].items():
        for name, value in vars(module).items():
            if type(value) is not int:
                continue
            modules = [modules.get(path) for modules in inside]
            if all(m is not None and vars(m).get(name) == value + i for i, m in enumerate(modules)):
                yield [(m, name) for m in modules if m is not None]
