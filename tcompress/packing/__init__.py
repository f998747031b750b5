"""Storage layouts of compressed weights, one a file."""

from tcompress.packing.int4 import pack_int4, unpack_int4
from tcompress.packing.packed_weight import PackedWeight

__all__ = ["PackedWeight", "pack_int4", "unpack_int4"]
