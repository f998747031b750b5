"""The attention "tcompress" of transformers: against float64, and in models against "eager"."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from torch import nn

import tcompress
from tcompress.integrations import register
from tcompress.integrations.transformers_attention import attention_forward

#: Relative error of attention on 8 bits, normal inputs, against float64.
ERROR = 0.02
NEITHER = SimpleNamespace(is_causal=False)
CAUSAL = SimpleNamespace(is_causal=True)


def _qkv(sq: int = 9, skv: int = 9, *, heads: int = 4, kv_heads: int = 2, d: int = 16) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = [(2, heads, sq, d), (2, kv_heads, skv, d), (2, kv_heads, skv, d)]
    q, k, v = (torch.randn(shape) for shape in shapes)
    return q, k + 2, v


def _expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None = None, **options: Any
) -> Any:
    """In float64, [B, S, H, D]; seen: bool, True where a key is visible."""
    bias, sink, softcap = options.get("bias"), options.get("sink"), options.get("softcap")
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q.double() @ k.mT * options.get("scale", q.shape[-1] ** -0.5)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = s if bias is None else s + bias
    s = s if seen is None else s.masked_fill(~seen, -math.inf)
    if sink is not None:
        s = torch.cat([s, sink.double()[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    return (s.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)


def _check(got: tuple[torch.Tensor, None], expected: torch.Tensor, other: torch.Tensor | None = None) -> None:
    """`other` is what it would be if an argument were ignored."""
    out, weights = got
    assert weights is None
    assert out.shape == expected.shape
    assert out.is_contiguous()
    assert float((out - expected).norm() / expected.norm()) < ERROR
    if other is not None:
        assert float((other - expected).norm() / expected.norm()) > 3 * ERROR, "the case tells nothing"


def _lower(sq: int, skv: int, diagonal: int = 0) -> torch.Tensor:
    return torch.ones(sq, skv, dtype=torch.bool).tril(diagonal)


@pytest.mark.parametrize("kind", ["bool", "additive", "lowest"])
def test_mask(kind):
    q, k, v = _qkv(5, 9)
    seen = torch.rand(2, 1, 5, 9) > 0.4
    lowest = torch.finfo(torch.float32).min if kind == "lowest" else -math.inf
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, lowest)
    # With a mask, is_causal says nothing more: the masks of transformers hold it.
    for module in (NEITHER, CAUSAL):
        _check(attention_forward(module, q, k, v, mask), _expected(q, k, v, seen), _expected(q, k, v))


@pytest.mark.parametrize(("module", "keyword"), [(CAUSAL, None), (NEITHER, True), (SimpleNamespace(), None)])
def test_causal(module, keyword):
    q, k, v = _qkv()
    got = attention_forward(module, q, k, v, None, is_causal=keyword)
    _check(got, _expected(q, k, v, _lower(9, 9)), _expected(q, k, v))


@pytest.mark.parametrize(("module", "keyword"), [(NEITHER, None), (CAUSAL, False)])
def test_not_causal(module, keyword):
    q, k, v = _qkv(5, 9)
    got = attention_forward(module, q, k, v, None, is_causal=keyword)
    _check(got, _expected(q, k, v), _expected(q, k, v, _lower(5, 9)))


def test_one_query_sees_all_and_the_first_of_a_static_cache_their_own():
    q, k, v = _qkv(1, 9)
    _check(attention_forward(CAUSAL, q, k, v, None), _expected(q, k, v), _expected(q, k, v, _lower(1, 9)))
    q, k, v = _qkv(5, 9)
    _check(attention_forward(CAUSAL, q, k, v, None), _expected(q, k, v, _lower(5, 9)), _expected(q, k, v))


def test_sliding_window():
    q, k, v = _qkv()
    band = _lower(9, 9, 2) & ~_lower(9, 9, -3)
    _check(attention_forward(NEITHER, q, k, v, None, sliding_window=3), _expected(q, k, v, band), _expected(q, k, v))
    causal = _lower(9, 9)
    _check(
        attention_forward(CAUSAL, q, k, v, None, sliding_window=3),
        _expected(q, k, v, band & causal),
        _expected(q, k, v, causal),
    )
    last = q[:, :, -1:]
    got = attention_forward(CAUSAL, last, k, v, None, sliding_window=3)
    _check(got, _expected(last, k, v, band[-1:]), _expected(last, k, v))
    with pytest.raises(ValueError, match="sliding_window: got 3 with 1 queries, 9 keys and no mask"):
        attention_forward(NEITHER, last, k, v, None, sliding_window=3)


def test_scaling():
    q, k, v = _qkv()
    _check(attention_forward(NEITHER, q, k, v, None, scaling=0.7), _expected(q, k, v, scale=0.7), _expected(q, k, v))


def test_softcap():
    q, k, v = _qkv()
    got = attention_forward(NEITHER, q, k, v, None, softcap=1.0)
    _check(got, _expected(q, k, v, softcap=1.0), _expected(q, k, v))


def test_position_bias():
    q, k, v = _qkv()
    bias, seen = 2 * torch.randn(1, 4, 9, 9), torch.rand(2, 1, 9, 9) > 0.4
    seen[..., 0] = True
    additive = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    for mask, visible, module in (
        (None, None, NEITHER),
        (None, _lower(9, 9), CAUSAL),
        (seen, seen, CAUSAL),
        (additive, seen, NEITHER),
    ):
        got = attention_forward(module, q, k, v, mask, position_bias=bias)
        _check(got, _expected(q, k, v, visible, bias=bias), _expected(q, k, v, visible))


def test_attention_sink():
    q, k, v = _qkv()
    sink = torch.tensor([0.0, 1.0, 2.0, -3.0])
    for module, seen in ((NEITHER, None), (CAUSAL, _lower(9, 9))):
        got = attention_forward(module, q, k, v, None, s_aux=sink)
        _check(got, _expected(q, k, v, seen, sink=sink), _expected(q, k, v, seen))


def test_learned_queries_and_strides():
    q, k, v = _qkv(5, 9, heads=2)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    _check(attention_forward(NEITHER, q[:1], k, v, None), _expected(q[:1].expand(2, -1, -1, -1), k, v))


def test_what_is_hidden_does_not_enter_and_what_is_given_stays():
    q, k, v = _qkv()
    seen = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    seen[1, ..., 6:] = False
    expected, _ = attention_forward(NEITHER, q, k[:, :, :6], v[:, :, :6], None)
    k[1, :, 6:], v[1, :, 6:] = math.nan, math.inf
    before = [x.clone() for x in (q, k, v)]
    got, _ = attention_forward(NEITHER, q, k, v, seen)
    torch.testing.assert_close(got[1], expected[1], rtol=0.05, atol=0.05)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True) if not a.isnan().any())
    assert torch.equal(k[0], before[1][0])


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"output_attentions": True}, "output_attentions: got True, expected False"),
        ({"dropout": 0.1}, "dropout: got 0.1, expected 0; .*eval()"),
        ({"head_mask": torch.ones(4)}, "head_mask: got weights of heads"),
        ({"layer_head_mask": torch.ones(4)}, "layer_head_mask: "),
        ({"sinks": torch.ones(4)}, "sinks: got an attention sink"),
        ({"indices": torch.ones(4)}, "indices: "),
        ({"block_indices": torch.ones(4)}, "block_indices: "),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 9])}, "cu_seq_lens_q: got 2 packed sequences without a mask"),
        ({"softcap": -1.0}, "softcap"),
    ],
)
def test_refused(keywords, text):
    with pytest.raises(ValueError, match=text):
        attention_forward(NEITHER, *_qkv(), None, **keywords)


def test_what_changes_nothing_is_taken():
    q, k, v = _qkv()
    keywords = dict.fromkeys(("head_mask", "sinks", "indices", "output_attentions", "cu_seq_lens_q"))
    more = {"position_ids": torch.arange(9)[None], "use_cache": True, "cu_seq_lens_k": torch.tensor([0, 9])}
    _check(attention_forward(NEITHER, q, k, v, None, **keywords, **more), _expected(q, k, v))


def test_a_float64_model_is_refused():
    with pytest.raises(TypeError, match="torch.float64"):
        attention_forward(NEITHER, *(x.double() for x in _qkv()), None)


class _Recorder(nn.Module):
    """In the place of tcompress.nn.Int8Attention."""

    def __init__(self, precision: str = "int8") -> None:
        super().__init__()
        self.precision = precision
        self.options: dict[str, Any] = {}

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        self.options = options
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def test_the_module_s_own_attention_is_called():
    q, k, v = _qkv()
    child = _Recorder()
    module = SimpleNamespace(is_causal=True, tcompress_attention=child)
    got, _ = attention_forward(module, q, k, v, None, scaling=0.3, sliding_window=4, softcap=9.0)
    assert torch.equal(got, F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2))
    mask, causal = child.options.pop("mask"), child.options.pop("is_causal")
    assert (mask, causal) == (None, "top_left")
    assert child.options == {"enable_gqa": True, "scale": 0.3, "window": 4, "softcap": 9.0}
    with pytest.raises(ValueError, match="dropout"):
        attention_forward(module, q, k, v, None, dropout=0.1)
    with pytest.raises(ValueError, match="s_aux"):
        attention_forward(module, q, k, v, None, s_aux=torch.zeros(4))
    child.precision = "float"
    attention_forward(module, q, k, v, None, dropout=0.1)
    assert child.options["dropout"] == 0.1


def _inputs(factory: Any, padded: bool) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 12, dtype=torch.long)
    if factory in tiny.DECODERS:
        mask[1, :5] = 0
    else:
        mask[1, -5:] = 0
    inputs = {"input_ids": tiny.ids(), **({"attention_mask": mask} if padded else {})}
    if factory is tiny.vit:
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    if factory is tiny.whisper:
        return {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": tiny.ids(2, 7)}
    if factory is tiny.t5:
        return inputs | {"decoder_input_ids": tiny.ids(2, 7, seed=1)}
    return inputs


def _run(model: Any, inputs: dict[str, torch.Tensor], implementation: str) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    with torch.inference_mode():
        output = model(**inputs)
    result = output.logits if "logits" in output else output.last_hidden_state
    mask = inputs.get("attention_mask")
    return result[mask.bool()] if mask is not None and mask.shape == result.shape[:2] else result


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "factory", [*tiny.DECODERS, tiny.bert, tiny.modernbert, tiny.t5, tiny.vit, tiny.whisper], ids=lambda f: f.__name__
)
def test_models(factory, padded, monkeypatch):
    # What is computed in float32 could not be told from the eager attention.
    monkeypatch.setattr("tcompress.ops.attention_options.MAX_SHORT_PAIRS", -1)
    model, inputs = tiny.made(factory), _inputs(factory, padded)
    if padded and "attention_mask" not in inputs:
        pytest.skip("nothing to pad")
    expected = _run(model, inputs, "eager")
    got = _run(model, inputs, "tcompress")
    assert 0.999 < tiny.cosine(got, expected) < 1 - 1e-9, "close, and computed by something else"
    if padded:
        mask = inputs.pop("attention_mask")
        without = _run(model, inputs, "eager")
        kept = without[mask.bool()] if mask.shape == without.shape[:2] else without
        assert tiny.cosine(kept, expected) < 0.995, "the mask matters here"


def test_a_narrow_softcap():
    model, inputs = tiny.made(tiny.gemma2, attn_logit_softcapping=3.0), _inputs(tiny.gemma2, False)
    assert tiny.cosine(_run(model, inputs, "tcompress"), _run(model, inputs, "eager")) > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, inputs = tiny.made(tiny.llama).to(dtype), _inputs(tiny.llama, True)
    got = _run(model, inputs, "tcompress")
    assert got.dtype == dtype
    assert tiny.cosine(got, _run(model, inputs, "eager")) > 0.999


def test_from_pretrained(tmp_path):
    model, inputs = tiny.made(tiny.llama), _inputs(tiny.llama, True)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="tcompress")
    assert loaded.config._attn_implementation == "tcompress"
    with torch.inference_mode():
        got = loaded(**inputs).logits[inputs["attention_mask"].bool()]
    assert torch.equal(got, _run(model, inputs, "tcompress"))


def test_a_compressed_model_takes_it():
    model, inputs = tiny.made(tiny.llama), _inputs(tiny.llama, True)
    compressed: Any = tcompress.compress(model, "int8").model
    assert tiny.cosine(_run(compressed, inputs, "tcompress"), _run(model, inputs, "eager")) > 0.995


def test_training_with_dropout_and_weights_are_refused():
    model, inputs = tiny.made(tiny.llama, attention_dropout=0.1), _inputs(tiny.llama, False)
    model.set_attn_implementation("tcompress")
    with pytest.raises(ValueError, match="dropout: got 0.1"):
        model.train()(**inputs)
    model.eval()
    with pytest.raises(ValueError, match="output_attentions"):
        model(**inputs, output_attentions=True)


def test_it_compiles():
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return attention_forward(CAUSAL, q, k, v, mask, scaling=0.25)[0]

    q, k, v = _qkv()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        for mask in (None, _lower(9, 9, 2)[None, None]):
            for path in ("scalar", None):  # which decides the number of bits
                with tcompress.use_cpu_path(path):
                    assert torch.equal(compiled(q, k, v, mask), attend(q, k, v, mask))


def test_it_is_there_without_being_asked_for():
    """Whichever is imported first; and importing tcompress does not import transformers."""
    code = (
        "import sys, tcompress; assert 'transformers' not in sys.modules\n"
        "from transformers.modeling_utils import AttentionInterface\n"
        "from transformers.masking_utils import AttentionMaskInterface\n"
        "assert 'tcompress' in AttentionInterface() and 'tcompress' in AttentionMaskInterface()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_register(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    monkeypatch.delitem(AttentionInterface._global_mapping, "tcompress")
    for _ in range(2):
        register()
        assert ALL_ATTENTION_FUNCTIONS["tcompress"] is attention_forward
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    with pytest.raises(ImportError, match="register: transformers: .*; pip install"):
        register()
