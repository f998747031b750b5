"""What to do to a model: an ordered list of steps, one kind of step a file."""

from tcompress.recipe.codebook import Codebook
from tcompress.recipe.low_rank import LowRank
from tcompress.recipe.prune import Prune
from tcompress.recipe.quantize import MIN_COSINE, Quantize
from tcompress.recipe.recipe import STEPS, VERSION, Recipe, presets
from tcompress.recipe.share import Share
from tcompress.recipe.shrink import Shrink
from tcompress.recipe.sparse import Sparse
from tcompress.recipe.step import Step, Transform

__all__ = [
    "MIN_COSINE",
    "STEPS",
    "VERSION",
    "Codebook",
    "LowRank",
    "Prune",
    "Quantize",
    "Recipe",
    "Share",
    "Shrink",
    "Sparse",
    "Step",
    "Transform",
    "presets",
]
