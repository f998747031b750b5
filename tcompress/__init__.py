"""Compress trained Transformers and run them on fused int8 kernels."""

from tcompress import ops

__all__ = ["ops"]
