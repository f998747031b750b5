"""Weight sharing, one algorithm a file: codebooks, tied layers, low-rank factors."""

from tcompress.share.kmeans import kmeans_1d, kmeans_codebook
from tcompress.share.low_rank import low_rank_factors, rank_for

__all__ = ["kmeans_1d", "kmeans_codebook", "low_rank_factors", "rank_for"]
