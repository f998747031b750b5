"""A sparse weight in its portable storage layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tcompress.errors import message
from tcompress.packing.sparse_blocks import pack_blocks, unpack_blocks
from tcompress.packing.sparse_n_m import pack_n_m, unpack_n_m
from tcompress.packing.sparse_pattern import Pattern
from tcompress.packing.sparse_unstructured import pack_unstructured, unpack_unstructured
from tcompress.packing.sparse_values import Stored, float_bits

#: The bits that a dense weight's type takes, and the type that stores so many bits.
_BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 16, torch.int8: 8}


@dataclass(frozen=True)
class SparseWeight:
    """What is kept of one weight [N, K], in the layout that is saved; kernels derive their own layout from it.

    Attributes:
        values: what is kept, 1-D, in the order of the layout. bits 32: float32. 16: bfloat16 or float16. 8: int8. 4:
            uint8, two integers -8 … 7 a byte, 8 added, the first in the low nibble.
        index: where it lies, uint8 1-D.
        index_kind: "bitmap" or "delta" (`encode_index`); "positions" for N:M (`sparse_n_m`).
        shape: (N, K) of the weight.
        pattern: "unstructured", "N:M" or "RxC" (`Pattern`).
        bits: of a value.
        scale: None for floats. bits 8: float32 [N], `W[n,k] = q[n,k] · scale[n]`. bits 4: float16 or float32
            [N, ceil(K/g)], `W[n,k] = q[n,k] · scale[n, k/g]`.
        group_size: bits 4: g, how many weights along K share a scale; K or more for one scale a channel. Else 0.

    Raises:
        TypeError: a tensor of another type. ValueError: a field that contradicts the others. What is wrong inside the
            index is found when the weight is unpacked.
    """

    values: torch.Tensor
    index: torch.Tensor
    index_kind: str
    shape: tuple[int, int]
    pattern: str
    bits: int
    scale: torch.Tensor | None = None
    group_size: int = 0

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise _value_error("shape", self.shape, "(N, K)")
        positions = Pattern.parse(self.pattern).kind == "n_m"
        if self.index_kind not in (("positions",) if positions else ("bitmap", "delta")):
            expected = '"positions"' if positions else '"bitmap" or "delta"'
            raise _value_error("index_kind", repr(self.index_kind), f"{expected} for {self.pattern}")
        for name, tensor in (("values", self.values), ("index", self.index)):
            if tensor.dim() != 1:
                raise _value_error(name, list(tensor.shape), "one dimension")
        stored = 4 if self.values.dtype == torch.uint8 else _BITS.get(self.values.dtype)
        if stored != self.bits:
            expected = "float32 for 32 bits, bfloat16 or float16 for 16, int8 for 8, uint8 for 4"
            raise TypeError(message("SparseWeight", "values", f"{self.values.dtype} for {self.bits} bits", expected))
        _check_scale(self.scale, self.shape, self.bits, self.group_size)

    def integers(self) -> torch.Tensor:
        """The dense integers, int8 [N, K].

        Raises:
            TypeError: the values are floats. ValueError: a malformed index.
        """
        if self.bits > 8:
            raise TypeError(message("SparseWeight.integers", "values", self.values.dtype, "integers", "call floats()"))
        return self._unpack()

    def floats(self) -> torch.Tensor:
        """The dense weight [N, K] in the type of the values.

        Raises:
            TypeError: the values are integers. ValueError: a malformed index.
        """
        if self.bits <= 8:
            hint = "call dequantize()"
            raise TypeError(message("SparseWeight.floats", "values", f"{self.bits}-bit integers", "floats", hint))
        return self._unpack().view(self.values.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that is stored, [N, K]; of integers computed in float32 and rounded once.

        Raises:
            ValueError: a malformed index.
        """
        if self.scale is None:
            return self.floats().to(dtype)
        scale = self.scale.float()
        if self.bits == 8:
            along_k = scale[:, None]
        else:
            k = self.shape[1]
            along_k = scale.repeat_interleave(min(self.group_size, max(k, 1)), 1)[:, :k]
        return (self.integers().float() * along_k).to(dtype)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.index.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def _unpack(self) -> torch.Tensor:
        stored = Stored(float_bits(self.values) if self.bits > 8 else self.values, self.index, self.index_kind)
        pattern = Pattern.parse(self.pattern)
        if pattern.kind == "unstructured":
            return unpack_unstructured(stored, self.shape, self.bits)
        unpack = unpack_n_m if pattern.kind == "n_m" else unpack_blocks
        return unpack(stored, self.shape, pattern.size, self.bits)


def pack_sparse(
    dense: torch.Tensor,
    pattern: str,
    *,
    scale: torch.Tensor | None = None,
    bits: int | None = None,
    group_size: int = 0,
) -> SparseWeight:
    """Stores what is not zero of a weight, by blocks or groups if the pattern has them.

    Unpacking gives the same bits again, but for -0.0, which counts as zero and comes back as 0.0. NaN and infinity
    are kept.

    Args:
        dense: [N, K]; float32, bfloat16 or float16, or the integers of a quantized weight, int8.
        pattern: "unstructured", "2:4", "8x4" … (`Pattern`). N:M must hold everywhere; a block is kept whole where
            anything in it is not zero.
        scale: of integers: float32 [N], or of 4 bits float16 or float32 [N, ceil(K/g)].
        bits: what a value takes: by default what its type takes. 4 stores integers -8 … 7.
        group_size: g of 4-bit integers.

    Raises:
        TypeError: a type that is not listed. ValueError: a shape, a scale, a number of bits or a group size that does
            not fit, an integer that takes more bits, a weight that does not have the N:M pattern.
    """
    parsed = Pattern.parse(pattern)
    own_bits = _BITS.get(dense.dtype)
    if own_bits is None:
        raise TypeError(message("pack_sparse", "dense", dense.dtype, "float32, bfloat16, float16 or int8"))
    if dense.dim() != 2:
        raise ValueError(message("pack_sparse", "dense", list(dense.shape), "[N, K]"))
    bits = own_bits if bits is None else bits
    if bits != own_bits and (bits, own_bits) != (4, 8):
        expected = "8 or 4" if own_bits == 8 else own_bits
        raise ValueError(message("pack_sparse", "bits", bits, f"{expected} for {dense.dtype}", "quantize first"))
    n, k = dense.shape
    _check_scale(scale, (n, k), bits, group_size)
    moved = float_bits(dense.detach()) if bits > 8 else dense
    moved = moved.masked_fill(dense == 0, 0)  # no -0.0
    if bits == 4 and dense.numel() and not -8 <= int(dense.min()) <= int(dense.max()) <= 7:
        got = f"integers from {int(dense.min())} to {int(dense.max())}"
        raise ValueError(message("pack_sparse", "dense", got, "-8 to 7 for 4 bits"))
    if parsed.kind == "unstructured":
        stored = pack_unstructured(moved, bits)
    else:
        pack = pack_n_m if parsed.kind == "n_m" else pack_blocks
        stored = pack(moved, parsed.size, bits)
    values = stored.values.view(dense.dtype) if bits > 8 else stored.values
    return SparseWeight(values, stored.index, stored.index_kind, (n, k), str(parsed), bits, scale, group_size)


def _check_scale(scale: torch.Tensor | None, shape: tuple[int, int], bits: int, group_size: int) -> None:
    """Raises unless the scale and the group size are what a weight of so many bits has."""
    n, k = shape
    if bits == 4 and group_size < 1:
        raise _value_error("group_size", group_size, "at least 1 for 4 bits", "K gives one scale a channel")
    if bits != 4 and group_size != 0:
        raise _value_error("group_size", group_size, f"0 for {bits} bits")
    if bits > 8:
        if scale is not None:
            raise _value_error("scale", list(scale.shape), f"None for {bits}-bit floats")
        return
    expected = [n] if bits == 8 else [n, -(-k // group_size)]
    if scale is None or list(scale.shape) != expected:
        raise _value_error("scale", None if scale is None else list(scale.shape), f"{expected} for {bits} bits")
    if scale.dtype != torch.float32 and (bits == 8 or scale.dtype != torch.float16):
        types = "float32" if bits == 8 else "float16 or float32"
        raise TypeError(message("SparseWeight", "scale", scale.dtype, f"{types} for {bits} bits"))


def _value_error(argument: str, got: object, expected: str, hint: str = "") -> ValueError:
    return ValueError(message("SparseWeight", argument, got, expected, hint))
