"""Storage layouts of compressed weights, one a file."""

from tcompress.packing.packed_weight import PackedWeight

__all__ = ["PackedWeight"]
