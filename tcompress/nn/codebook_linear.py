"""Drop-in for `torch.nn.Linear` whose weights are indices into codebooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tcompress.packing.codebook import CodebookWeight, codebook_shape, packed_width


class CodebookLinear(nn.Module):
    """`y = x Wᵀ + bias` with `W[n, k] = codebook[n // rows, k // columns, index[n, k]]`.

    The state dict holds `weight_indices` (uint8 [N, ceil(K·bits/8)], `packing.codebook.pack_bits`), `weight_codebook`
    (float16 or float32 [ceil(N/rows), ceil(K/columns), 2^bits]) and `bias`, if there is one.

    Args:
        in_features, out_features, bias: as in `torch.nn.Linear`.
        bits, rows, columns: of an index, and of the tile that shares a codebook.
        held: in memory as "float", the weight looked up once: as fast and as large as `torch.nn.Linear`; or as
            "indices", looked up at each call: small, and slower.
        codebook_dtype: float16 or float32.
        dtype: of the looked-up weight and the bias.
    """

    weight_indices: torch.Tensor
    weight_codebook: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 4,
        rows: int | None = None,
        columns: int | None = None,
        held: str = "float",
        codebook_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.held = in_features, out_features, bits, held
        self.rows, self.columns = min(rows or out_features, out_features), min(columns or in_features, in_features)
        self.dtype = dtype or torch.get_default_dtype()
        indices = torch.zeros(out_features, packed_width(in_features, bits), dtype=torch.uint8, device=device)
        shape = codebook_shape((out_features, in_features), bits, self.rows, self.columns)
        self.register_buffer("weight_indices", indices)
        self.register_buffer("weight_codebook", torch.zeros(shape, dtype=codebook_dtype, device=device))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=self.dtype))
        self.register_buffer("looked_up", None, persistent=False)
        self._look_up()

    @classmethod
    def from_codebook(
        cls, weight: CodebookWeight, bias: torch.Tensor | None, dtype: torch.dtype, held: str = "float"
    ) -> CodebookLinear:
        """A layer around a weight and a bias, which it shares."""
        n, k = weight.shape
        sizes = (weight.bits, weight.rows, weight.columns, held, weight.codebook.dtype)
        module = cls(k, n, bias is not None, *sizes, device="meta", dtype=dtype)
        module.weight_indices, module.weight_codebook = weight.indices, weight.codebook
        if bias is not None:
            module.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())
        module._look_up()
        return module

    @property
    def packed(self) -> CodebookWeight:
        """The indices and codebooks."""
        sizes = (self.out_features, self.in_features), self.bits, self.rows, self.columns
        return CodebookWeight(self.weight_indices, self.weight_codebook, *sizes)

    @property
    def weight(self) -> torch.Tensor:
        """[N, K] in floating point."""
        looked_up: torch.Tensor | None = self.looked_up
        return self.packed.dequantize(self.dtype) if looked_up is None else looked_up

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: [..., K]. Returns [..., N]."""
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        tile = f"{self.rows}x{self.columns}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, tile={tile}, held={self.held}"
        )

    def _look_up(self) -> None:
        held = self.held == "float" and self.weight_indices.device.type != "meta"
        self.looked_up = self.packed.dequantize(self.dtype) if held else None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CodebookLinear:
        codebook = self.weight_codebook
        self.looked_up = None
        super()._apply(fn, recurse)
        if self.weight_codebook.dtype != codebook.dtype:  # .bfloat16() must not round the stored values
            self.weight_codebook = codebook.to(self.weight_codebook.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self._look_up()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._look_up()
