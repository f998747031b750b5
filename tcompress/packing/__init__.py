"""Storage layouts of compressed weights, one a file."""

from tcompress.packing.find_patterns import PatternFit, find_patterns
from tcompress.packing.int4 import pack_int4, unpack_int4
from tcompress.packing.packed_weight import PackedWeight
from tcompress.packing.sparse_index import decode_index, encode_index
from tcompress.packing.sparse_pattern import Pattern
from tcompress.packing.sparse_weight import SparseWeight, pack_sparse

__all__ = [
    "PackedWeight",
    "Pattern",
    "PatternFit",
    "SparseWeight",
    "decode_index",
    "encode_index",
    "find_patterns",
    "pack_int4",
    "pack_sparse",
    "unpack_int4",
]
