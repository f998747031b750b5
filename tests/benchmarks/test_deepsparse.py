"""The peer that runs in another Python; without it."""

from __future__ import annotations

import sys
from pathlib import Path

import deepsparse_linear
import held
import onnx_call
import pytest
import torch
from deepsparse_linear import deepsparse_fp32, deepsparse_int8
from peer import CannotRun

pytest.importorskip("onnx")

FAKE = """
import sys, numpy
source, given, target, threads = sys.argv[1:]
x = numpy.load(given)
numpy.save(target, numpy.zeros((*x.shape[:-1], 3), dtype=numpy.float32))
print("a banner")
print('{"seconds": 0.25}')
"""


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 16), torch.randn(3, 16), torch.randn(3)


def use(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker, in this Python."""
    worker = tmp_path / "worker.py"
    worker.write_text(text)
    monkeypatch.setattr(deepsparse_linear, "WORKER", worker)
    monkeypatch.setattr(deepsparse_linear, "installed_python", lambda: sys.executable)


@pytest.mark.parametrize("factory", [deepsparse_fp32, deepsparse_int8])
def test_result_and_time_come_from_the_other_process(factory, inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use(FAKE, tmp_path, monkeypatch)
    call = factory(*inputs)
    assert call.seconds == 0.25
    assert torch.equal(call(), torch.zeros(5, 3))


def test_a_crash_of_the_other_process_is_a_reason(inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use("raise SystemExit('unknown op')", tmp_path, monkeypatch)
    with pytest.raises(CannotRun, match="does not take the model: unknown op"):
        deepsparse_fp32(*inputs)


def test_it_cannot_be_held(inputs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(held.MARK, "avx2")
    with pytest.raises(CannotRun, match="takes no limit"):
        deepsparse_fp32(*inputs)


def test_a_failed_installation_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "version_info", (3, 12))
    monkeypatch.setattr(deepsparse_linear, "PYTHONS", ("no-such-python",))
    with pytest.raises(CannotRun, match="needs one of no-such-python"):
        deepsparse_linear.installed_python()
    with pytest.raises(CannotRun, match="is not installed: the reason"):
        deepsparse_linear._check([sys.executable, "-c", "raise SystemExit('the reason')"])


def test_what_is_installed_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "tcompress" / f"deepsparse-{deepsparse_linear.VERSION}"
    folder.mkdir(parents=True)
    (folder / ".installed").touch()
    assert deepsparse_linear.installed_python() == str(folder / "bin" / "python")


def test_the_int8_model_computes_the_product(inputs):
    pytest.importorskip("onnxruntime")
    x, w, b = inputs
    model = deepsparse_linear._int8_model(x[None], w, b)
    got = onnx_call.call(model.SerializeToString(), {"x": x[None]})()[0]
    expected = x.double() @ w.double().t() + b
    assert (got - expected).norm() < 0.02 * expected.norm()
