"""What holds for every op: torch's own checks, autograd, `torch.compile`, threads."""

from concurrent.futures import ThreadPoolExecutor

import cases
import int4_sparse_cases
import oracle
import pytest
import sparse_cases
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

SAMPLES = [(op, i) for op, samples in cases.SAMPLES.items() for i in range(len(samples))]
SHAPE = cases.Shape("dispatch", 5, 33, 20)
X, WEIGHT, SCALE, BIAS = cases.linear_operands(SHAPE, torch.float32)
INT4 = cases.int4_weight(cases.random_int4(33, 20), zeros="random")
SPARSE = ops.sparse_prepack(sparse_cases.weight(33, 20, torch.float32), "unstructured")
SPARSE_INT8 = ops.sparse_prepack(sparse_cases.weight(33, 20, torch.int8), "8x4")
SPARSE_INT4 = ops.int4_sparse_prepack(int4_sparse_cases.weight(33, 20), int4_sparse_cases.scales(33, 20, 32), 32)
SIZE_DEPENDS_ON_DATA = ("sparse_prepack", "int4_sparse_prepack")


def outputs(result):
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def on_meta(argument):
    if isinstance(argument, list):
        return [on_meta(a) for a in argument]
    return argument.to("meta") if isinstance(argument, torch.Tensor) else argument


def equal(a, b):
    return all(oracle.same_bits(u, v) for u, v in zip(outputs(a), outputs(b), strict=True))


@pytest.mark.parametrize(("op", "i"), SAMPLES)
def test_opcheck(op, i):
    torch.library.opcheck(getattr(torch.ops.tcompress, op).default, cases.SAMPLES[op][i])


@pytest.mark.parametrize(
    "op",
    [
        "quantize_per_token",
        "quantize_static",
        "int8_linear",
        "int8_linear_static",
        "int4_linear",
        "int8_multi_linear",
        "int4_multi_linear",
        "sparse_linear",
        "int8_sparse_linear",
        "int4_sparse_linear",
        "quantized_attention",
        "quantized_attention_varlen",
        "short_attention",
        "kv_cache_attention",
    ],
)
def test_opcheck_of_inputs_that_require_a_gradient(op):
    x, *others = cases.SAMPLES[op][0]
    arguments = (x.detach().clone().requires_grad_(), *others)
    # The last of torch's checks runs backward, which raises by design.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.tcompress, op).default, arguments, test_utils=checks)


def test_an_op_that_changes_its_arguments_takes_no_part_in_a_gradient():
    *cache, k, v, length = cases.SAMPLES["kv_cache_append"][0]
    arguments = [t.clone() for t in cache]
    ops.kv_cache_append(*arguments, k.clone().requires_grad_(), v, length)
    assert not any(t.requires_grad for t in arguments)


def strides(x):
    """Of the axes that have another element to step to."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def results(function, op, arguments):
    """What a function returns or, of an op that changes its arguments, the tensors among these afterwards."""
    if not OPS[op].mutates:
        return outputs(function(*arguments))
    changed = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    assert function(*changed) is None
    return tuple(a for a in changed if isinstance(a, torch.Tensor))


def fake_of_unknown_size(op, arguments):
    """The fake result, whose sizes torch has to be told of."""
    with FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True)) as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        return outputs(getattr(torch.ops.tcompress, op)(*fake))


@pytest.mark.parametrize(("op", "i"), SAMPLES)
def test_kernel_and_fake_agree_with_reference(op, i):
    arguments = cases.SAMPLES[op][i]
    expected = results(OPS[op].reference, op, arguments)
    got = results(getattr(torch.ops.tcompress, op), op, arguments)
    if op in SIZE_DEPENDS_ON_DATA:
        fake = fake_of_unknown_size(op, arguments)
        assert [(a.dim(), a.dtype) for a in fake] == [(a.dim(), a.dtype) for a in got]
        assert equal(expected, got)
        return
    fake = results(OPS[op].fake, op, [on_meta(a) for a in arguments])
    for a, b, c in zip(expected, got, fake, strict=True):
        assert oracle.same_bits(a, b) or OPS[op].tolerance > 0
        assert (a.shape, a.dtype) == (b.shape, b.dtype) == (c.shape, c.dtype)
        assert a.numel() == 0 or strides(a) == strides(b) == strides(c)


# ---- autograd -------------------------------------------------------------------------------------------------------


def both(x):
    _, scale, _ = ops.quantize_per_token(x)
    return ops.int8_linear(x, WEIGHT, SCALE, BIAS, activation="gelu") * scale


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backward_raises(backend):
    x = X.clone().requires_grad_()
    bias = BIAS.clone().requires_grad_()
    with use_backend(backend):
        results = {
            "quantize_per_token": ops.quantize_per_token(x)[1],
            "quantize_static": ops.quantize_static(x, torch.tensor(0.1))[1],
            "int8_linear": ops.int8_linear(X, WEIGHT, SCALE, bias),
            "int8_linear_requantize": ops.int8_linear_requantize(X, WEIGHT, SCALE, bias)[1],
            "int8_linear_quantized": ops.int8_linear_quantized(*ops.quantize_per_token(X), WEIGHT, SCALE, bias),
            "int8_linear_static": ops.int8_linear_static(X, torch.tensor(0.1), None, WEIGHT, SCALE, bias),
            "int4_linear": ops.int4_linear(X, *INT4.operands, bias, group_size=32),
            "sparse_linear": ops.sparse_linear(X, SPARSE, 33, bias),
            "int8_sparse_linear": ops.int8_sparse_linear(X, SPARSE_INT8, SCALE, bias, "8x4"),
            "int4_sparse_linear": ops.int4_sparse_linear(X, SPARSE_INT4, 33, bias, 32),
        }
        assert ops.int8_linear(x, WEIGHT, SCALE).requires_grad
        assert ops.int4_linear(x, *INT4.operands, group_size=32, act_bits=None).requires_grad
        assert ops.sparse_linear(x, SPARSE, 33).requires_grad
        assert ops.int8_sparse_linear(x, SPARSE_INT8, SCALE, layout="8x4").requires_grad
    for op, y in results.items():
        with pytest.raises(RuntimeError, match=f"{op}: backward: got a gradient, expected inference only; "):
            y.sum().backward()
    assert x.grad is None
    assert bias.grad is None


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_forward_is_the_same_with_and_without_autograd(backend):
    with use_backend(backend):
        expected = both(X)
        assert not expected.requires_grad
        assert equal(both(X.clone().requires_grad_()).detach(), expected)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                y = both(X.clone().requires_grad_())
                assert not y.requires_grad
                assert equal(y, expected)
                assert equal(both(torch.randn(0, 20)), torch.zeros(0, 33))


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compile(backend, fresh_dynamo):
    def everything(x, weight, scale, bias):
        packed = ops.int8_prepack(weight)
        y = ops.int8_linear(x, weight, scale, bias, packed, activation="relu")
        acc = ops.int8_linear(x, weight, scale, act_bits=7, act_symmetric=False, out_dtype=torch.int32)
        q, s, z = ops.quantize_per_token(y, 7, False)
        return y, (q.int() - z) * s, acc, *int4(x, bias), *sparse(x, scale, bias)

    def int4(x, bias):
        _, scale, zero_point = INT4.operands
        packed = ops.int4_prepack(*INT4.operands, 20, 32)
        parts = ops.int4_unpack(packed, 33, 20, 32, scale.dtype, True)
        y = ops.int4_linear(x, None, scale, zero_point, bias, packed, 32, activation="relu")
        return *parts, ops.int8_unpack(ops.int8_prepack(WEIGHT), 33, 20), ops.int4_linear(x, *parts, residual=y)

    def sparse(x, scale, bias):
        y = ops.sparse_linear(x, SPARSE, 33, bias, activation="silu")
        weight = ops.sparse_unpack(SPARSE, 33, 20, torch.float32, "unstructured")
        acc = ops.int8_sparse_linear(x, SPARSE_INT8, scale, layout="8x4", out_dtype=torch.int32)
        parts = ops.int4_sparse_unpack(SPARSE_INT4, 33, 20, 32, torch.float16)
        y = ops.int4_sparse_linear(x, SPARSE_INT4, 33, bias, 32, residual=y)
        return *parts, weight, acc, ops.int8_sparse_linear(x, SPARSE_INT8, scale, bias, "8x4", 7, False, residual=y)

    with use_backend(backend):
        compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
        for m in (5, 2, 7):
            x = cases.INPUTS["normal"](m, 20, torch.float32)
            torch._dynamo.mark_dynamic(x, 0)
            assert equal(compiled(x, WEIGHT, SCALE, BIAS), everything(x, WEIGHT, SCALE, BIAS))
        with torch.no_grad():
            x = X.clone().requires_grad_()
            assert equal(compiled(x, WEIGHT, SCALE, BIAS), everything(X, WEIGHT, SCALE, BIAS))


# ---- threads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("shape", [s for s in cases.SHAPES if s.m * s.n * s.k >= 2**19], ids=str)
def test_result_does_not_depend_on_the_number_of_threads(path, shape, torch_threads):
    x, weight, scale, bias = cases.linear_operands(shape, torch.float32)
    packed = ops.int8_prepack(weight)
    results = []
    for threads in (1, 2, 3, 5):
        torch_threads(threads)
        with use_backend("cpu"), use_cpu_path(path):
            y = ops.int8_linear(x, weight, scale, bias, packed, activation="gelu")
            results.append((y, ops.int8_prepack(weight), *ops.quantize_per_token(x)))
    for result in results[1:]:
        assert equal(result, results[0])


@pytest.mark.parametrize("path", cases.CPU_PATHS)
def test_calls_from_several_python_threads(path):
    """Each with a problem of its own, large and small in turns, so that none may see the scratch memory of another."""
    shapes = [s for s in cases.SHAPES if s.name in ("rows-in-blocks", "tall", "wide", "primes", "group-and-1")]
    problems = [
        (cases.linear_operands(s, torch.float32), scheme) for s in shapes for scheme in (cases.W8A8, cases.W8A7)
    ]

    def run(problem):
        operands, (bits, symmetric) = problem
        y = ops.int8_linear(*operands, act_bits=bits, act_symmetric=symmetric, activation="silu")
        return (y, *ops.quantize_per_token(operands[0], bits, symmetric))

    with use_backend("cpu"), use_cpu_path(path):
        expected = [run(problem) for problem in problems]
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(run, problems * 8))
    for i, result in enumerate(results):
        assert equal(result, expected[i % len(problems)])
