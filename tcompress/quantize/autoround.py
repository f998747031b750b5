"""AutoRound: up or down for each weight, and its scale, learned by the signs of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tcompress.packing import PackedWeight
from tcompress.quantize.grid import Grid, grouped, largest_integer, stored_scale

#: How many of the calls a step's gradient is the sum over, and at how many points on the way all of them are judged.
_BATCH, _POINTS = 4, 10
#: Between which multiples of its beginning each end of the range stays. In the paper it only shrinks, from the whole
#: range; here it begins with one that was searched.
_RANGE_LIMITS = (0.5, 1.5)


class RoundedWeight:
    """A weight on a grid, with what AutoRound learns: Cheng et al., "Optimize Weight Rounding via Signed Gradient
    Descent for the Quantization of LLMs", arXiv 2309.05516, section 3, equations 3 to 5.

    ::

        Ŵ = s (clip(round(W / s + V) + z) - z),   |V| ≤ 0.5
        symmetric:   s = β s₀                     asymmetric:  s = (β hi - α lo) / (2^bits - 1),  z = round(-α lo / s)

    V begins at 0, α and β at 1; gradients pass the rounding as if it were not there. lo and hi are what the grid that
    it begins with spans, so that the beginning is that grid's nearest rounding of `wanted`.

    Args:
        weight: float32 [N, K].
        grid: where it begins.
        wanted: [N, K], what is rounded in W's place: of GPTQ, the weights as they were when their turn came, so that
            learning begins at its integers. By default W.
    """

    def __init__(self, weight: torch.Tensor, grid: Grid, wanted: torch.Tensor | None = None) -> None:
        self.grid = grid
        self._wanted = grouped(weight if wanted is None else wanted, grid.group_size)
        self._kept = grouped(weight, grid.group_size) != 0
        self._scale = grid.scale.float()
        self.rounding = torch.zeros_like(self._wanted, requires_grad=True)
        self.range = [torch.ones_like(self._scale, requires_grad=True) for _ in range(1 if grid.zero is None else 2)]
        self._best = [p.detach().clone() for p in self.parameters]

    @property
    def parameters(self) -> list[torch.Tensor]:
        """V, and β or (α, β)."""
        return [self.rounding, *self.range]

    def quantized(self) -> torch.Tensor:
        """Ŵ [N, K], float32, with gradients to the parameters."""
        scale, zero = self._current()
        shift = 0 if zero is None else zero[..., None]
        q = _round(self._wanted / scale[..., None] + self.rounding) + shift
        values = (self._clamped(q) - shift) * scale[..., None] * self._kept
        return values.flatten(1)[:, : self.grid.shape[1]]

    def move(self, gradient: torch.Tensor, rate: float) -> None:
        """One step of all parameters against the sign of their gradients, given that with regard to Ŵ."""
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.quantized(), self.parameters, gradient)
        with torch.no_grad():
            for parameter, g in zip(self.parameters, gradients, strict=True):
                parameter.sub_(g.sign(), alpha=rate)
            self.rounding.clamp_(-0.5, 0.5)
            for parameter in self.range:
                parameter.clamp_(*_RANGE_LIMITS)

    def keep(self) -> None:
        """Remembers where it is, as the best so far."""
        self._best = [p.detach().clone() for p in self.parameters]

    def packed(self) -> PackedWeight:
        """The integers of the best."""
        for parameter, best in zip(self.parameters, self._best, strict=True):
            parameter.data.copy_(best)
        with torch.no_grad():
            scale, zero = self._current()
            shift = 0 if zero is None else zero[..., None]
            q = torch.where(self._kept, torch.round(self._wanted / scale[..., None] + self.rounding), 0.0) + shift
            q = self._clamped(q).flatten(1)[:, : self.grid.shape[1]]
            stored = stored_scale(scale, self.grid.args, "autoround")
        grid = Grid(self.grid.args, self.grid.shape, self.grid.group_size, stored, zero, self.grid.full_range)
        return grid.pack(q)

    def _current(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale, in values that can be stored, and zero point."""
        if self.grid.zero is None:
            return _as_stored(self._scale * self.range[0], self.grid), None
        q_max, zero = largest_integer(self.grid.args), self.grid.zero
        alpha, beta = self.range
        lo, hi = -zero * self._scale, (q_max - zero) * self._scale
        scale = _as_stored((hi * beta - lo * alpha) / q_max, self.grid)
        return scale, _round(-lo * alpha / scale).clamp(0, q_max)

    def _clamped(self, q: torch.Tensor) -> torch.Tensor:
        q_max = largest_integer(self.grid.args)
        return q.clamp(-q_max - self.grid.full_range, q_max) if self.grid.zero is None else q.clamp(0, q_max)


def autoround(
    weights: Sequence[RoundedWeight],
    loss: Callable[[Sequence[torch.Tensor], int], torch.Tensor],
    calls: int,
    iterations: int = 200,
    seed: int = 0,
) -> tuple[float, float]:
    """Learns the rounding of all weights of a block together (section 3, algorithm 1).

    ::

        each iteration t of T:  p -= lr_t · sign(∂ Σ loss / ∂p) over 4 calls at random,  lr_t = (1 - t / T) / T

    The authors keep the parameters with the smallest loss over the calls of an iteration; here all calls are judged, at
    ten points on the way and before the first step, so that chance has no part in it, and the result is never worse
    than the beginning.

    Args:
        weights: of the block's layers.
        loss: (Ŵ of each layer, which call) -> the error of the block's output in that call.
        calls: how many there are.
        seed: of the choice of calls.

    Returns:
        The mean loss at the beginning, and that of what was kept.
    """
    generator = torch.Generator().manual_seed(seed)

    def judged() -> float:
        with torch.no_grad():
            values = [w.quantized() for w in weights]
            return sum(float(loss(values, i)) for i in range(calls)) / calls

    first = least = judged()
    every = max(iterations // _POINTS, 1)
    for t in range(iterations):
        with torch.no_grad():
            values = [w.quantized().requires_grad_() for w in weights]
        with torch.enable_grad():
            for i in torch.randint(calls, (min(_BATCH, calls),), generator=generator).tolist():
                loss(values, i).backward()
        for weight, value in zip(weights, values, strict=True):
            if value.grad is not None:  # a layer that the block does not call
                weight.move(value.grad, (1 - t / iterations) / iterations)
        if (t + 1) % every == 0 or t + 1 == iterations:
            now = judged()
            if now < least:
                least = now
                for weight in weights:
                    weight.keep()
    return first, least


def _round(x: torch.Tensor) -> torch.Tensor:
    """Rounded, with the gradient of x."""
    return x + (torch.round(x) - x).detach()


def _as_stored(scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """In values that the stored type has, with the gradient of scale."""
    return scale + (stored_scale(scale.detach(), grid.args, "autoround").float() - scale).detach()
