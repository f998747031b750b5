"""Pairs of modules between which a scale of each channel can be moved without changing what the model computes."""

from tcompress.pairs.find import Consumer, NoPair, Pair, find_pairs
from tcompress.pairs.fold import fold

__all__ = ["Consumer", "NoPair", "Pair", "find_pairs", "fold"]
