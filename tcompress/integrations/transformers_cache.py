"""`transformers`' key-value cache in int8."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from tcompress.errors import message
from tcompress.integrations.cached_tensor import CachedTensor
from tcompress.kv_cache import KVCache


class Int8Layer(CacheLayerMixin):
    """One layer of an `Int8Cache`; `cache` is what holds it."""

    is_compileable = False
    is_croppable = True
    #: All tokens are kept, also those that a sliding window has left: the window stands in the mask.
    is_sliding = False

    def __init__(self, capacity: int = 0) -> None:
        # Without super().__init__(): what it would set to None are properties here.
        self.cache = KVCache(capacity)

    @property
    def keys(self) -> torch.Tensor | None:
        return CachedTensor(self.cache, "keys") if self.cache.is_allocated else None

    @property
    def values(self) -> torch.Tensor | None:
        return CachedTensor(self.cache, "values") if self.cache.is_allocated else None

    @property
    def is_initialized(self) -> bool:
        return self.cache.is_allocated

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes the tensors for keys and values like these."""
        self.cache.append(key_states[:, :, :0], value_states[:, :, :0])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends, and returns all keys and values as `CachedTensor`s."""
        self.cache.append(key_states, value_states)
        return CachedTensor(self.cache, "keys"), CachedTensor(self.cache, "values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; their number is given as a negative one, as `transformers` has it.

        Raises:
            ValueError: a positive number, or more tokens than there are.
        """
        if tokens_to_remove > 0:
            hint = "-n removes the last n tokens"
            raise ValueError(message("Int8Cache.crop", "tokens_to_remove", tokens_to_remove, "at most 0", hint))
        if tokens_to_remove and self.cache.is_allocated:
            self.cache.crop(self.cache.length + tokens_to_remove)

    def reset(self) -> None:
        self.cache.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.cache.is_allocated:
            self.cache.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache.is_allocated:
            self.cache.batch_repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.cache.is_allocated:
            index = torch.as_tensor(indices)
            self.cache.batch_select(index.nonzero()[:, 0] if index.dtype == torch.bool else index)

    def offload(self) -> None:
        """
        Raises:
            ValueError: always.
        """
        raise ValueError(message("Int8Cache", "offloading", True, False, "the cache stays where the model is"))

    prefetch = offload

    def __repr__(self) -> str:
        return f"Int8Layer({self.cache})"


class Int8Cache(Cache):
    """A cache that grows, as `transformers.DynamicCache`, and holds a `tcompress.KVCache` for each layer.

    ::

        model.set_attn_implementation("tcompress")
        cache = Int8Cache()
        model.generate(**inputs, past_key_values=cache)
        print(cache.nbytes / cache.float_nbytes)

    With the attention "tcompress" the integers are never turned into floats: the queries, those of the prompt too, meet
    the 8-bit keys and values, so that a token sees the same numbers whether it came alone, in a chunk or in the prompt.
    Any other attention (eager, sdpa, flex) works as well, but gets all keys and values as floats in every step.

    Greedy and sampled decoding, beam search, assisted decoding (`crop`), chunked prefill and layers with a sliding
    window work; of these all tokens are kept. An encoder-decoder model takes
    `EncoderDecoderCache(Int8Cache(), Int8Cache())`. Layers of linear attention (Mamba and the like) have no place here.

    Args:
        capacity: tokens to make room for at once; the cache grows beyond.

    Raises:
        ValueError: from `update`, what `KVCache.append` refuses; or a layer that is updated twice in a row, as by an
            encoder-decoder model that was given one cache for both attentions.
    """

    def __init__(self, capacity: int = 0) -> None:
        KVCache(capacity)  # raises
        super().__init__(layer_class_to_replicate=partial(Int8Layer, capacity))
        self._last_updated = -1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends to a layer: [B, Hkv, S, D] and [B, Hkv, S, Dv]. Returns all its keys and values."""
        others = (layer.get_seq_length() for i, layer in enumerate(self.layers) if i != layer_idx)
        if layer_idx == self._last_updated and any(others):
            got = f"{layer_idx} twice in a row"
            hint = "an encoder-decoder model takes EncoderDecoderCache(Int8Cache(), Int8Cache())"
            raise ValueError(message("Int8Cache.update", "layer_idx", got, "all layers in turn", hint))
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._last_updated = layer_idx
        return keys, values

    def reset(self) -> None:
        super().reset()
        self._last_updated = -1

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, with the room for more tokens."""
        return sum(layer.cache.nbytes for layer in self.layers)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the blocks of 64 tokens that hold any."""
        return sum(layer.cache.nbytes_used for layer in self.layers)

    @property
    def float_nbytes(self) -> int:
        """Bytes that the same tokens take in the model's type."""
        return sum(layer.cache.float_nbytes for layer in self.layers)
