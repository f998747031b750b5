"""A quantized linear layer whose outlier inputs are multiplied in floating point."""

from __future__ import annotations

import torch
from torch import nn

from tcompress.errors import message
from tcompress.nn.quantized_linear import QuantizedLinear
from tcompress.packing import PackedWeight
from tcompress.quantize.scheme import Scheme


class OutlierLinear(nn.Module):
    """`y = x_rest Ŵᵀ + x_outliers W_outliersᵀ + b`: the inputs that are far larger than the others stay in floating
    point, and the scale of a token's other inputs is not made coarse by them. Dettmers et al., "LLM.int8(): 8-bit
    Matrix Multiplication for Transformers at Scale", arXiv 2208.07339, section 3.2; the columns are fixed by the
    calibration data, where the paper finds them in each input.

    Called like `torch.nn.Linear`; inference only. The state dict holds that of `rest`, a `QuantizedLinear` whose
    outlier columns are zero, with `outlier_columns` (int64 [C]) and `outlier_weight` ([N, C], the type of the layer
    before).

    Args:
        in_features: K. out_features: N.
        outliers: C, how many inputs stay in floating point.
        bias, scheme, device: as in `QuantizedLinear`. dtype: of the bias and the outliers' weights.

    Raises:
        ValueError: as `QuantizedLinear`, or outliers not in 1 … K.
    """

    outlier_columns: torch.Tensor
    outlier_weight: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        outliers: int,
        bias: bool = True,
        scheme: str | Scheme = "W8A8",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= outliers <= in_features:
            raise ValueError(message("OutlierLinear", "outliers", outliers, f"1 to in_features, {in_features}"))
        self.in_features, self.out_features = in_features, out_features
        self.rest = QuantizedLinear(in_features, out_features, bias, scheme, device, dtype)
        self.register_buffer("outlier_columns", torch.zeros(outliers, dtype=torch.int64, device=device))
        self.register_buffer("outlier_weight", torch.zeros(out_features, outliers, device=device, dtype=dtype))

    @classmethod
    def from_parts(cls, rest: QuantizedLinear, columns: torch.Tensor, weight: torch.Tensor) -> OutlierLinear:
        """A module around a quantized layer.

        Args:
            rest: whose weight is zero in these columns.
            columns: int64 [C], in ascending order. weight: [N, C].
        """
        k, n = rest.in_features, rest.out_features
        module = cls(k, n, columns.numel(), rest.bias is not None, rest.scheme, "meta", weight.dtype)
        module.rest = rest
        module.outlier_columns, module.outlier_weight = columns, weight.detach().contiguous()
        return module

    @property
    def scheme(self) -> Scheme:
        """Of all inputs but the outliers."""
        return self.rest.scheme

    @property
    def bias(self) -> torch.Tensor | None:
        return self.rest.bias

    @property
    def weight(self) -> torch.Tensor:
        """A stand-in, as in `QuantizedLinear`."""
        return self.rest.weight

    @property
    def packed(self) -> PackedWeight:
        """The quantized part."""
        return self.rest.packed

    def dequantize(self) -> torch.Tensor:
        """The whole weight, float32 [N, K]."""
        weight = self.rest.packed.dequantize()
        weight[:, self.outlier_columns] = self.outlier_weight.float()
        return weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: [..., K]. Returns [..., N] in its type."""
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(message("OutlierLinear", "input", list(input.shape), f"[..., {self.in_features}]"))
        large = input.index_select(-1, self.outlier_columns)
        exact = nn.functional.linear(large, self.outlier_weight.to(input.dtype))
        y: torch.Tensor = self.rest(input.index_fill(-1, self.outlier_columns, 0), exact)
        return y

    def extra_repr(self) -> str:
        return f"outliers={self.outlier_columns.numel()}"
