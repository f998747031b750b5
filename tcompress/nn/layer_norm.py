"""Layer normalisation over the last axis."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """Normalise every token to zero mean and unit variance, then scale and shift it.

    ``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, where ``mean`` and the biased ``var``
    (divided by ``d_model``, not ``d_model - 1``) are taken over the last axis.

    Paper: Ba, Kiros, Hinton, "Layer Normalization", arXiv 1607.06450, section 3, equation 3.
    ``eps`` is not in the paper: it keeps a constant token finite.

    Args:
        d_model: size of the last axis.
        eps: added to the variance; must be positive and finite.
        bias: ``False`` leaves out the shift.

    Shapes:
        x ``[..., d_model]`` floating -> same shape and dtype. ``weight`` and ``bias`` are ``[d_model]``.

    Raises:
        ValueError: ``d_model < 1``, ``eps`` not positive and finite, or a last axis other than ``d_model``.
    """

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"LayerNorm: d_model: got {d_model}, expected at least 1; it is the size of the last axis")
        if not 0 < eps < math.inf:
            raise ValueError(
                f"LayerNorm: eps: got {eps}, expected a positive finite number; "
                "without it a constant token divides by zero, 1e-5 is usual"
            )
        self.d_model = d_model
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(d_model, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"LayerNorm: x: got shape {tuple(x.shape)}, expected [..., {self.d_model}]; "
                "the last axis is the one that is normalised"
            )
        return F.layer_norm(x, (self.d_model,), self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.d_model}, eps={self.eps}, bias={self.bias is not None}"

    @classmethod
    def from_torch(cls, norm: nn.Module) -> LayerNorm:
        """Copy a ``torch.nn.LayerNorm`` over one axis, with its ``eps``, device and dtype.

        ``elementwise_affine=False`` becomes a weight of ones without a bias, which computes the same numbers.

        Raises:
            TypeError: not exactly ``torch.nn.LayerNorm`` (a subclass may compute something else).
            ValueError: it normalises more than one axis.
        """
        if type(norm) is not nn.LayerNorm:
            raise TypeError(
                f"LayerNorm.from_torch: norm: got {type(norm).__name__}, expected torch.nn.LayerNorm; "
                "other norms have no equivalent here"
            )
        if len(norm.normalized_shape) != 1:
            raise ValueError(
                f"LayerNorm.from_torch: norm.normalized_shape: got {norm.normalized_shape}, expected one "
                "axis; a norm over several axes has no equivalent here"
            )
        (d_model,) = norm.normalized_shape
        if not norm.elementwise_affine:
            return cls(d_model, norm.eps, bias=False).train(norm.training)
        ours = cls(d_model, norm.eps, bias=norm.bias is not None, device="meta")
        ours.load_state_dict({name: t.clone() for name, t in norm.state_dict().items()}, assign=True)
        return ours.train(norm.training)
