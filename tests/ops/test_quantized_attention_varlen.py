"""quantized_attention_varlen: each sequence as by itself, bit for bit."""

import attention_cases as shapes
import cases
import oracle
import pytest
import torch

from tcompress import int8_attention_varlen, ops, quantized_attention_varlen, use_backend, use_cpu_path

LENGTHS = [
    ([], []),
    ([5], [7]),
    ([0, 3, 0], [4, 0, 0]),
    ([1, 64, 7, 0, 30], [1, 64, 70, 5, 29]),
    ([13, 13], [130, 1]),
]
OPTIONS = [{}, {"is_causal": True}, {"is_causal": "bottom_right", "window": 9}, {"softcap": 3.0, "scale": -0.2}]


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("path", [*cases.CPU_PATHS, "reference"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("bits", [8, 12])
def test_each_sequence_by_itself(path, lengths, bits):
    rows, tokens = (offsets(x) for x in lengths)
    q, k, v = (
        shapes.normal(sum(lengths[0]), 4, 18),
        shapes.normal(sum(lengths[1]), 2, 18),
        shapes.normal(sum(lengths[1]), 2, 5),
    )
    for options in OPTIONS:
        chosen = {"bits": bits, "enable_gqa": True, "return_lse": True, **options}
        with (
            use_backend("reference" if path == "reference" else "cpu"),
            use_cpu_path("" if path == "reference" else path),
        ):
            out, lse = quantized_attention_varlen(q, k, v, rows.int(), tokens.int(), **chosen)
            assert out.shape == (len(q), 4, 5)
            assert out.is_contiguous()
            for i in range(len(lengths[0])):
                mine, theirs = slice(rows[i], rows[i + 1]), slice(tokens[i], tokens[i + 1])
                one = [x.transpose(0, 1)[None] for x in (q[mine], k[theirs], v[theirs])]
                expected, expected_lse = ops.quantized_attention(*one, **chosen)
                assert oracle.same_bits(out[mine].transpose(0, 1), expected[0].contiguous())
                assert oracle.same_bits(lse[:, mine], expected_lse[0])


def test_int8_attention_varlen_is_8_bits():
    rows = offsets([3, 9])
    q, k, v = (shapes.normal(12, 2, 16, name=n) for n in "qkv")
    got = int8_attention_varlen(q, k, v, rows, rows, is_causal=True)
    assert torch.equal(got, quantized_attention_varlen(q, k, v, rows, rows, bits=8, is_causal=True))


def test_compiles():
    rows = offsets([3, 9])
    q, k, v = (shapes.normal(12, 2, 16, name=n) for n in "qkv")

    def layer(x):
        return quantized_attention_varlen(x * 1, k, v, rows, rows, is_causal=True) + 1

    with torch.inference_mode():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(q), layer(q))


def test_arguments():
    rows = offsets([3, 9])
    q, k, v = (shapes.normal(12, 2, 16, name=n) for n in "qkv")
    with pytest.raises(ValueError, match=r"q: got \[1, 12, 2, 16\], expected \[tokens, heads, D\]"):
        quantized_attention_varlen(q[None], k, v, rows, rows)
    with pytest.raises(TypeError, match="cu_seqlens_q: got torch.float32, expected an int32 or int64 tensor"):
        quantized_attention_varlen(q, k, v, rows.float(), rows)
    for wrong in ([0, 3, 11], [1, 3, 12], [0, 13, 12], [0, 3]):
        with pytest.raises(ValueError, match="offsets that rise from 0 to 12, the number of tokens"):
            quantized_attention_varlen(q, k, v, rows, torch.tensor(wrong))
    with pytest.raises(ValueError, match="as many sequences in both"):
        quantized_attention_varlen(q, k, v, rows, torch.tensor([0, 12]))
    with pytest.raises(ValueError, match="q: got 2 heads, expected 1 as in k; enable_gqa=True"):
        quantized_attention_varlen(q, k[:, :1], v[:, :1], rows, rows)
    # Past the front end the kernel checks the offsets itself: they are addresses.
    with pytest.raises(RuntimeError, match="rise from 0"):
        torch.ops.tcompress.quantized_attention_varlen(
            q, k, v, torch.tensor([0, 99]), torch.tensor([0, 12]), 8, False, -1, -1, 0.0, 0.3, False
        )
