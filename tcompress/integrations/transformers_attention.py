"""The attention "tcompress" of `transformers`: what a model calls when its `attn_implementation` says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tcompress.errors import message
from tcompress.integrations.cached_tensor import CachedTensor
from tcompress.integrations.import_hook import when_imported
from tcompress.kv_cache import KVCache
from tcompress.ops.attention_options import Causal, Window
from tcompress.ops.quantized_attention import quantized_attention

NAME = "tcompress"
#: Keywords that would change the result and are not computed here, with what they are.
_REFUSED = {
    "head_mask": "weights of heads",
    "layer_head_mask": "weights of heads",
    "sinks": "an attention sink per token",
    "indices": "the keys that a sparse attention chose",
    "block_indices": "the blocks that a sparse attention chose",
}
_USE_ANOTHER = "model.set_attn_implementation('eager') computes it"


def register() -> None:
    """Makes `attn_implementation="tcompress"` known to `transformers`; may be called any number of times.

    `import tcompress` sees to it by itself. Afterwards `model.set_attn_implementation("tcompress")` and
    `from_pretrained(..., attn_implementation="tcompress")` work for every model that takes its attention from the
    interface. The masks are those of "sdpa": bool, or none where causality says it all.

    Raises:
        ImportError: `transformers` is missing, or older than its interfaces for attention and masks.
    """
    try:
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        hint = "pip install 'transformers>=5'"
        raise ImportError(message("register", "transformers", str(error), "its AttentionInterface", hint)) from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def register_when_imported() -> None:
    """`register`, as soon as `transformers` is there; nothing where it is too old to know such an attention."""
    when_imported("transformers.modeling_utils", _register_if_possible)


def _register_if_possible() -> None:
    try:
        register()
    except ImportError:
        return  # `import transformers` must not fail for this; asked for by name, transformers says that it is unknown


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`quantized_attention` with the call signature of `transformers`' attention functions.

    What computes it, the first that applies:

    1. keys and values in an `Int8Cache`: `KVCache.attention`, which reads the 8-bit integers;
    2. a child `tcompress_attention` of `module` (`tcompress.nn.Int8Attention`), with its number of bits;
    3. `quantized_attention` with bits "auto".

    A child of precision "float" gets the cache's keys and values as floats.

    Args:
        module: the attention module. Its `is_causal` holds where the argument is None.
        query: [B, H, Sq, D], float32, bfloat16 or float16. B may be 1 where that of key is larger.
        key, value: [B, Hkv, Skv, D] and [B, Hkv, Skv, Dv]; H is a multiple of Hkv.
        attention_mask: broadcastable to [B, H, Sq, Skv], bool (True: visible) or additive. It says everything about
            which key is visible: `is_causal` and `sliding_window` count only without one, since `transformers` builds
            both into the masks that it makes.
        dropout: of the weights; must be 0 unless the child computes in floating point.
        scaling: of the scores, 1/√D by default.
        is_causal: without a mask, query i sees the keys 0 … i; one query alone sees all. Keys of an `Int8Cache` are
            aligned to the last query instead.
        sliding_window: w: without a mask, a query sees keys less than w away.
        softcap: of the scores, see `quantized_attention`.
        position_bias: broadcastable to [B, H, Sq, Skv], added to the scores (T5).
        s_aux: [H], one more score a head, of a key without value: an attention sink.
        kwargs: what models hand through to all attention functions. Those of `_REFUSED` must be None.

    Returns:
        [B, Sq, H, Dv], contiguous; and None, for there are no weights.

    Raises:
        ValueError: output_attentions, dropout, a refused keyword, packed sequences without a mask, a window without
            mask over another number of keys than queries, or what the op refuses. TypeError: a type that it refuses.
    """
    attention = getattr(module, "tcompress_attention", None)
    _check_keywords(attention, dropout, s_aux, attention_mask, kwargs)
    precision = getattr(attention, "precision", "int8")
    cache = _common_cache(key, value) if precision == "int8" else None
    if query.shape[0] == 1:
        query = query.expand(key.shape[0], -1, -1, -1)  # learned queries

    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    causal, window = _visibility(query, key, attention_mask, is_causal, sliding_window, isinstance(key, CachedTensor))
    mask = attention_mask if position_bias is None else _added(attention_mask, position_bias)
    options: dict[str, Any] = {"mask": mask, "is_causal": causal, "scale": scaling, "window": window}
    options["softcap"] = softcap

    if cache is None:
        key, value = (x.materialize() if isinstance(x, CachedTensor) else x for x in (key, value))
        if attention is not None:
            if dropout > 0:
                options["dropout"] = dropout
            return _tokens_first(attention(query, key, value, enable_gqa=True, **options)), None
    if s_aux is not None:
        options["return_lse"] = True
    if cache is not None:
        result = cache.attention(query, **options)
    else:
        result = quantized_attention(query, key, value, enable_gqa=True, **options)
    if s_aux is not None:
        out, lse = result
        # The sink takes exp(s_aux) of the denominator, which else is exp(lse).
        result = out * torch.sigmoid(lse - s_aux.float()[:, None])[..., None].to(out.dtype)
    assert isinstance(result, torch.Tensor)
    return _tokens_first(result), None


def _tokens_first(out: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] -> [B, S, H, D]; the ops lay their results out so that nothing is copied."""
    return out.transpose(1, 2).contiguous()


def _check_keywords(
    attention: Any, dropout: float, s_aux: torch.Tensor | None, mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Raises for whatever would be left out of the result."""
    if kwargs.get("output_attentions"):
        raise ValueError(message(NAME, "output_attentions", True, False, "only 'eager' has weights to return"))
    if dropout > 0 and getattr(attention, "precision", "int8") == "int8":
        raise ValueError(message(NAME, "dropout", dropout, 0, "quantized attention is for inference: model.eval()"))
    if s_aux is not None and attention is not None:
        hint = "an attention sink needs the module without its tcompress_attention"
        raise ValueError(message(NAME, "s_aux", "a tensor", None, hint))
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(message(NAME, name, what, None, _USE_ANOTHER))
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        lengths = kwargs.get(name)
        if mask is None and lengths is not None and len(lengths) > 2:
            hint = "pad them, or pass position_ids and no cache, from which the mask is made"
            raise ValueError(message(NAME, name, f"{len(lengths) - 1} packed sequences without a mask", None, hint))


def _common_cache(key: torch.Tensor, value: torch.Tensor) -> KVCache | None:
    """The cache whose keys and values these are, if they are."""
    if not (isinstance(key, CachedTensor) and isinstance(value, CachedTensor)):
        return None
    same = key.cache is value.cache and (key.part, value.part) == ("keys", "values")
    return key.current_cache if same and value.current_cache is key.current_cache else None


def _visibility(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    sliding_window: int | None,
    cached: bool,
) -> tuple[Causal, Window]:
    """`is_causal` and `window` of `quantized_attention`."""
    if mask is not None:
        return False, None
    sq, skv = query.shape[2], key.shape[2]
    if is_causal:
        if sq == 1 and sliding_window is None:
            return False, None
        # A static cache is longer than what it holds, and its first queries are its first keys. What grows ends with
        # the last query, and so does everything for a query alone.
        return "bottom_right" if cached or sq == 1 else "top_left", sliding_window
    if sliding_window is not None and sq != skv:
        hint = "where the queries stand is unknown; pass a mask"
        got = f"{sliding_window} with {sq} queries, {skv} keys and no mask"
        raise ValueError(message(NAME, "sliding_window", got, "as many queries as keys", hint))
    return False, sliding_window


def _added(mask: torch.Tensor | None, position_bias: torch.Tensor) -> torch.Tensor:
    """Mask and bias as one additive mask."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, float("-inf"))
    return position_bias + mask
