"""What the layers of a recipe become and what packing them takes, in bytes, before it is done."""

from __future__ import annotations

from dataclasses import dataclass

from tcompress.distances import PIECE
from tcompress.layer_job import Job
from tcompress.quantize.scheme import Scheme
from tcompress.recipe import Quantize
from tcompress.weights import linear_weight


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a run.

    Attributes:
        model: parameters and buffers, as far as they are still there, and the original where it stands beside that.
        activations: what blocks return for all samples.
        hessians: of layers' inputs.
        compressed: what layers became by then.
        work: one sample on its way through a block or the model, and what solving a layer takes.
        training: a copy that is trained, with its gradients and its optimizer.
        when: in which part of the run that is.
    """

    model: int
    activations: int
    hessians: int
    compressed: int
    work: int
    when: str
    training: int = 0

    @property
    def peak(self) -> int:
        return self.model + self.activations + self.hessians + self.compressed + self.work + self.training


def nbytes_became(job: Job, inplace: bool) -> int:
    """Bytes of what a layer becomes."""
    weight = linear_weight(job.module)
    scheme: Scheme | None = None if job.step is None else job.step.scheme
    density = 1.0 if job.pruned is None or isinstance(job.step, Quantize) else 1 - job.pruned.zeros
    if job.step is None:
        return 0 if inplace and job.pruned is not None and job.pruned.step.needs_data else weight.nbytes
    indices = 0 if isinstance(job.step, Quantize) else weight.numel() // 8
    if scheme is None:
        return int(weight.nbytes * density) + indices
    args = scheme.weights
    groups = weight.shape[0] * -(-weight.shape[1] // (args.group_size or max(weight.shape[1], 1)))
    stored = weight.numel() * (1 if args.bits > 4 else 0.5)
    return int(stored * density) + indices + groups * (3 if args.bits <= 4 else 4)


def packing_work(job: Job) -> int:
    """Bytes that rounding takes beside a weight, or comparing it with what is stored, in float64."""
    numel = linear_weight(job.module).numel()
    return max(16 * numel, 4 * numel + 4 * 8 * min(numel, PIECE))
