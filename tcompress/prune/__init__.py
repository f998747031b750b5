"""Pruning: which weights go (one method a file)."""

from tcompress.prune.magnitude import magnitude_mask

__all__ = ["magnitude_mask"]
