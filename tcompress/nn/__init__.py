"""Drop-in modules: quantized ones, and the parts of a Transformer."""

from tcompress.nn.codebook_linear import CodebookLinear
from tcompress.nn.feed_forward import FeedForward
from tcompress.nn.gated_feed_forward import GatedFeedForward
from tcompress.nn.int8_attention import Int8Attention
from tcompress.nn.int8_multihead_attention import Int8MultiheadAttention
from tcompress.nn.layer_norm import LayerNorm
from tcompress.nn.low_rank_linear import LowRankLinear
from tcompress.nn.multihead_attention import MultiHeadAttention
from tcompress.nn.outlier_linear import OutlierLinear
from tcompress.nn.positional_encoding import PositionalEncoding
from tcompress.nn.quantized_embedding import QuantizedEmbedding
from tcompress.nn.quantized_linear import QuantizedLinear
from tcompress.nn.sparse_linear import SparseLinear
from tcompress.nn.transformer_encoder import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "CodebookLinear",
    "FeedForward",
    "GatedFeedForward",
    "Int8Attention",
    "Int8MultiheadAttention",
    "LayerNorm",
    "LowRankLinear",
    "MultiHeadAttention",
    "OutlierLinear",
    "PositionalEncoding",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "SparseLinear",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
