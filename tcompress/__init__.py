"""Compress trained Transformers and run them on fused int8 kernels, as drop-in torch modules."""

from tcompress import cuda_backend, nn, ops, triton_backend  # noqa: F401  backends: their kernels are registered
from tcompress.backend import explain, use_backend, use_cpu_path
from tcompress.compress import CompressResult, compress
from tcompress.formats.checkpoint import load, save
from tcompress.integrations.transformers_attention import register_when_imported
from tcompress.kv_cache import KVCache
from tcompress.ops import (
    int8_attention,
    int8_attention_varlen,
    quantized_attention,
    quantized_attention_varlen,
)
from tcompress.quantize import QuantArgs, Scheme
from tcompress.ratios import global_ratios, search_ratios
from tcompress.recipe import Prune, Quantize, Recipe, Sparse, presets
from tcompress.report.report import Report

__version__ = "0.1.0"

register_when_imported()

__all__ = [
    "CompressResult",
    "KVCache",
    "Prune",
    "QuantArgs",
    "Quantize",
    "Recipe",
    "Report",
    "Scheme",
    "Sparse",
    "compress",
    "explain",
    "global_ratios",
    "int8_attention",
    "int8_attention_varlen",
    "load",
    "nn",
    "ops",
    "presets",
    "quantized_attention",
    "quantized_attention_varlen",
    "save",
    "search_ratios",
    "use_backend",
    "use_cpu_path",
]
