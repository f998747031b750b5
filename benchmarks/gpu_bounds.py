"""The least time that a kernel can take on a GPU, by each of its resources: matrix products, exponentials, memory,
and issuing the instructions of the hot loop.

A time below the largest of them is impossible; how near a kernel comes depends on how well they overlap, which these
numbers do not know.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpu_machine import GPU


@dataclass(frozen=True)
class Step:
    """An iteration of the hot loop. work: the scores, or products, that it computes; rows: queries or tokens of a tile;
    instructions: that each of `warps` issues."""

    work: int
    rows: int
    warps: int
    instructions: int

    def issued(self, work: float) -> float:
        return work / self.work * self.warps * self.instructions


@dataclass(frozen=True)
class Bounds:
    """In microseconds."""

    products: float
    exponentials: float
    memory: float
    issue: float

    @property
    def least(self) -> float:
        return max(self.products, self.exponentials, self.memory, self.issue)


@dataclass(frozen=True)
class AttentionProblem:
    """Q and K in int8, P and V in 16 bits, of B · H heads; causal: half of it. `variant`: that runs it."""

    name: str
    variant: str
    heads: int
    s: int
    d: int
    causal: bool = False

    def bounds(self, gpu: GPU, step: Step) -> Bounds:
        pairs = self.heads * self.s * self.s * (0.5 if self.causal else 1.0)
        products = 2 * self.d * pairs * (1 / gpu.int8 + 1 / gpu.half)
        nbytes = self.heads * self.s * (self.d * (1 + 1 + 2 + 2) + 4)  # Q, K; V and the result in 16 bits; Q's scales
        issued = step.issued(pairs)
        return _microseconds(products, pairs / gpu.exponentials, nbytes / gpu.memory, issued / gpu.issue)


@dataclass(frozen=True)
class LinearProblem:
    """[M, K] int8 times [N, K] int8, the result in 16 bits."""

    name: str
    variant: str
    m: int
    n: int
    k: int

    def bounds(self, gpu: GPU, step: Step) -> Bounds:
        products = 2 * self.m * self.n * self.k / gpu.int8
        nbytes = self.m * self.k + self.n * self.k + 2 * self.m * self.n
        issued = step.issued(-(-self.m // step.rows) * step.rows * self.n * self.k)
        return _microseconds(products, 0.0, nbytes / gpu.memory, issued / gpu.issue)


def _microseconds(*per_teraunit: float) -> Bounds:
    return Bounds(*(round(t * 1e-6, 1) for t in per_teraunit))


PROBLEMS: tuple[AttentionProblem | LinearProblem, ...] = (
    AttentionProblem("attention b4 h32 s1024 d64", "attention d64 short", 128, 1024, 64),
    AttentionProblem("attention b4 h32 s4096 d64", "attention d64", 128, 4096, 64),
    AttentionProblem("attention b4 h32 s4096 d64 causal", "attention d64 causal", 128, 4096, 64, True),
    AttentionProblem("attention b4 h32 s4096 d128", "attention d128", 128, 4096, 128),
    AttentionProblem("attention b4 h32 s4096 d128 causal", "attention d128 causal", 128, 4096, 128, True),
    AttentionProblem("attention b4 h32 s8192 d128", "attention d128", 128, 8192, 128),
    LinearProblem("linear m8192 n4096 k4096", "linear m8192", 8192, 4096, 4096),
    LinearProblem("linear m128 n4096 k4096", "linear m128", 128, 4096, 4096),
    LinearProblem("linear m16 n4096 k4096", "linear m16", 16, 4096, 4096),
    LinearProblem("linear m1 n4096 k4096", "linear m1", 1, 4096, 4096),
)
