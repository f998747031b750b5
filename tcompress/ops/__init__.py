"""The ops: each file holds one op's schema, reference, fake, flops and bytes."""

from tcompress.ops.int4_linear import int4_linear
from tcompress.ops.int4_multi_linear import int4_multi_linear
from tcompress.ops.int4_prepack import int4_prepack
from tcompress.ops.int4_sparse_linear import int4_sparse_linear
from tcompress.ops.int4_sparse_prepack import int4_sparse_prepack
from tcompress.ops.int4_sparse_unpack import int4_sparse_unpack
from tcompress.ops.int4_unpack import int4_unpack
from tcompress.ops.int8_linear import int8_linear
from tcompress.ops.int8_linear_quantized import int8_linear_quantized
from tcompress.ops.int8_linear_requantize import int8_linear_requantize
from tcompress.ops.int8_linear_static import int8_linear_static
from tcompress.ops.int8_multi_linear import int8_multi_linear
from tcompress.ops.int8_prepack import int8_prepack
from tcompress.ops.int8_sparse_linear import int8_sparse_linear
from tcompress.ops.int8_unpack import int8_unpack
from tcompress.ops.kv_cache_append import kv_cache_append
from tcompress.ops.kv_cache_attention import kv_cache_attention
from tcompress.ops.quantize_per_token import quantize_per_token
from tcompress.ops.quantize_static import quantize_static
from tcompress.ops.quantized_attention import int8_attention, quantized_attention
from tcompress.ops.quantized_attention_varlen import int8_attention_varlen, quantized_attention_varlen
from tcompress.ops.short_attention import short_attention
from tcompress.ops.sparse_linear import sparse_linear
from tcompress.ops.sparse_prepack import sparse_prepack
from tcompress.ops.sparse_unpack import sparse_unpack

__all__ = [
    "int4_linear",
    "int4_multi_linear",
    "int4_prepack",
    "int4_sparse_linear",
    "int4_sparse_prepack",
    "int4_sparse_unpack",
    "int4_unpack",
    "int8_attention",
    "int8_attention_varlen",
    "int8_linear",
    "int8_linear_quantized",
    "int8_linear_requantize",
    "int8_linear_static",
    "int8_multi_linear",
    "int8_prepack",
    "int8_sparse_linear",
    "int8_unpack",
    "kv_cache_append",
    "kv_cache_attention",
    "quantize_per_token",
    "quantize_static",
    "quantized_attention",
    "quantized_attention_varlen",
    "short_attention",
    "sparse_linear",
    "sparse_prepack",
    "sparse_unpack",
]
