"""AutoRound on one layer, against plain steps by autograd, and by what it reaches."""

import pytest
import torch
from calibrated import correlated, statistics_of, weight

from tcompress.quantize import SCHEMES, gptq, round_to_nearest
from tcompress.quantize.autoround import RoundedWeight, autoround
from tcompress.quantize.gptq import gptq_grid
from tcompress.quantize.range_search import find_grid

NAMES = ["W4A16", "W4A16-g32", "W4A16-g64-asym"]


def layer(name, k=70, method="mse"):
    w = weight(12, k)
    return w, SCHEMES[name].weights, find_grid(w, SCHEMES[name].weights, "test", method)


def loss_of(w, x, calls=4):
    parts = x.chunk(calls)
    return lambda values, i: ((values[0] - w) @ parts[i].T).square().mean()


def error(w, packed, x):
    return float(((packed.dequantize() - w) @ x.T).square().mean())


@pytest.mark.parametrize("name", [*NAMES, "W8A8", "W4A16-asym"])
def test_begins_at_the_nearest_and_packs_what_it_computes(name):
    w, args, grid = layer(name)
    rounded = RoundedWeight(w, grid)
    packed = rounded.packed()
    if args.symmetric:
        assert torch.equal(packed.qdata, round_to_nearest(w, args, range="mse").qdata)
    torch.testing.assert_close(rounded.quantized().detach(), packed.dequantize(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        rounded.rounding.uniform_(-0.5, 0.5)
        for coefficients in rounded.range:
            coefficients.uniform_(0.8, 1)
    rounded.keep()
    torch.testing.assert_close(rounded.quantized().detach(), rounded.packed().dequantize(), rtol=1e-5, atol=1e-6)


def test_a_step_against_plain_autograd():
    w, _, grid = layer("W4A16")
    rounded, x, rate = RoundedWeight(w, grid), correlated(70), 0.01
    leaf = rounded.quantized().detach().requires_grad_()
    ((leaf - w) @ x.T).square().mean().backward()
    v, beta = torch.zeros(12, 70, requires_grad=True), torch.ones(12, 1, requires_grad=True)
    scale = grid.scale.float() * beta
    inner = w / scale + v
    q = inner + (inner.round() - inner).detach()
    ((q.clamp(-8, 7) * scale - w) @ x.T).square().mean().backward()
    rounded.move(leaf.grad, rate)
    moved = rounded.rounding.detach()[:, 0, :70]
    assert float((moved == -rate * v.grad.sign()).float().mean()) > 0.99
    torch.testing.assert_close(rounded.range[0].detach(), 1 - rate * beta.grad.sign())
    rounded.move(leaf.grad, 100.0)
    assert rounded.rounding.abs().max() <= 0.5
    assert (rounded.range[0] >= 0.5).all()


@pytest.mark.parametrize("name", NAMES)
def test_learns_more_than_nearest(name):
    (w, args, grid), x = layer(name), correlated(70)
    rounded = RoundedWeight(w, grid)
    first, last = autoround([rounded], loss_of(w, x), 4)
    assert last < (0.6 if args.symmetric else 0.75) * first
    assert error(w, rounded.packed(), x) == pytest.approx(last, rel=0.01)
    again = RoundedWeight(w, grid)
    autoround([again], loss_of(w, x), 4)
    assert torch.equal(again.packed().qdata, rounded.packed().qdata)


@pytest.mark.parametrize("name", NAMES)
def test_from_gptq_it_is_never_worse_than_gptq(name):
    (w, args, _), x = layer(name), correlated(70)
    statistics = statistics_of(x)
    integers, grid, wanted = gptq_grid(w, statistics, args, range="mse")
    rounded = RoundedWeight(w, grid, wanted)
    assert torch.equal(rounded.packed().qdata, grid.pack(integers).qdata)
    by_gptq = error(w, gptq(w, statistics, args, range="mse"), x)
    first, _ = autoround([rounded], loss_of(w, x), 4)
    assert first == pytest.approx(by_gptq, rel=1e-3)
    assert error(w, rounded.packed(), x) <= by_gptq


def test_zeros_stay():
    w, args, _ = layer("W4A16-g32")
    w[weight(12, 70, 5).abs() < 0.6] = 0
    rounded = RoundedWeight(w, find_grid(w, args, "test", "mse"))
    autoround([rounded], loss_of(w, correlated(70)), 4, iterations=30)
    assert rounded.packed().dequantize()[w == 0].eq(0).all()


def test_without_progress_the_beginning_is_kept():
    w, _, grid = layer("W4A16")
    rounded = RoundedWeight(w, grid)
    first, last = autoround([rounded], lambda values, i: values[0].sum() * 0, 2)
    assert first == last == 0
    assert torch.equal(rounded.packed().qdata, RoundedWeight(w, grid).packed().qdata)
