"""What to do to a model: an ordered list of steps, one kind of step a file."""

from tcompress.recipe.awq import AWQ
from tcompress.recipe.codebook import Codebook
from tcompress.recipe.distill import Distill
from tcompress.recipe.finetune import Finetune
from tcompress.recipe.low_rank import LowRank
from tcompress.recipe.prune import Prune
from tcompress.recipe.quantize import MIN_COSINE, Quantize
from tcompress.recipe.recipe import STEPS, VERSION, Recipe, presets
from tcompress.recipe.rotate import Rotate
from tcompress.recipe.share import Share
from tcompress.recipe.shrink import Shrink
from tcompress.recipe.smooth import Smooth
from tcompress.recipe.sparse import Sparse
from tcompress.recipe.step import Step, Transform

__all__ = [
    "AWQ",
    "MIN_COSINE",
    "STEPS",
    "VERSION",
    "Codebook",
    "Distill",
    "Finetune",
    "LowRank",
    "Prune",
    "Quantize",
    "Recipe",
    "Rotate",
    "Share",
    "Shrink",
    "Smooth",
    "Sparse",
    "Step",
    "Transform",
    "presets",
]
