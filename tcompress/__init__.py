"""Compress trained Transformers and run them on fused int8 kernels, as drop-in torch modules."""

from tcompress import cuda_backend, nn, ops, triton_backend  # noqa: F401  backends: their kernels are registered
from tcompress.advisor import Advice, Target, advise
from tcompress.backend import explain, use_backend, use_cpu_path
from tcompress.compress import CompressResult, compress
from tcompress.distill.student import narrower, student_of
from tcompress.distill_step import DistillResult, distill
from tcompress.estimate import Estimate, estimate
from tcompress.formats.checkpoint import load, save
from tcompress.integrations.transformers_attention import register_when_imported
from tcompress.kv_cache import KVCache
from tcompress.mixed_precision import mixed_precision
from tcompress.ops import (
    int8_attention,
    int8_attention_varlen,
    quantized_attention,
    quantized_attention_varlen,
)
from tcompress.quantize import QuantArgs, Scheme
from tcompress.ratios import global_ratios, search_ratios
from tcompress.recipe import (
    AWQ,
    Codebook,
    Distill,
    Finetune,
    LowRank,
    Prune,
    Quantize,
    Recipe,
    Rotate,
    Share,
    Shrink,
    Smooth,
    Sparse,
    presets,
)
from tcompress.report.report import Report

__version__ = "0.1.0"

register_when_imported()

__all__ = [
    "AWQ",
    "Advice",
    "Codebook",
    "CompressResult",
    "Distill",
    "DistillResult",
    "Estimate",
    "Finetune",
    "KVCache",
    "LowRank",
    "Prune",
    "QuantArgs",
    "Quantize",
    "Recipe",
    "Report",
    "Rotate",
    "Scheme",
    "Share",
    "Shrink",
    "Smooth",
    "Sparse",
    "Target",
    "advise",
    "compress",
    "distill",
    "estimate",
    "explain",
    "global_ratios",
    "int8_attention",
    "int8_attention_varlen",
    "load",
    "mixed_precision",
    "narrower",
    "nn",
    "ops",
    "presets",
    "quantized_attention",
    "quantized_attention_varlen",
    "save",
    "search_ratios",
    "student_of",
    "use_backend",
    "use_cpu_path",
]
