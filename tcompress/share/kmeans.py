"""k-means codebooks: each weight becomes the index of one of a few shared values."""

from __future__ import annotations

import math
from typing import Literal

import torch

from tcompress.errors import message
from tcompress.packing.codebook import CodebookWeight, pack_bits

Init = Literal["linear", "k-means++"]


def kmeans_codebook(
    weight: torch.Tensor,
    bits: int,
    rows: int | None = None,
    columns: int | None = None,
    *,
    importance: torch.Tensor | None = None,
    init: Init = "linear",
    iterations: int = 100,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> CodebookWeight:
    """Shares weights within each tile of `rows` x `columns` by one-dimensional k-means; Han et al., "Deep Compression",
    arXiv 1510.00149, section 3.

    ::

        minimise Σ_nk h_k (W_nk - c[index_nk])²      over 2^bits values c a tile and the indices

    with h = 1, or the diagonal of the Hessian of a layer's output error, so that weights of large inputs are hit more
    exactly (Choi et al., "Towards the Limit of Network Quantization", arXiv 1612.01543, section 3.3). Where a tile
    holds zeros as pruning leaves them (a twentieth of it or more), one of its values is zero, and they stay zero.

    Args:
        weight: [N, K], any float type.
        bits: of an index, 1 … 8.
        rows, columns: of a tile; None for all. (1, None) is a codebook a row, (None, None) one for the tensor.
        importance: float [K], h, at least 0.
        init: "linear" spreads the first values evenly over the range (section 3.2: the paper's best, since large
            weights matter most and are few); "k-means++" draws them by their distance from those drawn before.
        iterations: at most so many; the search ends when no weight changes its value.
        dtype: of the stored values, float16 or float32. Weights take the nearest of the values as stored.
        seed: of "k-means++".

    Returns:
        The indices and codebooks.

    Raises:
        TypeError: the weight is not of a float type. ValueError: it is not [N, K], empty, holds NaN or infinity or
            what `dtype` cannot hold; bits, tile or importance are out of their range.
    """
    n, k = _check(weight, bits, rows, columns, importance, dtype)
    r, c = min(rows or n, n), min(columns or k, k)
    down, across = math.ceil(n / r), math.ceil(k / c)
    # Tiles that stick out are filled up by what weighs nothing.
    values = weight.new_zeros(down * r, across * c, dtype=torch.float32)
    values[:n, :k] = weight.detach().float()
    weighing = torch.zeros_like(values)
    weighing[:n, :k] = 1.0 if importance is None else importance.float().to(weight.device)
    tiles, masses = (_as_tiles(t, r, c) for t in (values, weighing))
    zero = ((tiles == 0) & (masses > 0)).sum(1) >= 0.05 * (masses > 0).sum(1).clamp(min=1)
    if bool(zero.any()):
        masses = torch.where(zero[:, None] & (tiles == 0), 0.0, masses)
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    centroids = torch.empty(len(tiles), 2**bits, device=weight.device)
    for has_zero in (False, True):
        own = zero == has_zero
        if bool(own.any()):
            found = kmeans_1d(tiles[own], masses[own], 2**bits - has_zero, init, iterations, generator)
            centroids[own] = torch.cat([found, found.new_zeros(len(found), int(has_zero))], 1).sort(1).values
    stored = centroids.to(dtype)
    index = nearest(tiles, stored.float())
    index = index.view(down, across, r, c).transpose(1, 2).reshape(down * r, across * c)[:n, :k]
    packed = pack_bits(index.to(torch.uint8).contiguous(), bits)
    return CodebookWeight(packed, stored.view(down, across, -1), (n, k), bits, r, c)


def kmeans_1d(
    values: torch.Tensor,
    masses: torch.Tensor,
    k: int,
    init: Init,
    iterations: int,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Lloyd's algorithm in one dimension, for many sets at once.

    On sorted values the clusters are stretches, their sums differences of running sums, and their borders a binary
    search for the middle between two centroids: a round costs k·log n, not k·n.

    Args:
        values: float32 [G, n], of G sets.
        masses: float32 [G, n], how much each counts; one of 0 takes no part.
        k: how many centroids.

    Returns:
        float32 [G, k], ascending. A centroid with no value near it stays where it was.
    """
    spread = torch.where(masses > 0, values, torch.nan)
    low, high = (torch.nan_to_num(f(spread)) for f in (_nanmin, _nanmax))
    values = torch.where(masses > 0, values, low[:, None])
    x, order = values.sort(1)
    m = masses.gather(1, order).double()
    zeros = m.new_zeros(len(m), 1)
    mass = torch.cat([zeros, m.cumsum(1)], 1)
    moment = torch.cat([zeros, (m * x).cumsum(1)], 1)
    if init == "linear":
        steps = torch.linspace(0, 1, k, device=values.device) if k > 1 else torch.full((1,), 0.5, device=values.device)
        centroids = low[:, None] + (high - low)[:, None] * steps
    else:
        centroids = _plus_plus(x, m, k, generator)
    borders: torch.Tensor | None = None
    first, last = torch.zeros(len(x), 1, dtype=torch.long, device=x.device), x.new_full((len(x), 1), x.shape[1]).long()
    for _ in range(iterations):
        middle = (centroids[:, 1:] + centroids[:, :-1]) / 2
        new = torch.searchsorted(x, middle.contiguous())
        if borders is not None and torch.equal(new, borders):
            break
        borders = new
        ends = torch.cat([first, new, last], 1)
        weight = mass.gather(1, ends[:, 1:]) - mass.gather(1, ends[:, :-1])
        mean = (moment.gather(1, ends[:, 1:]) - moment.gather(1, ends[:, :-1])) / weight
        # Rounding of the sums must not put a mean beyond its neighbours'.
        centroids = torch.where(weight > 0, mean.float(), centroids).sort(1).values
    return centroids


def nearest(values: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index of the nearest of ascending centroids [G, k] to each of values [G, n]; of two as near, the lower."""
    middle = (centroids[:, 1:] + centroids[:, :-1]) / 2
    return torch.searchsorted(middle.contiguous(), values.contiguous())


def _plus_plus(x: torch.Tensor, m: torch.Tensor, k: int, generator: torch.Generator | None) -> torch.Tensor:
    """Arthur and Vassilvitskii, "k-means++" (2007), section 2.2: each next by its squared distance from the nearest."""
    distance, chosen = torch.ones_like(m), []
    for _ in range(k):
        running = (m * distance).cumsum(1)
        drawn = torch.rand(len(x), 1, dtype=torch.float64, device=x.device, generator=generator) * running[:, -1:]
        at = torch.searchsorted(running, drawn, right=True).clamp(max=x.shape[1] - 1)
        chosen.append(x.gather(1, at))
        gap = (x - chosen[-1]).double().square()
        distance = gap if len(chosen) == 1 else torch.minimum(distance, gap)
    return torch.cat(chosen, 1).sort(1).values


def _as_tiles(t: torch.Tensor, r: int, c: int) -> torch.Tensor:
    return t.unflatten(0, (-1, r)).unflatten(2, (-1, c)).transpose(1, 2).reshape(-1, r * c)


def _nanmin(t: torch.Tensor) -> torch.Tensor:
    return t.nan_to_num(torch.inf).amin(1).nan_to_num(posinf=0.0)


def _nanmax(t: torch.Tensor) -> torch.Tensor:
    return t.nan_to_num(-torch.inf).amax(1).nan_to_num(neginf=0.0)


def _check(
    weight: torch.Tensor,
    bits: int,
    rows: int | None,
    columns: int | None,
    importance: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[int, int]:
    where = "kmeans_codebook"
    if not weight.is_floating_point():
        raise TypeError(message(where, "weight", weight.dtype, "a float type"))
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(message(where, "weight", list(weight.shape), "[N, K] with elements"))
    if not 1 <= bits <= 8:
        raise ValueError(message(where, "bits", bits, "1 to 8"))
    for name, size in (("rows", rows), ("columns", columns)):
        if size is not None and size < 1:
            raise ValueError(message(where, name, size, "1 or more, or None"))
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(message(where, "dtype", dtype, "float16 or float32"))
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise ValueError(message(where, "weight", f"{bad} values NaN or infinite", "finite", "repair the checkpoint"))
    largest, limit = float(weight.detach().abs().max()), torch.finfo(dtype).max
    if largest > limit:
        raise ValueError(message(where, "weight", f"a value of {largest:g}", f"up to {limit:g}", "dtype=float32"))
    if importance is not None:
        if importance.shape != (weight.shape[1],):
            raise ValueError(message(where, "importance", list(importance.shape), [weight.shape[1]]))
        if not bool((importance >= 0).all()) or not bool(torch.isfinite(importance).all()):
            raise ValueError(message(where, "importance", "negative values, NaN or infinity", "0 or more"))
    return weight.shape[0], weight.shape[1]
