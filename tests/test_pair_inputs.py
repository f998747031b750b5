"""What readers of pairs are given is collected once where it is one tensor, and is what each alone would collect."""

import torch
from paired_models import llama

from tcompress.calibrate import evaluating, run
from tcompress.pair_inputs import Target, collect_readers
from tcompress.pairs import find_pairs
from tcompress.statistics import InputStatistics
from tcompress.weights import weight_key


def test_inputs_of_readers():
    model, inputs = llama()
    batches = [inputs, {"input_ids": inputs["input_ids"].flip(1)}]
    targets = [Target(p, {c.module: None for c in p.consumers}) for p in find_pairs(model, inputs)[0]]
    alone, handles = {}, []
    for target in targets:
        for module in target.schemes:
            alone[module] = InputStatistics(module.weight.shape[1])
            handles.append(module.register_forward_pre_hook(alone[module].hook, with_kwargs=True))

    def run_all():
        for batch in batches:
            run(model, batch)

    with evaluating(model):
        collected = collect_readers(targets, run_all, hessian=True, rows=5)
    for handle in handles:
        handle.remove()
    for module, expected in alone.items():
        got = collected[weight_key(module)]
        assert torch.equal(got.hessian, expected.hessian)
        assert torch.equal(got.max_abs, expected.max_abs)
        assert got.count == expected.count == 48
        assert got.rows.shape == (10, module.weight.shape[1])
    attention = model.model.layers[0].self_attn
    shared = {id(collected[weight_key(m)]) for m in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert len(shared) == 1
    assert collected[weight_key(attention.o_proj)] is not collected[weight_key(attention.q_proj)]
    assert not any(m._forward_pre_hooks for m in model.modules())
