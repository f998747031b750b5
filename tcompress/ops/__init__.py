"""The ops: each file holds one op's schema, reference, fake, flops and bytes."""

from tcompress.ops.int8_linear import int8_linear
from tcompress.ops.int8_prepack import int8_prepack
from tcompress.ops.quantize_per_token import quantize_per_token

__all__ = ["int8_linear", "int8_prepack", "quantize_per_token"]
