"""A linear layer of two thin ones."""

from __future__ import annotations

import torch
from torch import nn


class LowRankLinear(nn.Module):
    """`y = expand(reduce(x))`, reduce: [r, K] without a bias, expand: [N, r] with the layer's: N·r + r·K weights.

    Its two layers are plain ones (`torch.nn.Linear`) that later steps of a recipe may prune or quantize, or what those
    made of them.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
        rank: r.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.reduce: nn.Module = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.expand: nn.Module = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, b: torch.Tensor, a: torch.Tensor, bias: torch.Tensor | None) -> LowRankLinear:
        """A layer of `W = b a`, b [N, r], a [r, K]; it shares the tensors."""
        module = cls(a.shape[1], b.shape[0], b.shape[1], bias is not None, device="meta", dtype=b.dtype)
        module.reduce.weight, module.expand.weight = _parameter(a), _parameter(b)
        if bias is not None:
            module.expand.bias = _parameter(bias)
        return module

    @property
    def weight(self) -> torch.Tensor:
        """[N, K], the product of the factors, computed at each access."""
        return self.expand.weight @ self.reduce.weight  # type: ignore[operator]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.expand.bias  # type: ignore[return-value]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: [..., K]. Returns [..., N]."""
        output: torch.Tensor = self.expand(self.reduce(input))
        return output


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    """Itself, where it is one: tied layers share their factors."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
