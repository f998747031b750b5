"""The layout "2:4" of `sparse_prepack`, drawn in `csrc/cpu/two_four_layout.h`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

TWO_FOUR = "2:4"
QUAD = 4  # k's of which two are kept
PANEL = 16  # outputs to whose multiple the column sums are padded
GROUP = 48  # outputs whose chunks lie together
#: The two places in a quad that each pair keeps.
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
CHUNK_QUADS = 16
RUNS = (8, 4, 2)  # quads that a 16-bit lane sums
CHUNK_BYTES = 104  # 16 x 4 weights, 8 starts, 16 rows, the run, 7 zeros
ACTIVATION_OFFSET = 63  # the kernel sums (a - 63) · w


def two_four_bytes(n: int, k: int) -> int:
    """Bytes of the kernel layout of a weight [N, K]."""
    return n * -(-k // (CHUNK_QUADS * QUAD)) * CHUNK_BYTES + -(-n // PANEL) * PANEL * 4


def is_two_four(weight: torch.Tensor) -> bool:
    """Whether at most two of each four weights along K are not zero."""
    quads = F.pad(weight, (0, -weight.shape[1] % QUAD)).unflatten(1, (-(-weight.shape[1] // QUAD), QUAD))
    return bool(((quads != 0).sum(-1) <= 2).all())


def pack_two_four(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] int8 to the kernel layout."""
    n, k = weight.shape
    chunks = -(-k // (CHUNK_QUADS * QUAD))
    quads = F.pad(weight, (0, -k % (CHUNK_QUADS * QUAD))).view(n, chunks, CHUNK_QUADS, QUAD)
    candidates = torch.stack([quads[..., pair] for pair in PAIRS], -2)
    whole = (candidates != 0).sum(-1) == (quads != 0).sum(-1, keepdim=True)
    pair = whole.int().argmax(-1, keepdim=True)  # the first one
    kept = candidates.gather(-2, pair[..., None].expand(*pair.shape, 2)).squeeze(-2)
    rows = (pair.squeeze(-1) + torch.arange(CHUNK_QUADS, device=weight.device) * len(PAIRS)).to(torch.uint8)
    run, starts = _runs(kept.int())
    fields = [kept.repeat(1, 1, 1, 2), starts.view(torch.int8), rows.view(torch.int8), run[..., None]]
    records = torch.cat([*(field.flatten(2) for field in fields), weight.new_zeros(n, chunks, 7)], -1)
    groups = [group.transpose(0, 1).reshape(-1) for group in records.split(GROUP)]
    column_sum = F.pad(weight.sum(1, dtype=torch.int32), (0, -n % PANEL))
    return torch.cat([*groups, column_sum.view(torch.int8)])


def _runs(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of weights [N, C, 16, 2] the longest run of each chunk, int8 [N, C], and the starts of its runs, int16 [N, C, 8].

    A lane starts from -63 Σw; with activations in 0 … 127 it ends between -(63 p + 64 m) and 64 p + 63 m, where p and
    -m are the sums of the positive and of the negative weights, which must lie within 16 bits.
    """
    run = kept.new_zeros(kept.shape[:2], dtype=torch.int8)
    starts = kept.new_zeros((*kept.shape[:2], CHUNK_QUADS // RUNS[-1]), dtype=torch.int16)
    below, above = ACTIVATION_OFFSET, 127 - ACTIVATION_OFFSET
    for length in reversed(RUNS):
        parts = kept.reshape(*kept.shape[:2], CHUNK_QUADS // length, length * 2)
        positive, negative = parts.clamp_min(0).sum(-1), (-parts).clamp_min(0).sum(-1)
        low, high = below * positive + above * negative, above * positive + below * negative
        fit = ((low <= 32768) & (high <= 32767)).all(-1)
        own = F.pad((below * (negative - positive)).to(torch.int16), (0, starts.shape[-1] - parts.shape[2]))
        run, starts = torch.where(fit, length, run), torch.where(fit[..., None], own, starts)
    return run.to(torch.int8), starts


def unpack_two_four(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The inverse of `pack_two_four`."""
    chunks = -(-k // (CHUNK_QUADS * QUAD))
    records, start = [packed.new_zeros(0, chunks, CHUNK_BYTES)], 0
    for first in range(0, n, GROUP):
        outputs = min(GROUP, n - first)
        size = outputs * chunks * CHUNK_BYTES
        records.append(packed[start : start + size].view(chunks, outputs, CHUNK_BYTES).transpose(0, 1))
        start += size
    record = torch.cat(records)
    weights = record[..., : CHUNK_QUADS * 4].unflatten(-1, (CHUNK_QUADS, 4))[..., :2]
    rows = record[..., CHUNK_BYTES - 8 - CHUNK_QUADS : CHUNK_BYTES - 8].contiguous().view(torch.uint8)
    places = torch.tensor(PAIRS, device=packed.device)[rows.long() % len(PAIRS)]
    quads = packed.new_zeros(n, chunks, CHUNK_QUADS, QUAD).scatter(-1, places, weights)
    return quads.reshape(n, chunks * CHUNK_QUADS * QUAD)[:, :k].contiguous()
