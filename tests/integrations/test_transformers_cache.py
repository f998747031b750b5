"""Int8Cache: in generation and forward, with our attention and others, against float caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models as tiny
import torch
from transformers import DynamicCache, EncoderDecoderCache

from tcompress import KVCache
from tcompress.integrations import Int8Cache
from tcompress.integrations.transformers_cache import Int8Layer

# transformers 5.24 calls it `cache`, older releases do not know that name.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}


def _model(factory: Any = tiny.llama, implementation: str = "tcompress", **changes: Any) -> Any:
    model = tiny.made(factory, **changes)
    model.set_attn_implementation(implementation)
    return model


def _padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    return {"input_ids": tiny.ids(), "attention_mask": mask}


def _steps(model: Any, cache: Any, chunks: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a sequence that goes in chunk by chunk."""
    logits, seen = [], 0
    for part in tiny.ids(2, sum(chunks)).split(chunks, 1):
        seen += part.shape[1]
        keywords = {} if mask is None else {"attention_mask": mask[:, :seen]}
        with torch.inference_mode():
            logits.append(model(part, past_key_values=cache, **keywords).logits)
    return torch.cat(logits, 1)


@pytest.fixture
def never_float(monkeypatch):
    """Fails where keys or values are turned into floats."""
    for method in ("keys", "values"):
        monkeypatch.setattr(KVCache, method, lambda self: pytest.fail("made floats"))


@pytest.mark.parametrize("chunks", [[12, 1, 1, 1], [6, 5, 4]], ids=["decoding", "chunks"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("factory", tiny.DECODERS, ids=lambda f: f.__name__)
def test_logits_step_by_step(factory, padded, chunks, never_float):
    mask = None
    if padded:
        mask = torch.ones(2, 15, dtype=torch.long)
        mask[1, :5] = 0
    model = _model(factory)
    got = _steps(model, Int8Cache(), chunks, mask)
    model.set_attn_implementation("eager")
    expected = _steps(model, DynamicCache(config=model.config), chunks, mask)
    kept = slice(None) if mask is None else mask.bool()
    assert 0.999 < tiny.cosine(got[kept], expected[kept]) < 1 - 1e-9


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("factory", [tiny.llama, tiny.mistral, tiny.gpt2], ids=lambda f: f.__name__)
def test_other_attention_gets_the_same_keys_as_floats(factory, implementation):
    model = _model(factory, implementation)
    cache = Int8Cache()
    got = _steps(model, cache, [12, 1, 2])
    assert 0.999 < tiny.cosine(got, _steps(model, DynamicCache(config=model.config), [12, 1, 2])) < 1 - 1e-9
    assert cache.get_seq_length() == 15


@pytest.mark.parametrize("factory", tiny.DECODERS, ids=lambda f: f.__name__)
def test_greedy_generation(factory, never_float):
    """The tokens are those that the model itself finds best after each, with the float cache's scores beside them."""
    model, inputs, cache = _model(factory), _padded(), Int8Cache()
    generated = model.generate(
        **inputs, past_key_values=cache, **GREEDY, return_dict_in_generate=True, output_logits=True
    )
    assert generated.sequences.shape == (2, 18)
    assert cache.get_seq_length() == 17
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 6, dtype=torch.long)], 1)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        full = model(generated.sequences, attention_mask=mask, position_ids=positions).logits
    got = torch.stack(generated.logits, 1)
    assert tiny.cosine(got, full[:, 11:-1]) > 0.999


def test_beam_search(never_float):
    """As without a cache: the beams' scores, which follow each beam through its reorderings."""
    model, inputs = _model(), _padded()
    arguments = GREEDY | {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 8, "min_new_tokens": 8}
    more = {"return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    cached = model.generate(**inputs, past_key_values=Int8Cache(), **arguments, **more)
    plain = model.generate(**inputs, use_cache=False, **arguments, **more)
    assert cached.beam_indices.unique().numel() > 3, "beams were reordered"
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, rtol=0.05, atol=0.05)
    for sequence, score, begin in zip(cached.sequences, cached.sequences_scores, [0] * 3 + [1] * 3, strict=True):
        mask = torch.cat([inputs["attention_mask"][begin], torch.ones(8, dtype=torch.long)])[None]
        with torch.inference_mode():
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            logits = model(sequence[None], attention_mask=mask, position_ids=positions).logits[0, 11:-1]
        expected = logits.float().log_softmax(-1).gather(1, sequence[12:, None]).sum()
        assert float(score) == pytest.approx(float(expected), rel=0.05, abs=0.05)


def test_assisted_decoding():
    """The assistant's wrong tokens are cropped; what remains is what the model alone decodes."""
    model, assistant = _model(), _model(tiny.llama, "sdpa", num_hidden_layers=1)
    prompt = {"input_ids": tiny.ids(1), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    alone, cropped = Int8Cache(), Int8Cache()
    expected = model.generate(**prompt, past_key_values=alone, **GREEDY)
    crops: list[int] = []
    original = cropped.crop
    cropped.crop = lambda n: crops.append(n) or original(n)  # type: ignore[method-assign]
    got = model.generate(**prompt, past_key_values=cropped, assistant_model=assistant, **GREEDY)
    assert min(crops) < 0
    assert torch.equal(got, expected)


def test_the_prompt_in_chunks():
    model, inputs = _model(), _padded()
    got = model.generate(**inputs, past_key_values=Int8Cache(), prefill_chunk_size=5, **GREEDY)
    assert got.shape == (2, 18)


def test_going_on_with_a_cache_and_a_copy_of_it():
    model, first = _model(), tiny.ids(2, 12)
    cache = Int8Cache()
    with torch.no_grad():
        model(first, past_key_values=cache)
    branch = copy.deepcopy(cache)
    next_token = tiny.ids(2, 1, seed=1)
    with torch.inference_mode():
        a = model(next_token, past_key_values=cache).logits
        b = model(next_token, past_key_values=branch).logits
        c = model(torch.cat([first, next_token], 1)).logits[:, -1:]
    assert torch.equal(a, b)
    assert tiny.cosine(a, c) > 0.999


@pytest.mark.parametrize("factory", [tiny.whisper, tiny.t5], ids=lambda f: f.__name__)
def test_encoder_decoder(factory, never_float):
    model = _model(factory)
    if factory is tiny.whisper:
        inputs = {"input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))}
    else:
        inputs = {"input_ids": tiny.ids()}
    prompt, rest = tiny.ids(2, 5).split([3, 2], 1)
    cache = EncoderDecoderCache(Int8Cache(), Int8Cache())
    with torch.inference_mode():
        got = [model(**inputs, decoder_input_ids=prompt, past_key_values=cache)]
        encoded = {"encoder_outputs": (got[0].encoder_last_hidden_state,)}
        got += [model(**encoded, decoder_input_ids=t, past_key_values=cache) for t in rest.split(1, 1)]
        model.set_attn_implementation("eager")
        expected = model(**inputs, decoder_input_ids=tiny.ids(2, 5)).logits
    logits = torch.cat([step.logits for step in got], 1)
    assert 0.999 < tiny.cosine(logits, expected) < 1 - 1e-9
    assert cache.self_attention_cache.get_seq_length() == 5
    assert cache.cross_attention_cache.get_seq_length() == (16 if factory is tiny.whisper else 12)


def test_one_cache_for_both_attentions_is_refused():
    model = _model(tiny.whisper)
    with pytest.raises(ValueError, match=r"twice in a row.*EncoderDecoderCache\(Int8Cache\(\), Int8Cache\(\)\)"):
        model(input_features=torch.randn(2, 8, 32), decoder_input_ids=tiny.ids(2, 3), past_key_values=Int8Cache())


def test_sliding_layers_keep_all_tokens():
    model = _model(tiny.mistral)
    cache = Int8Cache()
    _steps(model, cache, [12, 1])
    assert cache.is_sliding == [False, False]
    assert cache.get_mask_sizes(1, 0) == (14, 0)
    assert cache.layers[0].keys.shape[2] == 13


def test_a_layer():
    """The operations of DynamicLayer, on the same tensors."""
    from transformers.cache_utils import DynamicLayer

    ours, theirs = Int8Layer(), DynamicLayer()
    assert (ours.keys, ours.values, ours.is_initialized, ours.get_seq_length()) == (None, None, False, 0)
    for layer in (ours, theirs):  # nothing to do, and no error
        layer.crop(-1)
        layer.reorder_cache(torch.tensor([0]))
        layer.batch_repeat_interleave(2)
        layer.batch_select_indices(torch.tensor([0]))

    def check() -> None:
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(a + 0, b, rtol=0, atol=0.03)

    for s in (70, 1, 5):
        k, v = torch.randn(3, 2, s, 8), torch.randn(3, 2, s, 8)
        for returned, expected in zip(ours.update(k, v), theirs.update(k, v), strict=True):
            assert returned.shape == expected.shape
        check()
    for change in (
        lambda layer: layer.crop(-3),
        lambda layer: layer.crop(0),
        lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([5, 0, 3])),
        lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])),
    ):
        for layer in (ours, theirs):
            change(layer)
        check()
    ours.reset()
    assert (ours.keys, ours.get_seq_length(), ours.is_initialized) == (None, 0, False)
    assert ours.get_max_length() == -1
    assert "KVCache(empty)" in repr(ours)
    with pytest.raises(ValueError, match="tokens_to_remove: got 2, expected at most 0; -n removes"):
        ours.crop(2)
    with pytest.raises(ValueError, match="offloading"):
        ours.offload()


def test_the_whole_cache():
    model, cache = _model(), Int8Cache(capacity=100)
    assert (len(cache), cache.nbytes, cache.get_seq_length(), cache.is_initialized) == (0, 0, 0, False)
    _steps(model, cache, [12, 1])
    assert (len(cache), cache.get_seq_length(), cache.is_croppable, cache.is_compileable) == (2, 13, True, False)
    assert [layer.cache.capacity for layer in cache.layers] == [128, 128]
    token = 2 * 2 * (16 + 16 + 8)
    assert cache.nbytes == 2 * (128 * token + 2 * 2 * 16 * 4)
    assert cache.nbytes_used == 2 * (64 * token + 2 * 2 * 16 * 4)
    assert cache.float_nbytes == 2 * 13 * 2 * 2 * 32 * 4
    cache.crop(-3)
    assert {layer.get_seq_length() for layer in cache.layers} == {10}
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    _steps(model, cache, [3])
    with pytest.raises(ValueError, match="capacity: got -1"):
        Int8Cache(-1)


def test_early_initialization():
    cache = Int8Cache()
    cache.layers = [Int8Layer(), Int8Layer()]
    cache.early_initialization(batch_size=2, num_heads=2, head_dim=16, dtype=torch.float32, device=torch.device("cpu"))
    assert cache.is_initialized
    assert _steps(_model(), cache, [5, 1]).shape[:2] == (2, 6)


def test_a_child_in_floating_point_gets_floats():
    """Of tcompress.nn.Int8Attention: what has "float" for a precision computes in float over the cache's numbers."""

    class Child(torch.nn.Module):
        precision = "float"

        def forward(self, q: Any, k: Any, v: Any, *, mask: Any, is_causal: Any, scale: Any, **rest: Any) -> Any:
            assert type(k) is type(v) is torch.Tensor
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(q, k, v, attn_mask=mask, is_causal=bool(is_causal), scale=scale, enable_gqa=True)

    model = _model()
    expected = _steps(_model(implementation="sdpa"), Int8Cache(), [12, 1])
    for layer in model.model.layers:
        layer.self_attn.tcompress_attention = Child()
    torch.testing.assert_close(_steps(model, Int8Cache(), [12, 1]), expected)
