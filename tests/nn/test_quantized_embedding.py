import copy
import io

import pytest
import torch
from torch import nn

from tcompress.nn import QuantizedEmbedding
from tcompress.quantize import QuantArgs, Scheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = torch.tensor([[3, 0, 10], [10, 3, 7]])


def pair(rows=11, width=24, dtype=torch.float32, **arguments):
    torch.manual_seed(0)
    embedding = nn.Embedding(rows, width, dtype=dtype, **arguments)
    return embedding, QuantizedEmbedding.from_embedding(embedding)


def assert_same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 4), (0,), (3, 0)])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
def test_look_up(shape, id_dtype, dtype):
    embedding, module = pair(dtype=dtype)
    ids = torch.randint(11, shape, generator=torch.Generator().manual_seed(0)).to(id_dtype)
    y = module(ids)
    assert y.dtype == dtype
    assert y.shape == embedding(ids).shape == (*shape, 24)
    # float32 holds an int8 times a float32 scale with one rounding, and the type of the result rounds once more.
    rows = module.weight_packed[ids.long()].double() * module.weight_scale[ids.long()].double()[..., None]
    assert torch.equal(y, rows.float().to(dtype))


def test_error_is_at_most_half_a_step():
    embedding, module = pair(200, 64)
    error = (module(torch.arange(200)) - embedding.weight).abs().amax(1)
    assert (error <= embedding.weight.abs().amax(1) / 127 * 0.501).all()


@pytest.mark.parametrize("bits", [8, 5])
def test_bits_of_the_scheme(bits):
    module = QuantizedEmbedding.from_embedding(pair()[0], Scheme(weights=QuantArgs(bits=bits)))
    assert module.weight_packed.abs().amax(1).eq(2 ** (bits - 1) - 1).all()


def test_drop_in_signature():
    embedding, module = pair()
    assert torch.equal(module(IDS), module(input=IDS))
    assert (module.num_embeddings, module.embedding_dim) == (embedding.num_embeddings, embedding.embedding_dim)
    made = QuantizedEmbedding(11, 24, 2, device="cpu", dtype=torch.bfloat16)
    assert made(IDS).dtype == torch.bfloat16
    assert made(IDS).eq(0).all()
    assert made.padding_idx == 2
    assert QuantizedEmbedding(11, 24).dtype == torch.float32
    assert QuantizedEmbedding(11, 24).scheme.name == "W8A16"


def test_padding_idx():
    embedding, module = pair(padding_idx=3)
    assert module.padding_idx == embedding.padding_idx == 3
    assert module(torch.tensor([3])).eq(0).all()
    assert torch.isfinite(module.weight_scale).all()
    assert pair()[1].padding_idx is None
    assert pair(padding_idx=-1)[1].padding_idx == 10


@pytest.mark.parametrize("training", [True, False])
def test_training_flag_and_no_parameters(training):
    module = QuantizedEmbedding.from_embedding(nn.Embedding(4, 5).train(training))
    assert module.training is training
    assert not list(module.parameters())
    assert not module(torch.tensor([1])).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_is_the_whole_table(dtype):
    _, module = pair(dtype=dtype)
    assert module.weight.dtype == dtype
    assert torch.equal(module.weight, module(torch.arange(11)))


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.to("cpu", torch.float16), torch.float16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.half().float(), torch.float32),
        (lambda m: m.to("cpu"), torch.float32),
    ],
)
def test_casting_changes_the_result_and_not_the_table(change, dtype):
    _, module = pair()
    scale, packed, before = module.weight_scale.clone(), module.weight_packed.clone(), module(IDS)
    change(module)
    assert module.weight_scale.dtype == torch.float32
    assert torch.equal(module.weight_scale, scale)
    assert torch.equal(module.weight_packed, packed)
    assert torch.equal(module(IDS), before.to(dtype))
    assert module(IDS).dtype == dtype


def test_state_dict_keys():
    assert list(pair()[1].state_dict()) == ["weight_packed", "weight_scale"]


@pytest.mark.parametrize(("assign", "device"), [(True, "cpu"), (False, "cpu"), (True, "meta")])
def test_state_dict_round_trip(assign, device):
    _, module = pair()
    other = QuantizedEmbedding(11, 24, device=device)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert_same_state(module, other)
    assert torch.equal(module(IDS), other(IDS))


def test_deepcopy():
    _, module = pair(dtype=torch.bfloat16)
    clone = copy.deepcopy(module)
    assert_same_state(module, clone)
    assert clone.weight_packed.data_ptr() != module.weight_packed.data_ptr()
    assert torch.equal(clone(IDS), module(IDS))
    assert clone(IDS).dtype == torch.bfloat16


def test_the_float_table_is_not_shared():
    embedding, module = pair()
    before = module(IDS)
    nn.init.zeros_(embedding.weight)
    assert torch.equal(module(IDS), before)


def test_meta_device():
    module = QuantizedEmbedding(6, 5, device="meta")
    y = module(torch.empty(2, 3, dtype=torch.int64, device="meta"))
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, 5), torch.float32)
    moved = pair()[1].to("meta")
    assert {b.device.type for b in moved.buffers()} == {"meta"}


def test_packed_shares_memory():
    _, module = pair()
    assert module.packed.qdata is module.weight_packed
    assert module.packed.scale is module.weight_scale
    assert module.packed.shape == (11, 24)


def test_extra_repr():
    assert repr(pair()[1]) == "QuantizedEmbedding(11, 24, scheme=W8A16)"


def test_wrong_construction():
    with pytest.raises(
        ValueError, match=r"QuantizedEmbedding: scheme: got W8A8, expected a weight-only scheme; .*W8A16"
    ):
        QuantizedEmbedding(2, 3, scheme="W8A8")
    with pytest.raises(ValueError, match=r"Scheme: name: got 'W1A1', expected one of"):
        QuantizedEmbedding(2, 3, scheme="W1A1")
    with pytest.raises(ValueError, match=r"QuantizedEmbedding: max_norm: got 1\.0, expected None"):
        QuantizedEmbedding.from_embedding(nn.Embedding(4, 5, max_norm=1.0))
    embedding = nn.Embedding(4, 5)
    embedding.weight.data[2, 2] = float("inf")
    with pytest.raises(ValueError, match="got 1 values NaN or infinite, expected finite"):
        QuantizedEmbedding.from_embedding(embedding)


@pytest.mark.parametrize("bad", [11, -1])
def test_an_id_out_of_range(bad):
    embedding, module = pair()
    for layer in (embedding, module):
        with pytest.raises(IndexError):
            layer(torch.tensor([0, bad]))


def test_ids_must_be_integers():
    embedding, module = pair()
    for layer in (embedding, module):
        with pytest.raises(RuntimeError):
            layer(torch.tensor([0.0]))


def test_compile():
    torch._dynamo.reset()
    _, module = pair()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IDS), module(IDS))
    assert torch.equal(compiled(IDS[:1]), module(IDS[:1]))


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    _, module = pair()
    assert torch.equal(torch.compile(module, fullgraph=True)(IDS), module(IDS))
