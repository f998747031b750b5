"""Calls of OpenVINO models on torch's number of threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peer import Call


def compiled(model: Any, precision: str, **more: Any) -> Any:
    """The model on the CPU. `precision`: f32, bf16, or "default", which is bf16 on processors that can."""
    import openvino

    config: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY", **more}
    if precision != "default":
        config["INFERENCE_PRECISION_HINT"] = precision
    return openvino.Core().compile_model(model, "CPU", config)


def call(model: Any, inputs: Sequence[torch.Tensor]) -> Call:
    """Gives the first output."""
    request, feed = model.create_infer_request(), [x.numpy() for x in inputs]
    return lambda: torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0])
