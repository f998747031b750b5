"""`int4_sparse_linear` with every integer at a bound, on every path: what AVX2 sums in 16 bits must not leave them; and
what its results may not depend on."""

import cases
import int4_sparse_cases as cases4
import numpy as np
import oracle
import pytest
import torch

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["int4_sparse_linear"]
RUNNERS = (*cases.CPU_PATHS, "reference")
SCHEMES = ((8, True), (7, False), (2, True))


def run(runner, x, packed, n, group_size, scheme=(8, True)):
    arguments = (x, packed, n, None, group_size, torch.float16, *scheme, "none", None)
    if runner == "reference":
        return OP.reference(*arguments)
    with use_backend("cpu"), use_cpu_path(runner):
        return ops.int4_sparse_linear(*arguments)


def pack(w, group_size):
    """With scales of 1."""
    return ops.int4_sparse_prepack(w, torch.ones(len(w), -(-w.shape[1] // group_size)).half(), group_size)


def exact(x, w, scheme):
    q, scale, zero_point = oracle.quantize(x.numpy(), *scheme)
    acc = oracle.accumulate(q, zero_point, w)
    assert (acc.astype(np.float32) == acc).all()
    return torch.from_numpy(acc.astype(np.float32) * scale[:, None])


def at_bounds(w, m):
    """Tokens [m, K] that are the worst for the outputs in turns: each activation at a bound, by the weight's sign."""
    sign = torch.where(w < 0, -1.0, 1.0)
    return torch.stack([sign[i // 2 % len(w)] * (-1.0) ** i for i in range(m)])


WEIGHTS = {
    "all -8": lambda n, k: torch.full((n, k), -8, dtype=torch.int8),
    "all 7": lambda n, k: torch.full((n, k), 7, dtype=torch.int8),
    "-8 and 7": lambda n, k: (torch.arange(k) % 2 * 15 - 8).to(torch.int8).repeat(n, 1),
    "-8 and 7 in fours": lambda n, k: (torch.arange(k) // 4 % 2 * 15 - 8).to(torch.int8).repeat(n, 1),
    "first fits": lambda n, k: torch.where(torch.arange(n)[:, None] % 8 == 7, -8, 1).to(torch.int8).repeat(1, k),
}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kept", ["half", "full"])
def test_integers_are_exact_at_their_bounds(runner, name, kept):
    for n, k in ((1, 64), (9, 130), (49, 512), (50, 700)):
        w = WEIGHTS[name](n, k) * (cases4.weight(n, k, kept) != 0)
        for m in (1, 3, 9, 33, 65):
            x = at_bounds(w, m)
            for group_size in (32, 64, 128, 512, cases.PER_CHANNEL):
                for scheme in SCHEMES:
                    got = run(runner, x, pack(w, group_size), n, group_size, scheme)
                    assert oracle.same_bits(got, exact(x, w, scheme)), (n, k, m, group_size, scheme)


@pytest.mark.parametrize("runner", RUNNERS)
def test_longest_sum_at_its_bounds(runner):
    """K = 65536, all -8: every span's sum is a multiple of 1016, so that float32 holds their sums too."""
    w = torch.full((3, 65536), -8, dtype=torch.int8)
    for m in (2, 17):
        x = at_bounds(w, m)
        for group_size in (512, cases.PER_CHANNEL):
            assert oracle.same_bits(run(runner, x, pack(w, group_size), 3, group_size), exact(x, w, (8, True)))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_number_of_tokens_and_outputs(runner, scheme):
    """A row does not depend on the others, whichever way its tokens take."""
    k = 300
    x = cases.INPUTS["normal"](140, k, torch.float32)
    for n in (1, 2, 7, 8, 9, 47, 48, 49, 96, 97):
        w = cases4.weight(n, k)
        packed, expected = pack(w, 64), exact(x, w, scheme)
        for m in (*range(1, 20), 31, 32, 33, 48, 63, 64, 65, 127, 128, 129, 140):
            assert oracle.same_bits(run(runner, x[:m], packed, n, 64, scheme), expected[:m]), (m, n)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("shape", [(150, 97, 1063), (1, 1025, 600), (6, 300, 800), (600, 33, 1500)], ids=str)
def test_number_of_threads(path, shape):
    m, n, k = shape
    x, w = cases.INPUTS["normal"](m, k, torch.float32), cases4.weight(n, k)
    w[: n // 2] = 0  # unequal work
    packed, expected = pack(w, 128), exact(x, w, (8, True))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert oracle.same_bits(run(path, x, packed, n, 128), expected), threads
    finally:
        torch.set_num_threads(before)
