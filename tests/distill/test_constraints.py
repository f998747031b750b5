"""Masks that hold, and three ways of pruning in a training, each against its paper's formulas written down plainly."""

import numpy as np
import pytest
import torch
from torch import nn

from tcompress.distill.admm import AdmmPruning
from tcompress.distill.constraint import FixedZeros, layers_with_zeros
from tcompress.distill.effective import Effective, computing_with
from tcompress.distill.gradual import GradualPruning
from tcompress.distill.movement import MovementPruning
from tcompress.distill.prune_schedule import cubic, keep_largest, prunes_now
from tcompress.packing import Pattern
from tcompress.recipe.training_prune import TrainingPrune


def layer(n=8, k=12, seed=0):
    linear = nn.Linear(k, n)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)))
    return linear


def config(method="magnitude", **more):
    more = {"pattern": "unstructured", "sparsity": 0.5, "every": 2, **more}
    return TrainingPrune(method=method, **more)


def test_fixed_zeros_stay_zero():
    linear = layer()
    with torch.no_grad():
        linear.weight[linear.weight < 0] = 0
    zeros = linear.weight == 0
    constraint = FixedZeros({"0": linear})
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1)
    for step in range(3):
        linear(torch.ones(2, 12)).square().sum().backward()
        constraint.after_backward()
        assert (linear.weight.grad[zeros] == 0).all()
        assert (linear.weight.grad[~zeros] != 0).all()
        optimizer.step()
        with torch.no_grad():
            linear.weight.add_(0.01)  # whatever else moves them
        constraint.after_step(step)
        assert (linear.weight[zeros] == 0).all()
    assert (linear.weight[~zeros] != 0).all()


def test_zeros_are_found_in_linear_layers_that_hold_some():
    model = nn.ModuleDict({"some": layer(), "none": layer(), "all": layer(), "embedding": nn.Embedding(3, 4, 0)})
    with torch.no_grad():
        model["some"].weight[0, 0] = 0
        model["all"].weight.zero_()
    assert list(layers_with_zeros(model)) == ["some"]


def test_the_cubic_schedule():
    for t in np.linspace(0, 1, 9):
        # equation 1 with s_i = 0, n Δt = 1: s_t = s_f + (s_i - s_f)(1 - t)³
        assert 0.8 * cubic(t) == pytest.approx(0.8 + (0 - 0.8) * (1 - t) ** 3)
    assert (cubic(-1), cubic(2)) == (0, 1)


def test_when_masks_change():
    prune = config(begin=0.2, end=0.8, every=3)
    due = {step: prunes_now(prune, step, 20) for step in range(20)}
    assert [step for step, done in due.items() if done is not None] == [4, 7, 10, 13, 15]
    assert (due[4], due[15]) == (0, 1)
    assert due[7] == pytest.approx(3 / 11)
    assert prunes_now(config(end=0.1), 0, 1) == 1  # a training of one step


@pytest.mark.parametrize("columns", [8, 10])
def test_n_m_by_scores_of_any_sign(columns):
    scores = -torch.rand(3, columns, generator=torch.Generator().manual_seed(0))
    for part, n in ((0.0, 4), (0.5, 3), (1.0, 2)):
        kept = keep_largest(scores, Pattern.parse("2:4"), None, part)
        for row, mask in zip(scores, kept, strict=True):
            for i in range(0, columns, 4):
                group = row[i : i + 4]
                best = -(-n * len(group) // 4)
                assert set(group.argsort(descending=True)[:best].tolist()) == set(
                    mask[i : i + 4].nonzero()[:, 0].tolist()
                )


def test_gradual_pruning_follows_the_schedule():
    linear, steps = layer(), 12
    constraint = GradualPruning({"0": linear}, config(end=1.0, every=1), steps)
    gone = torch.zeros_like(linear.weight, dtype=torch.bool)
    for step in range(steps):
        before = linear.weight.detach().clone()
        constraint.before_step(step)
        wanted = round(0.5 * (1 - (1 - step / (steps - 1)) ** 3) * 96)
        zero = linear.weight == 0
        assert int(zero.sum()) == wanted
        assert (zero | ~gone).all()  # what went stays away
        smallest = before.abs().flatten().sort().values[:wanted]
        assert torch.equal(before.abs()[zero].sort().values, smallest)
        gone = zero
        with torch.no_grad():
            linear.weight.add_(0.05 * torch.randn(8, 12, generator=torch.Generator().manual_seed(step)))
        constraint.after_step(step)
    assert (linear.weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("pattern", ["4x4", "2:4", "8x4"])
def test_gradual_pruning_of_patterns(pattern):
    linear = layer()
    sparsity = None if ":" in pattern else 0.5
    constraint = GradualPruning({"0": linear}, config(pattern=pattern, sparsity=sparsity, end=1.0), 6)
    for step in range(6):
        constraint.before_step(step)
    zero = linear.weight == 0
    if pattern == "2:4":
        assert (zero.view(8, 3, 4).sum(2) == 2).all()
    else:
        r, c = map(int, pattern.split("x"))
        blocks = zero.view(8 // r, r, 12 // c, c).float().mean((1, 3))
        assert set(blocks.unique().tolist()) <= {0.0, 1.0}
        assert int(blocks.sum()) == round(0.5 * blocks.numel())


@pytest.mark.parametrize("pattern", ["unstructured", "4x4", "2:4"])
def test_movement_pruning(pattern):
    """Scores gather -lr · ∂L/∂(W ⊙ M) · W, summed over blocks, and the largest stay."""
    linear, steps, lr = layer(), 8, 0.5
    sparsity = None if pattern == "2:4" else 0.5
    constraint = MovementPruning({"0": linear}, config("movement", pattern=pattern, sparsity=sparsity), steps)
    scores, weights = constraint.scores("0"), linear.weight
    size = (4, 4) if pattern == "4x4" else (1, 1)
    expected = torch.zeros(scores.shape, dtype=torch.float64)
    optimizer = torch.optim.SGD([scores, weights], lr=lr)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    last = round(0.7 * steps) - 1
    for step in range(steps):
        constraint.before_step(step)
        mask, before = constraint.mask("0").clone(), weights.detach().clone()
        with computing_with({linear: Effective([constraint.maps()[linear]])}):
            out = linear(x)
            out.sin().sum().backward()
        assert torch.allclose(out, x @ (before * mask).T + linear.bias, atol=1e-6)
        gradient = (out.detach().cos().T @ x).double()  # ∂L/∂(W ⊙ M)
        constraint.after_backward()
        assert torch.allclose(weights.grad, gradient.float() * mask, atol=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        constraint.after_step(step)
        if step < last:
            products = gradient * before.double()
            n, k = scores.shape
            expected -= lr * products.view(n, size[0], k, size[1]).sum((1, 3))
            assert torch.equal(weights[~mask], before[~mask])  # kept, and may come back
        assert torch.allclose(scores.double(), expected, atol=1e-4)
    zero = weights == 0
    blocks = zero.view(8 // size[0], size[0], 12 // size[1], size[1]).float().mean((1, 3))
    if pattern == "2:4":
        assert (zero.view(8, 3, 4).sum(2) == 2).all()
    else:
        assert float(blocks.mean()) == 0.5
        assert expected[blocks == 1].max() <= expected[blocks == 0].min()


def test_admm():
    """On min ½‖W - A‖² by gradient steps: the multipliers and Z as in the paper, in float64."""
    linear, steps, rho, lr = layer(), 12, 0.5, 0.2
    target = torch.randn(8, 12, generator=torch.Generator().manual_seed(4))
    constraint = AdmmPruning({"0": linear}, config("admm", rho=rho, end=0.5), steps)
    w, a = linear.weight.detach().double().numpy().copy(), target.double().numpy()

    def projected(v):
        cut = np.sort(np.abs(v).ravel())[v.size // 2 - 1]
        return np.where(np.abs(v) > cut, v, 0)

    z = u = mask = None
    optimizer = torch.optim.SGD([linear.weight], lr=lr)
    for step in range(steps):
        constraint.before_step(step)
        if step == 5:
            mask = projected(w) != 0
            w, z = w * mask, None
        elif step < 5 and step % 2 == 0:
            z = projected(w if z is None else w + u)
            u = np.zeros_like(w) if u is None else u + w - z
        loss = 0.5 * (linear.weight - target).square().sum()
        penalty = constraint.penalty()
        assert (penalty is None) == (z is None)
        if penalty is not None:
            assert float(penalty.detach()) == pytest.approx(rho / 2 * ((w - z + u) ** 2).sum(), rel=1e-4)
            loss = loss + penalty
        loss.backward()
        constraint.after_backward()
        gradient = w - a + (0 if z is None else rho * (w - z + u))
        w = w - lr * (gradient if mask is None else gradient * mask)
        optimizer.step()
        optimizer.zero_grad()
        constraint.after_step(step)
        assert np.allclose(linear.weight.detach().numpy(), w, atol=1e-5)
        if z is not None:
            assert np.allclose(constraint.variable("z", "0").numpy(), z, atol=1e-5)
            assert np.allclose(constraint.variable("u", "0").numpy(), u, atol=1e-5)
    assert (linear.weight == 0).float().mean() == 0.5


def test_settings():
    with pytest.raises(ValueError, match="got nothing, expected 0 to 1 for 8x4"):
        TrainingPrune()
    with pytest.raises(ValueError, match="got 0.3, expected 0.5 or nothing for 2:4"):
        TrainingPrune(pattern="2:4", sparsity=0.3)
    with pytest.raises(ValueError, match="got 0.2, expected more than begin, 0.5"):
        TrainingPrune(sparsity=0.5, begin=0.5, end=0.2)
    assert TrainingPrune(pattern="2:4", targets="fc").targets == ("fc",)
