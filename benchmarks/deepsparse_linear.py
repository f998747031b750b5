"""DeepSparse's linear layers, in a virtual environment and a process of their own.

DeepSparse 1.8.0, the last one, needs Python 3.8 … 3.11 and old versions of numpy and onnx, so it is installed apart, in
$XDG_CACHE_HOME/tcompress, the first time that it is asked for. Its process times itself: a pipe would add to each call.
Its threads wait for each other: where something else takes one of its processors, a call takes a time slice, 24 ms.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import held
import numpy as np
import onnx_call
import torch
from onnx_linear import float_model
from peer import CannotRun

VERSION = "1.8.0"
PYTHONS = ("python3.11", "python3.10", "python3.9", "python3.8")
WORKER = Path(__file__).parent / "deepsparse_worker.py"
OPSET = 13
IR_VERSION = 8
INSTALL_SECONDS, RUN_SECONDS = 1200, 300


class DeepSparseCall:
    """Gives the result that the other process wrote. `seconds`: the median call there."""

    def __init__(self, result: torch.Tensor, seconds: float) -> None:
        self.result, self.seconds = result, seconds

    def __call__(self) -> torch.Tensor:
        return self.result


def deepsparse_fp32(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> DeepSparseCall:
    return _run(float_model(x, w, b, OPSET), x)


def deepsparse_int8(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> DeepSparseCall:
    """uint8 activations, a scale of their own for the whole x, calibrated on x itself; weights a scale a channel.

    In the form that SparseML exports: MatMulInteger of [1, M, K], unsigned weights around 128, the bias added to the
    integers. Signed weights and [M, K] took the same time; QuantizeLinear and DequantizeLinear around a MatMul its
    engine leaves to ONNX Runtime, and takes ten times as long.
    """
    return _run(_int8_model(x[None], w, b), x[None])


def _int8_model(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
    from onnx import TensorProto, helper

    x_scale = ((x.max() - x.min()) / 255).clamp(min=1e-10)
    w_scale = w.abs().amax(1).clamp(min=1e-10) / 127
    scale = x_scale * w_scale
    constants = {
        "x_scale": x_scale,
        "x_zero": (-x.min() / x_scale).round().clamp(0, 255).to(torch.uint8),
        "w": ((w / w_scale[:, None]).round() + 128).to(torch.uint8).t(),
        "w_zero": torch.tensor(128, dtype=torch.uint8),
        "bias": (b / scale).round().to(torch.int32),
        "scale": scale,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"]),
        helper.make_node("MatMulInteger", ["q", "w", "x_zero", "w_zero"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["y"]),
    ]
    return onnx_call.model(nodes, {"x": x}, {"y": b.expand(*x.shape[:-1], -1)}, constants, OPSET)


def _run(model: Any, x: torch.Tensor) -> DeepSparseCall:
    """Times the model in the other process.

    Raises:
        CannotRun: DeepSparse is not to be had, does not take the model, or all is held to an instruction set.
    """
    if held.isa():  # it multiplies with vpdpbusds on 512 bits under NM_ARCH=avx2 too
        raise CannotRun(f"DeepSparse {VERSION} takes no limit on the instruction set that its generated code keeps")
    python = installed_python()
    model.ir_version = IR_VERSION
    with tempfile.TemporaryDirectory() as folder:
        given, source, target = (Path(folder) / name for name in ("x.npy", "model.onnx", "y.npy"))
        source.write_bytes(model.SerializeToString())
        np.save(given, x.numpy())
        command = [python, *map(str, (WORKER, source, given, target, torch.get_num_threads()))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, env=_environment())
        if done.returncode != 0:
            raise CannotRun(f"DeepSparse {VERSION} does not take the model: {_last_line(done.stderr)}")
        seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
        return DeepSparseCall(torch.from_numpy(np.load(target)).flatten(0, -2), seconds)  # [M, N]


def _environment() -> dict[str, str]:
    return {**os.environ, "NM_DISABLE_ANALYTICS": "1"}


def installed_python() -> str:
    """The Python that has DeepSparse; installs it the first time.

    Raises:
        CannotRun: there is no Python for it, or pip failed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tcompress"
    folder = cache / f"deepsparse-{VERSION}"
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        base = sys.executable if sys.version_info < (3, 12) else next(filter(None, map(shutil.which, PYTHONS)), None)
        if base is None:
            raise CannotRun(f"DeepSparse {VERSION} needs one of {', '.join(PYTHONS)}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check([base, "-m", "venv", str(folder)])
        _check([str(python), "-m", "pip", "install", "-q", f"deepsparse=={VERSION}"])
        done.touch()
    return str(python)


def _check(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    if done.returncode != 0:
        raise CannotRun(f"DeepSparse {VERSION} is not installed: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
