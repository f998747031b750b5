"""A tensor that stands for the keys or values of a `KVCache` and is turned into float only where it must be."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from tcompress.errors import message
from tcompress.kv_cache import KVCache

Part = Literal["keys", "values"]


class CachedTensor(torch.Tensor):
    """`cache.keys()` or `cache.values()`, with their shape, type and device but without their numbers.

    The attention of `transformers_attention` hands `cache` to `KVCache.attention`, which reads the integers. Whatever
    else uses it, through torch, gets the floats, made at that moment. It is read-only, and holds for the cache as it
    was: after the next `append`, `crop` or `reorder` it raises.

    Raises:
        ValueError: the cache is empty. RuntimeError: later, if the cache has changed or the tensor is written to.
    """

    cache: KVCache
    part: Part
    version: int

    # The operations reach __torch_dispatch__ without a detour through Python.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, cache: KVCache, part: Part) -> CachedTensor:
        shape = cache.shapes[0 if part == "keys" else 1]
        self: CachedTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=cache.dtype, device=cache.device)
        self.cache, self.part, self.version = cache, part, cache.version
        return self

    def __init__(self, cache: KVCache, part: Part) -> None:
        super().__init__()

    @property
    def current_cache(self) -> KVCache:
        """The cache, which still holds what it held when this tensor was made."""
        if self.cache.version != self.version:
            hint = "take the keys and values from the cache again after a change"
            raise RuntimeError(message("CachedTensor", self.part, "those of a cache that has changed", "current", hint))
        return self.cache

    def materialize(self) -> torch.Tensor:
        """The floats."""
        return self.current_cache.keys() if self.part == "keys" else self.current_cache.values()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            value = named.get(argument.name)
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                hint = "write to a copy: .clone()"
                raise RuntimeError(message("CachedTensor", value.part, f"written to by {func}", "only read", hint))
        given, spec = tree_flatten((args, kwargs))
        # torch records views of tensors that were made outside of inference mode, in inference mode too; what it
        # records must be a tensor that was made outside as well.
        recorded = any(isinstance(x, cls) and not x.is_inference() for x in given)
        with torch.inference_mode(torch.is_inference_mode_enabled() and not recorded):
            args, kwargs = tree_unflatten([x.materialize() if isinstance(x, cls) else x for x in given], spec)
            return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CachedTensor({self.part}, {list(self.shape)}, {self.cache})"
