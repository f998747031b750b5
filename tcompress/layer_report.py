"""What the report says of each layer that was quantized, pruned or stored without zeros."""

from __future__ import annotations

from torch import nn

from tcompress import calibrate
from tcompress.layer_job import Written
from tcompress.match import COMPRESSED, Match
from tcompress.nn import OutlierLinear, SparseLinear
from tcompress.prune_step import Pruned
from tcompress.recipe import Quantize
from tcompress.report.report import LayerReport
from tcompress.report.size import model_sizes
from tcompress.sparse_kernel import DENSE
from tcompress.targeted import replaced_report
from tcompress.weights import linear_weight

#: What is said of a layer whose zeros no kernel turns into time.
NO_SPEEDUP = "no speedup from this sparsity"


def compressed_report(m: Match, replacement: nn.Module, reason: str) -> LayerReport:
    """Of a layer and its compressed form; `reason` is why it was not pruned, if it was to be."""
    assert isinstance(replacement, COMPRESSED)
    stored = replacement.dequantize() if isinstance(replacement, OutlierLinear) else replacement.packed.dequantize()
    action = "float" if m.scheme is None else m.scheme.name
    if isinstance(m.step, Quantize) and m.step.algorithm != "rtn":
        action += f" {m.step.algorithm}"
    if m.input_scale is not None:
        reason = "; ".join(filter(None, (f"inputs in {m.input_scale.lo:.3g} … {m.input_scale.hi:.3g}", reason)))
    if isinstance(replacement, OutlierLinear):
        count = replacement.outlier_columns.numel()
        reason = "; ".join(filter(None, (f"{count} outlier inputs in floating point", reason)))
    if isinstance(replacement, SparseLinear):
        action += f" sparse {replacement.pattern}"
        reason = "; ".join(filter(None, (_sparse_reason(replacement), reason)))
    return replaced_report(m.names, m.module, replacement, action, reason, stored)


def _sparse_reason(layer: SparseLinear) -> str:
    choice = layer.choice
    if layer.layout == DENSE:
        return NO_SPEEDUP
    if choice is None or choice.source == "model":
        return f"kernel {layer.layout}"
    dense, own = (choice.seconds[name] * 1e3 for name in (DENSE, layer.layout))
    return f"kernel {layer.layout}, {choice.speedup:.2f}x dense ({own:.3f} of {dense:.3f} ms, {choice.tokens} tokens)"


def pruned_report(
    module: nn.Module, pruned: Pruned, replacement: nn.Module, found: calibrate.Comparison | None
) -> LayerReport:
    """Of a layer and its pruned copy."""
    report = replaced_report(pruned.names, module, replacement, _pruned_action(pruned))
    return report if found is None else report.model_copy(update={"output_sqnr_db": found.layers[module].sqnr_db})


def written_report(module: nn.Module, pruned: Pruned, written: Written) -> LayerReport:
    """Of a layer that was pruned in its own place."""
    weight, nbytes = linear_weight(module), model_sizes(module).disk
    return LayerReport(
        name=pruned.names[0],
        aliases=pruned.names[1:],
        kind=type(module).__name__,
        action=_pruned_action(pruned),
        shape=tuple(weight.shape),
        bytes_before=nbytes,
        bytes_after=nbytes,
        sparsity=int((weight == 0).sum()) / max(weight.numel(), 1),
        weight_sqnr_db=written.weight_sqnr_db,
        output_sqnr_db=written.output_sqnr_db,
    )


def _pruned_action(pruned: Pruned) -> str:
    return f"pruned {pruned.step.pattern}" + (f" {pruned.step.algorithm}" if pruned.step.needs_data else "")
