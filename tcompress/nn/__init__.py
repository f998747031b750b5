"""Drop-in modules: quantized ones, and the parts of a Transformer."""

from tcompress.nn.feed_forward import FeedForward
from tcompress.nn.gated_feed_forward import GatedFeedForward
from tcompress.nn.layer_norm import LayerNorm
from tcompress.nn.multihead_attention import MultiHeadAttention
from tcompress.nn.positional_encoding import PositionalEncoding
from tcompress.nn.quantized_embedding import QuantizedEmbedding
from tcompress.nn.quantized_linear import QuantizedLinear
from tcompress.nn.transformer_encoder import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "FeedForward",
    "GatedFeedForward",
    "LayerNorm",
    "MultiHeadAttention",
    "PositionalEncoding",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
