"""Finding blocks and running them alone gives what the whole model gives."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

from tcompress.activations import copied
from tcompress.blocks import BlockRunner, find_chains
from tcompress.calibrate import evaluating, first_tensor, run

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def ids(seed=0, batch=2, length=7):
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=96, pad_token_id=0, **SIZES)), {"input_ids": ids()}


def bert():
    model = hf.BertModel(hf.BertConfig(vocab_size=96, **SIZES))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return model, {"input_ids": ids(), "attention_mask": mask}


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4)), {"input_ids": ids()}


def t5(layers=3, decoder_layers=4):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    config = hf.T5Config(vocab_size=96, num_layers=layers, num_decoder_layers=decoder_layers, **sizes)
    return hf.T5ForConditionalGeneration(config), {"input_ids": ids(), "decoder_input_ids": ids(1, 2, 5)}


def shallow_t5():
    """Its decoder blocks hold three layers each, one more than there are blocks; but these return no likes."""
    return t5(2, 2)


def torch_encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), torch.randn(2, 7, 32)


MODELS = {"llama": (llama, [3]), "bert": (bert, [3]), "gpt2": (gpt2, [3]), "t5": (t5, [3, 4]),
          "shallow_t5": (shallow_t5, [2, 2]), "torch": (torch_encoder, [3])}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_blocks_alone_give_what_the_model_gives(name):
    torch.manual_seed(0)
    make, lengths = MODELS[name]
    model, batch = make()
    with evaluating(model):
        expected = first_tensor(run(model, batch))
        seen = {}
        chains = find_chains(model, batch)
        assert [len(chain) for chain in chains] == lengths
        blocks = [block for chain in chains for block in chain]
        handles = [
            b.register_forward_hook(lambda m, a, o: seen.setdefault(m, []).append(first_tensor(o))) for b in blocks
        ]
        run(model, batch)
        runner = BlockRunner(model, chains, [batch, batch])
        for c, chain in enumerate(chains):
            for b in range(len(chain)):
                runner.run(c, b, keep=False)
                runner.run(c, b, keep=True)
        last = []
        handles.append(model.register_forward_hook(lambda m, a, o: last.append(first_tensor(o))))
        runner.run_rest()
        for handle in handles:
            handle.remove()
    assert len(last) == 2
    assert torch.equal(last[0], expected)
    for block in blocks:
        first, *others = seen[block][:5]  # whole, and alone: twice on each of the two batches
        assert len(others) == 4
        assert all(torch.equal(first, other) for other in others)
    assert all("forward" not in vars(m) for m in model.modules())
    assert not any(m._forward_hooks for m in blocks)


class Listed(nn.Module):
    """Two layers in a list, called as the subclass says."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


class Experts(Listed):
    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


class Backwards(Listed):
    def forward(self, x):
        for layer in reversed(self.layers):
            x = layer(x)
        return x


class Between(Listed):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x) + 1
        return x


class Twice(Listed):
    def forward(self, x):
        for layer in (*self.layers, *self.layers):
            x = layer(x)
        return x


class TakesTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, past):
        return self.linear(x) + past


class PastOne(nn.Module):
    """The third block is also given what the first returned."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(TakesTwo() for _ in range(3))

    def forward(self, x):
        first = self.layers[0](x, x)
        return self.layers[2](self.layers[1](first, x), first)


@pytest.mark.parametrize("make", [Experts, Backwards, Between, Twice, PastOne])
def test_lists_that_are_no_chains(make):
    model = make()
    with evaluating(model):
        assert find_chains(model, torch.randn(2, 4)) == []


class Straight(Listed):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_longer_of_nested_chains():
    outer = nn.ModuleList([Straight() for _ in range(2)])

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = outer

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Outer()
    with evaluating(model):
        chains = find_chains(model, torch.randn(2, 4))
    assert [len(chain) for chain in chains] == [3, 3]


def test_a_block_that_writes_into_its_input():
    class InPlace(nn.Linear):
        def forward(self, x):
            return x.add_(super().forward(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(InPlace(4, 4) for _ in range(3))

        def forward(self, x):
            x = x.clone()
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Model(), torch.randn(2, 4)
    with evaluating(model):
        expected = model(x)
        chains = find_chains(model, x)
        runner = BlockRunner(model, chains, [x])
        for b in range(3):
            runner.run(0, b, keep=False)
            runner.run(0, b, keep=True)
        assert torch.equal(runner._outputs[0][0], expected)


def test_copies_share_nothing():
    class Cache:
        def __init__(self, keys):
            self.keys = keys

    x = torch.randn(3, requires_grad=True)
    given = (x * 2, [{"cache": Cache([torch.ones(2)])}], None)
    y, [inner], nothing = copied(given)
    assert nothing is None
    assert torch.equal(y, given[0])
    assert y.grad_fn is None
    inner["cache"].keys[0].zero_()
    inner["cache"].keys.append(1)
    assert torch.equal(given[1][0]["cache"].keys[0], torch.ones(2))
    assert len(given[1][0]["cache"].keys) == 1
