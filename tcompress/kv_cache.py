"""An int8 key-value cache of one attention layer."""

from __future__ import annotations

from typing import Any

import torch

from tcompress.errors import message
from tcompress.ops.attention_options import MAX_HEAD_DIM, Causal, Window
from tcompress.ops.kv_cache_append import kv_cache_append
from tcompress.ops.kv_cache_attention import kv_cache_attention
from tcompress.ops.quantize_per_token import check_float
from tcompress.packing import kv_cache as layout

#: k_data, k_scale, v_data, v_scale, k_mean, in the order in which the ops take them.
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class KVCache:
    """Keys and values of one layer as 8-bit integers with one scale a token and head; attention reads them as they are.

    ::

        cache = KVCache()
        cache.append(k, v)                                   # the prompt: any number of tokens
        y = cache.attention(q, is_causal="bottom_right")
        cache.append(k_next, v_next)                         # one token, or a chunk
        y_next = cache.attention(q_next)

    A token takes `D + Dv + 8` bytes a head (D rounded up to fours, Dv to 16s): at D = Dv = 128, 0.26 of float32 and
    0.52 of bfloat16. The numbers are those of `kv_cache_append`: the mean over the first tokens is taken from all keys,
    which leaves the softmax as it is. It is set by the first `append` to an empty cache, so anew after `crop(0)` and
    `reset()`.

    The tensors are made by the first `append`, in blocks of 64 tokens, and double when they are full. Batch, heads,
    head dimensions, type and device are those of the first k and v, until `reset()`. Whatever a method raises, the
    cache is then as it was. Inference only: no gradient flows through.

    Papers: a quantized key-value cache, and what a scale per token costs it, Liu et al. (KIVI), arXiv 2402.02750,
    section 3; smoothing of K, Zhang et al. (SageAttention), arXiv 2410.02367, section 4.2.

    Args:
        capacity: tokens to make room for at the first `append`; it still grows beyond.

    Raises:
        ValueError: a negative capacity.
    """

    def __init__(self, capacity: int = 0) -> None:
        if capacity < 0:
            raise ValueError(message("KVCache", "capacity", capacity, "at least 0 tokens"))
        self._reserve = capacity
        self._tensors: Tensors | None = None
        self._length = 0
        self._head_dims = (0, 0)
        self._dtype = torch.float32
        self._version = 0

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Quantizes new tokens and puts them behind the others.

        Args:
            k: [B, Hkv, S, D], float32, bfloat16 or float16; any strides. S may be 0.
            v: [B, Hkv, S, Dv], like k.

        Raises:
            TypeError: a wrong type, or another one than the first tokens had. ValueError: shapes that do not fit.
        """
        self._check_new(k, v)
        tensors = self._tensors
        blocks = _blocks(self._length + k.shape[2])
        if tensors is None:
            dims = (k.shape[3], v.shape[3])
            tensors = _allocate(k.shape[0], k.shape[1], max(blocks, _blocks(self._reserve)), *dims, k.device)
        elif blocks > tensors[0].shape[2]:
            tensors = _grown(tensors, max(blocks, 2 * tensors[0].shape[2]))
        kv_cache_append(*tensors, k, v, self._length)
        self._tensors, self._head_dims, self._dtype = tensors, (k.shape[3], v.shape[3]), k.dtype
        self._length += k.shape[2]
        self._version += 1

    def attention(
        self,
        q: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        is_causal: Causal = False,
        scale: float | None = None,
        window: Window = None,
        softcap: float | None = None,
        return_lse: bool = False,
    ) -> Any:
        """`softmax(scale · q kᵀ + mask) v` over all tokens in the cache: `tcompress.ops.kv_cache_attention`.

        Args:
            q: [B, H, Sq, D], float32, bfloat16 or float16; H a multiple of Hkv, whose heads consecutive ones share.
            mask, is_causal, scale, window, softcap, return_lse: as in `tcompress.quantized_attention`, with Skv the
                length of the cache. The last queries of a sequence want is_causal="bottom_right".

        Returns:
            [B, H, Sq, Dv] in the type of q; with return_lse also [B, H, Sq] float32.

        Raises:
            TypeError: a wrong type. ValueError: shapes that do not fit, an unknown option, or nothing appended yet.
        """
        return kv_cache_attention(
            q,
            *self._held("attention"),
            self._length,
            self._head_dims[1],
            mask=mask,
            is_causal=is_causal,
            scale=scale,
            window=window,
            softcap=softcap,
            return_lse=return_lse,
        )

    def keys(self) -> torch.Tensor:
        """The keys in float, [B, Hkv, length, D] of the type appended: integer · scale + mean of the first tokens."""
        k_data, k_scale, _, _, k_mean = self._held("keys")
        k = layout.unpack_keys(k_data, self._length, self._head_dims[0])
        return (k * self._scales(k_scale) + k_mean[:, :, None]).to(self._dtype)

    def values(self) -> torch.Tensor:
        """The values in float, [B, Hkv, length, Dv] of the type appended: integer · scale."""
        _, _, v_data, v_scale, _ = self._held("values")
        v = layout.unpack_values(v_data, self._length, self._head_dims[1])
        return (v * self._scales(v_scale)).to(self._dtype)

    def _scales(self, scale: torch.Tensor) -> torch.Tensor:
        return scale.flatten(2)[..., : self._length, None]

    def crop(self, length: int) -> None:
        """Keeps the first `length` tokens. The room stays.

        Raises:
            ValueError: negative, or more than there are.
        """
        if not 0 <= length <= self._length:
            raise ValueError(message("KVCache.crop", "length", length, f"0 to {self._length}, the tokens in the cache"))
        self._length = length
        self._version += 1

    def reset(self) -> None:
        """Forgets everything, shapes and type too."""
        self._tensors, self._length = None, 0
        self._version += 1

    def reorder(self, index: torch.Tensor) -> None:
        """Sequence i becomes what sequence `index[i]` was, as beam search wants.

        Args:
            index: [B] integers below B.

        Raises:
            TypeError: no integers. ValueError: another length, or an index out of range.
        """
        batch = self._held("reorder")[0].shape[0]
        if index.shape != (batch,):
            hint = "batch_select takes any number"
            raise ValueError(message("KVCache.reorder", "index", list(index.shape), f"[{batch}], the batch", hint))
        self.batch_select(index)

    def batch_select(self, index: torch.Tensor) -> None:
        """The batch becomes the sequences that `index` names.

        Args:
            index: 1-D integers below B; a sequence may come several times, or not at all.

        Raises:
            TypeError: no integers. ValueError: not 1-D, or an index out of range.
        """
        tensors = self._held("batch_select")
        batch = tensors[0].shape[0]
        if index.dtype not in (torch.int64, torch.int32):
            raise TypeError(message("KVCache", "index", index.dtype, "int64 or int32", "mask.nonzero()[:, 0] selects"))
        if index.dim() != 1:
            raise ValueError(message("KVCache", "index", list(index.shape), "one dimension"))
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= batch):
            raise ValueError(message("KVCache", "index", index.tolist(), f"0 to {batch - 1}, places in the batch"))
        with torch.inference_mode(False):
            a, b, c, d, e = (t.index_select(0, index.to(t.device)) for t in tensors)
        self._tensors = (a, b, c, d, e)
        self._version += 1

    def batch_repeat(self, repeats: int) -> None:
        """Each sequence comes `repeats` times in a row.

        Raises:
            ValueError: below 1.
        """
        if repeats < 1:
            raise ValueError(message("KVCache.batch_repeat", "repeats", repeats, "at least 1"))
        self.batch_select(torch.arange(self._held("batch_repeat")[0].shape[0]).repeat_interleave(repeats))

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    def __len__(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        """Tokens that fit before the tensors grow."""
        return 0 if self._tensors is None else self._tensors[0].shape[2] * layout.BLOCK

    @property
    def is_allocated(self) -> bool:
        """Whether the tensors exist: something was appended since the last `reset`."""
        return self._tensors is not None

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What `keys()` and `values()` have: [B, Hkv, length, D], [B, Hkv, length, Dv]."""
        batch, heads = self._held("shapes")[0].shape[:2]
        d, dv = self._head_dims
        return (batch, heads, self._length, d), (batch, heads, self._length, dv)

    @property
    def dtype(self) -> torch.dtype:
        """Of `keys()` and `values()`: what was appended."""
        self._held("dtype")
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._held("device")[0].device

    @property
    def version(self) -> int:
        """Grows with every change: who keeps something that was read from the cache sees whether it still holds."""
        return self._version

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, their room included."""
        return 0 if self._tensors is None else sum(t.nbytes for t in self._tensors)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the blocks that hold tokens."""
        if self._tensors is None:
            return 0
        *per_block, k_mean = self._tensors
        room = max(per_block[0].shape[2], 1)
        return k_mean.nbytes + sum(t.nbytes for t in per_block) // room * _blocks(self._length)

    @property
    def float_nbytes(self) -> int:
        """Bytes of the same tokens in the type in which they were appended."""
        if self._tensors is None:
            return 0
        batch, heads = self._tensors[0].shape[:2]
        return batch * heads * self._length * sum(self._head_dims) * self._dtype.itemsize

    def __repr__(self) -> str:
        if self._tensors is None:
            return "KVCache(empty)"
        batch, heads = self._tensors[0].shape[:2]
        d, dv = self._head_dims
        head_dim = f"head_dim={d}" if d == dv else f"head_dim={d}, head_dim_v={dv}"
        shape = f"batch={batch}, kv_heads={heads}, {head_dim}, length={self._length}, capacity={self.capacity}"
        mib = f"{self.nbytes / 2**20:.2f} MiB, {self.float_nbytes / 2**20:.2f} MiB in float"
        return f"KVCache({shape}, {str(self._dtype).removeprefix('torch.')}, {mib})"

    def _held(self, method: str) -> Tensors:
        if self._tensors is None:
            raise ValueError(message(f"KVCache.{method}", "cache", "an empty one", "appended tokens", "append(k, v)"))
        return self._tensors

    def _check_new(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Raises unless k and v can be appended."""
        op = "KVCache.append"
        for name, x in (("k", k), ("v", v)):
            check_float(x, op, name)
            if x.dim() != 4:
                raise ValueError(message(op, name, list(x.shape), "[B, Hkv, S, D]"))
        if k.shape[:3] != v.shape[:3]:
            raise ValueError(message(op, "v", list(v.shape), f"{[*k.shape[:3], 'Dv']} as k"))
        if k.dtype != v.dtype or k.device != v.device:
            raise TypeError(message(op, "v", f"{v.dtype} on {v.device}", f"{k.dtype} on {k.device} as k"))
        if max(k.shape[3], v.shape[3]) > MAX_HEAD_DIM:
            shapes = f"{list(k.shape)}, {list(v.shape)}"
            raise ValueError(message(op, "k, v", shapes, f"last dimensions of at most {MAX_HEAD_DIM}"))
        if self._tensors is None:
            return
        batch, heads = self._tensors[0].shape[:2]
        got, expected = (*k.shape[:2], k.shape[3], v.shape[3]), (batch, heads, *self._head_dims)
        if got != expected:
            hint = "reset() starts anew"
            raise ValueError(message(op, "k, v", f"(B, Hkv, D, Dv) = {got}", f"{expected} as in the cache", hint))
        if k.dtype != self._dtype or k.device != self.device:
            raise TypeError(message(op, "k, v", f"{k.dtype} on {k.device}", f"{self._dtype} on {self.device}"))


def _blocks(tokens: int) -> int:
    return layout.round_up(tokens, layout.BLOCK) // layout.BLOCK


def _allocate(batch: int, heads: int, blocks: int, d: int, dv: int, device: torch.device) -> Tensors:
    """A cache without tokens. Tensors made in inference mode could not be written outside of it."""
    with torch.inference_mode(False):
        return (
            torch.zeros((batch, heads, blocks, layout.key_bytes(d)), dtype=torch.int8, device=device),
            torch.zeros((batch, heads, blocks, layout.BLOCK), device=device, dtype=torch.float32),
            torch.zeros((batch, heads, blocks, layout.value_bytes(dv)), dtype=torch.int8, device=device),
            torch.zeros((batch, heads, blocks, layout.BLOCK), device=device, dtype=torch.float32),
            torch.zeros((batch, heads, d), device=device, dtype=torch.float32),
        )


def _grown(tensors: Tensors, blocks: int) -> Tensors:
    """The same tokens with room for `blocks` blocks; the argument stays as it is."""
    *per_block, k_mean = tensors
    with torch.inference_mode(False):
        a, b, c, d = (t.new_zeros((*t.shape[:2], blocks, t.shape[3])) for t in per_block)
        for new, old in zip((a, b, c, d), per_block, strict=True):
            new[:, :, : old.shape[2]] = old
        return a, b, c, d, k_mean
