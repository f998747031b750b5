"""Models with zeros in them, and recipes that make or use these."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from tcompress.prune import magnitude_mask

PRUNE = {"step": "prune", "pattern": "8x4", "sparsity": 0.75}
SPARSE, SPARSE_INT8 = {"step": "sparse"}, {"step": "sparse", "scheme": "W8A8"}
W8A8 = {"step": "quantize", "scheme": "W8A8"}


def steps(*all_steps, **fields):
    return {"steps": [{**step, **fields} for step in all_steps]}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()


def zeroed(model, sparsity=0.75, pattern="8x4"):
    """A model that something else has pruned."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(magnitude_mask(module.weight, pattern, sparsity))
    return model


def masked(model, sparsity=0.75):
    """A model with the hooks of torch.nn.utils.prune still there."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            prune.l1_unstructured(module, "weight", sparsity)
    return model


def zeros(weight):
    return float((weight == 0).double().mean())


def cosine(a, b):
    return float(F.cosine_similarity(a.detach().double().flatten(), b.detach().double().flatten(), dim=0))
