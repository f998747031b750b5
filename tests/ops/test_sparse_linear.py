"""The numbers of `sparse_linear`: the reference and every CPU path against float64 and torch's own float32."""

from functools import cache

import cases
import oracle
import pytest
import sparse_cases
import torch
import torch.nn.functional as F

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["sparse_linear"]
LAYOUTS = sparse_cases.LAYOUTS[torch.float32]
TOKENS = (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 128, 130)
SIZES = ((1, 1, "full"), (9, 63, "half"), (49, 257, "5 %"), (97, 130, "8x4 blocks"), (7, 1030, "half"))
# The reference is one of the paths: it has to keep the same rule.
PATHS = (*cases.CPU_PATHS, "reference")


def run(path, x, packed, n, bias=None, layout="unstructured", activation="none", out_dtype=None, residual=None):
    if path == "reference":
        return OP.reference(x, packed, n, bias, layout, activation, out_dtype, residual)
    with use_backend("cpu"), use_cpu_path(path):
        return ops.sparse_linear(x, packed, n, bias, layout, activation, out_dtype, residual)


@cache
def operands(m, n, k, pattern):
    """x, weight, bias, and the weight in each layout."""
    x, _, _, bias = cases.linear_operands(cases.Shape(pattern, m, n, k), torch.float32)
    weight = sparse_cases.weight(n, k, torch.float32, pattern)
    return x, weight, bias, {layout: ops.sparse_prepack(weight, layout) for layout in LAYOUTS}


def yardsticks(x, weight, bias=None, activation="none", out_dtype=None, residual=None):
    """float64, torch's own, and whose to judge.

    A token that holds NaN or infinity is due a row of NaN. Where products add up to more than the largest float32,
    infinity or NaN may come out of any order of the sum.
    """
    spoilt = ~x.isfinite().all(-1, keepdim=True)
    exact, by_torch = F.linear(x.double(), weight.double()), F.linear(x.float(), weight)
    if bias is not None:
        exact, by_torch = exact + bias.double(), by_torch + bias.float()
    exact = oracle.activate_float64(exact, activation)
    by_torch = oracle.activate_float32(by_torch, activation)
    if residual is not None:
        exact, by_torch = exact + residual.double(), by_torch + residual.float()
    by_torch, exact = (y.masked_fill(spoilt, torch.nan) for y in (by_torch.to(out_dtype or x.dtype), exact))
    in_any_order = F.linear(x.double().abs(), weight.double().abs()) < torch.finfo(torch.float32).max
    return by_torch, exact, in_any_order | spoilt


def assert_accurate(got, *arguments, what=""):
    """By the rule for float results."""
    by_torch, exact, judged = yardsticks(*arguments)
    assert got.shape == exact.shape
    assert got.is_contiguous()
    oracle.assert_accurate(got[judged], by_torch[judged], exact[judged], OP.tolerance, what)


MORE = 64  # tokens that show the size of torch's errors: of a few results, all may happen to be exact


@cache
def ordinary(m, n, k, pattern):
    x, weight, bias, _ = operands(m + MORE, n, k, pattern)
    return yardsticks(x, weight, bias)


def check(path, m, n, k, pattern):
    x, _, bias, packed = operands(m + MORE, n, k, pattern)
    by_torch, exact, _ = ordinary(m, n, k, pattern)
    for layout in LAYOUTS:
        got = run(path, x[:m], packed[layout], n, bias, layout)
        assert got.shape == (m, n)
        oracle.assert_accurate(
            torch.cat([got, by_torch[m:]]), by_torch, exact, OP.tolerance, (m, n, k, pattern, layout)
        )


@pytest.fixture(autouse=True)
def torch_threads():
    """One but where a test asks for more: what follows is small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_by_hand():
    x, bias = torch.tensor([[2.0, 0.5, -2.0]]), torch.tensor([3.0, 1.0, 100.0])
    weight = torch.tensor([[1.0, 0.0, 3.0], [0.0, 8.0, 0.0], [0.0, -0.0, 0.25]])
    for path in PATHS:
        for layout in LAYOUTS:
            packed = ops.sparse_prepack(weight, layout)
            assert run(path, x, packed, 3, bias, layout).tolist() == [[-1.0, 5.0, 99.5]]
            assert run(path, x, packed, 3, None, layout, "relu").tolist() == [[0.0, 4.0, 0.0]]
            residual = torch.tensor([[1.0, 2.0, 3.0]])
            assert run(path, x, packed, 3, None, layout, "relu", None, residual).tolist() == [[1.0, 6.0, 3.0]]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", TOKENS)
def test_every_number_of_tokens(path, m):
    for size in SIZES:
        check(path, m, *size)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pattern", sparse_cases.PATTERNS)
def test_every_pattern(path, pattern):
    for n, k in sparse_cases.SIZES:
        for m in (1, 6, 35):
            check(path, m, n, k, pattern)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", cases.INPUTS)
def test_hostile_inputs(path, name):
    for m, n, k in ((1, 1, 1), (7, 35, 37), (33, 9, 300)):
        for pattern in ("half", "empty rows", "full"):
            _, weight, _, packed = operands(m, n, k, pattern)
            for dtype in cases.DTYPES if pattern == "half" else (torch.float32,):
                x = cases.INPUTS[name](m, k, dtype)
                for layout in LAYOUTS:
                    got = run(path, x, packed[layout], n, None, layout)
                    assert_accurate(got, x, weight, what=(m, n, k, pattern, dtype, layout))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", cases.LAYOUTS)
def test_every_layout_of_x(path, name):
    for m in (6, 34):
        _, weight, bias, packed = operands(m, 19, 70, "half")
        for dtype in cases.DTYPES:
            x = cases.LAYOUTS[name](cases.INPUTS["normal"](m, 70, dtype))
            for layout in LAYOUTS:
                got = run(path, x, packed[layout], 19, bias, layout)
                assert_accurate(got, x.resolve_neg().contiguous(), weight, bias, what=(m, dtype, layout))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [5, 40])
def test_optional_arguments(path, layout, m):
    """Biases of each type, residuals of all strides, every activation, every type of result."""
    x, weight, bias, packed = operands(m, 50, 130, "half")
    strided = torch.stack([bias, torch.full_like(bias, float("nan"))], 1)[:, 0]
    for b in (None, bias, strided, bias.half(), bias.bfloat16(), bias.double()):
        for out_dtype in (torch.bfloat16, None):
            got = run(path, x, packed[layout], 50, b, layout, "none", out_dtype)
            assert_accurate(got, x, weight, b, "none", out_dtype)
    for activation in (*cases.ACTIVATIONS, "none"):
        for dtype in cases.DTYPES:
            residual = cases.INPUTS["normal"](m, 50, dtype)
            got = run(path, x, packed[layout], 50, bias, layout, activation, dtype)
            assert_accurate(got, x, weight, bias, activation, dtype, what=activation)
            got = run(path, x, packed[layout], 50, bias, layout, activation, dtype, residual)
            assert_accurate(got, x, weight, bias, activation, dtype, residual, what=activation)
            for view in cases.residual_views(residual):
                again = run(path, x, packed[layout], 50, bias, layout, activation, dtype, view)
                assert oracle.same_bits(again, got)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_row_is_nan_and_the_others_untouched(path, layout, value):
    """Also where all weights that would meet it are zero."""
    for m in (7, 41):
        for pattern in ("empty rows", "nothing"):
            clean, _, bias, packed = operands(m, 35, 130, pattern)
            x = clean.clone()
            x[4, 129] = x[m - 1, 0] = value
            spoilt = torch.zeros(m, dtype=torch.bool)
            spoilt[[4, m - 1]] = True
            for dtype in cases.DTYPES:
                got = run(path, x.to(dtype), packed[layout], 35, bias, layout, "gelu")
                undisturbed = run(path, clean.to(dtype), packed[layout], 35, bias, layout, "gelu")
                assert got[spoilt].isnan().all()
                assert oracle.same_bits(got[~spoilt], undisturbed[~spoilt])
                assert not undisturbed.isnan().any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_finite_weights_spoil_their_outputs_alone(path, layout):
    for m in (1, 7, 41):
        x, weight, bias, _ = operands(m, 35, 130, "half")
        bad = weight.clone()
        bad[3, 129], bad[9, 0], bad[34, 64], bad[10] = float("nan"), float("inf"), float("-inf"), 3e38
        got = run(path, x, ops.sparse_prepack(bad, layout), 35, bias, layout)
        fine = [n for n in range(35) if n not in (3, 9, 10, 34)]
        assert got[:, 3].isnan().all()
        assert torch.equal(got[:, 9], x[:, 0].sign() * torch.inf)
        assert torch.equal(got[:, 34], -x[:, 64].sign() * torch.inf)
        assert not got[:, 10].isfinite().all()
        undisturbed = run(path, x, ops.sparse_prepack(weight, layout), 35, bias, layout)
        if path != "reference":
            assert oracle.same_bits(got[:, fine], undisturbed[:, fine])
        assert_accurate(got[:, fine].contiguous(), x, weight[fine], bias[fine])


@pytest.mark.parametrize("path", PATHS)
def test_long_sums(path):
    for m in (1, 9):
        for pattern in ("5 %", "half"):
            check(path, m, 9, 16384, pattern)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("pattern", ["half", "last output"])
def test_any_number_of_threads(path, pattern, torch_threads):
    """The result may depend on it, because tiles of fewer tokens add in another order; its accuracy does not."""
    for threads in (1, 2, 3):
        torch_threads(threads)
        for m, n, k in ((301, 60, 300), (1, 2500, 300), (40, 700, 300)):
            check(path, m, n, k, pattern)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
def test_special_weights_in_every_place(path):
    """One weight of 1 at a time gives back the input that it meets, exactly."""
    for m in (3, 20):
        x = cases.INPUTS["normal"](m, 130, torch.float32)
        for n, k in ((0, 0), (8, 63), (9, 64), (16, 129), (48, 1), (7, 127)):
            weight = torch.zeros(49, 130)
            weight[n, k] = 1
            for layout in LAYOUTS:
                got = run(path, x, ops.sparse_prepack(weight, layout), 49, None, layout)
                assert torch.equal(got[:, n], x[:, k])
                assert got.count_nonzero() == got[:, n].count_nonzero()
