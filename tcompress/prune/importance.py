"""How much a unit of channels, or a whole block, matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from tcompress import calibrate
from tcompress.channels import Group
from tcompress.padding import Masks, counted, token_masks
from tcompress.weights import linear_weight


def weight_importance(group: Group) -> torch.Tensor:
    """float64 [units]: the norm of all weights that a unit's channels have, in producers and consumer; Li et al.,
    "Pruning Filters for Efficient ConvNets", arXiv 1608.08710, section 3.1, here in L2 and with the consumer's columns.
    """
    total = torch.zeros(group.count, dtype=torch.float64)
    for producer in group.producers:
        rows = linear_weight(producer.layer).detach().double().square().sum(1).cpu()
        total.index_add_(0, producer.units, rows)
    columns = linear_weight(group.consumer).detach().double().square().sum(0).cpu()
    return total.index_add_(0, group.inputs, columns).sqrt()


def activation_importance(
    weight: torch.Tensor, hessian: torch.Tensor, inputs: torch.Tensor, count: int
) -> torch.Tensor:
    """float64 [count], the energy of what each unit adds to the consumer's output: E‖W_u x_u‖².

    For single channels this is ‖W_:j‖²·E[x_j²], the norm by which Wanda (arXiv 2306.11695, section 3) weighs a weight,
    summed over a channel.

    Args:
        weight: [N, K] of the consumer.
        hessian: [K, K], 2·E[x xᵀ] of its inputs (`InputStatistics.hessian`).
        inputs: int64 [K], the unit of each input, ascending and of one size.
    """
    w, h = weight.detach().double().cpu(), hessian.double().cpu() / 2
    width = len(inputs) // count
    columns = w.T.unflatten(0, (count, width))  # [units, width, N]
    # [width, width, units]: of each unit its block on the diagonal
    blocks = h.unflatten(0, (count, width)).unflatten(2, (count, width)).diagonal(dim1=0, dim2=2)
    return torch.einsum("uin,iju,ujn->u", columns, blocks, columns)


def taylor_importance(
    model: nn.Module, groups: Sequence[Group], samples: Sequence[Any], seed: int = 0
) -> list[torch.Tensor]:
    """float64 [units] for each group: the mean over samples of |∂L/∂m_u|, m_u = 1 a factor on the unit's channels.

    By the chain rule ∂L/∂m_u = Σ x·∂L/∂x over the unit's channels and tokens = Σ w·∂L/∂w over the consumer's weights
    that read them: the first-order change of the loss when the unit goes. Molchanov et al., "Pruning Convolutional
    Neural Networks", arXiv 1611.06440, section 2.2; for heads Michel et al., "Are Sixteen Heads Really Better than
    One?", arXiv 1905.10650, section 4.1.

    L is the "loss" that the model returns, which it does if the data hold labels. Otherwise there is nothing to be
    wrong by, and L is a random projection of the output with signs drawn anew for each sample: the mean is then how far
    the output moves.
    """
    total = [torch.zeros(group.count, dtype=torch.float64) for group in groups]
    generator = torch.Generator().manual_seed(seed)
    grads = {p: p.requires_grad for p in model.parameters()}
    with calibrate.evaluating(model), torch.enable_grad(), ExitStack() as stack:
        for p in grads:
            p.requires_grad_(False)
            stack.callback(p.requires_grad_, grads[p])
        factors = []
        for group in groups:
            weight = linear_weight(group.consumer)
            factor = torch.ones(group.count, dtype=weight.dtype, device=weight.device, requires_grad=True)
            factors.append(factor)
            hook = _scaled(factor, group.inputs.to(weight.device))
            stack.callback(group.consumer.register_forward_pre_hook(hook).remove)
        for sample in samples:
            loss = _loss(calibrate.run(model, sample), token_masks(model, sample), generator)
            for sums, gradient in zip(total, torch.autograd.grad(loss, factors, allow_unused=True), strict=True):
                if gradient is not None:
                    sums += gradient.abs().double().cpu()
    return [sums / max(len(samples), 1) for sums in total]


def _scaled(factor: torch.Tensor, inputs: torch.Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * factor[inputs], *args[1:])

    return hook


def _loss(output: Any, masks: Masks, generator: torch.Generator) -> torch.Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else None
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        return loss
    tensor = calibrate.first_tensor(output)
    assert tensor is not None
    tensor = counted(tensor, masks)
    signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
    return (tensor * signs).sum() / tensor.numel() ** 0.5


class BlockInfluence:
    """1 - mean over tokens of cos(x_in, x_out) of a block; Men et al., "ShortGPT", arXiv 2403.03853, section 2.2."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook, registered with_kwargs."""
        given = calibrate.first_tensor([*args, *kwargs.values()])
        got = calibrate.first_tensor(output)
        if given is None or got is None or given.shape != got.shape:
            return
        given, got = counted(given), counted(got)
        cosine = nn.functional.cosine_similarity(given.float(), got.float(), dim=-1).double()
        good = cosine[torch.isfinite(cosine)]
        self.total += float((1 - good).sum())
        self.count += good.numel()

    @property
    def value(self) -> float:
        """Infinite for a block that gave nothing to compare: such a one is not known to be of no account."""
        return self.total / self.count if self.count else float("inf")
