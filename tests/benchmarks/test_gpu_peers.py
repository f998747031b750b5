"""The peers of GPU benchmarks that a CPU can run too."""

from __future__ import annotations

import gpu_peers
import pytest
import torch


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_the_layer_around_int_mm(rows):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 64), torch.randn(32, 64), torch.randn(32)
    scale = weight.abs().amax(1) / 127
    y = gpu_peers.int_mm(x, (weight / scale[:, None]).round().to(torch.int8), scale, bias)
    exact = x.double() @ weight.double().T + bias.double()
    assert y.shape == (rows, 32)
    assert float((y - exact).norm() / exact.norm()) < 0.02


def test_what_is_not_installed_is_left_out(monkeypatch):
    x = torch.randn(1, 2, 8, 64)
    monkeypatch.setattr(gpu_peers, "_installed", lambda name: None)
    assert gpu_peers.attention(x, x, x, True) == {}
    assert gpu_peers.varlen(x[0], x[0], x[0], torch.tensor([0, 2]), 2) == {}


def test_a_broken_package_is_not_taken_for_a_missing_one(monkeypatch, tmp_path):
    (tmp_path / "broken_peer.py").write_text("import no_such_module_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        gpu_peers._installed("broken_peer")
    assert gpu_peers._installed("no_such_module_at_all") is None
