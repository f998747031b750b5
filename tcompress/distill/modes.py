"""What holds of student and teacher while one is trained, and by what they are known again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def gradients() -> Iterator[None]:
    """Within, gradients are kept, whatever the caller is under; of use as a decorator too."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def training_modes(
    student: nn.Module, teacher: nn.Module, parameters: list[nn.Parameter], dropout: bool
) -> Iterator[None]:
    """The modes of a training, undone afterwards. torch's fused Transformer path would call no layers."""
    modes = [(module, module.training) for model in (student, teacher) for module in model.modules()]
    wanted = {id(p) for p in parameters}
    gradients = [(p, p.requires_grad) for p in student.parameters()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    student.train(dropout)
    teacher.eval()
    for parameter, _ in gradients:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in modes:
            module.training = mode
        for parameter, mode in gradients:
            parameter.requires_grad_(mode)
            parameter.grad = None


def digest(model: nn.Module) -> str:
    """Of all parameters, with their names."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
