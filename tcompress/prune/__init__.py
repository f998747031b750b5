"""Pruning: which weights go (one method a file)."""

from tcompress.prune.magnitude import magnitude_mask
from tcompress.prune.sparsegpt import SparseSolution, sparsegpt
from tcompress.prune.wanda import wanda_mask

__all__ = ["SparseSolution", "magnitude_mask", "sparsegpt", "wanda_mask"]
