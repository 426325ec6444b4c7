"""Looking at the dense gradient: norms are those of autograd, gradients of parameters stay, rows follow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.rivals.oracle import forget_gradient, look_at_gradient, with_oracle
from lemo import attach
from lemo.core.plan import Plan
from lemo.runtime.model import decoder_layers
from tests.runtime.oracle import batch, tiny_model


@pytest.mark.parametrize("engine", ["fused", "generic"])
def test_a_look_finds_the_gradient_of_every_layer(engine):
    model, inputs = tiny_model("llama").train(), batch(64, supervised_from=56)
    choices = {"backward_ratio": 0.5, "gradient": "keys", "block_size": 4, "dense_layers": ()}
    plan = with_oracle(Plan.uniform(model, scorer="predictor", **choices), model, "gradient")
    wanted, hooks = {}, []
    for i, layer in enumerate(decoder_layers(model)):

        def keep(module, args, output, i=i):
            stream = output[0] if isinstance(output, tuple) else output
            stream.register_hook(lambda g: wanted.__setitem__(i, g.square().sum(-1).flatten()))

        hooks.append(layer.register_forward_hook(keep))
    model(**inputs).loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    before = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        p.grad = before[n].clone()
    with attach(model, plan, self_test=False, unsafe_no_bypass=True, engine=engine) as handle:
        look_at_gradient(model, handle, inputs, same=False)
        assert handle.plan is plan
        for i, layer in enumerate(plan.layers):
            share = wanted[i] / wanted[i].sum()
            torch.testing.assert_close(layer.predictor.norms_N, share, rtol=1e-4, atol=1e-9)
        assert all(p.grad.equal(before[n]) for n, p in model.named_parameters())
        model.zero_grad()
        model(**inputs).loss.backward()
        for i, selection in handle.selections.items():
            blocks = plan.layers[i].predictor.norms_N.view(-1, 4).sum(1)
            kept = set((selection.backward.rows_N.cpu() // 4).tolist())
            free = set(range(1, 13))  # both ends and loss are kept whatever they score
            assert len(kept & free) == 8 - 4
            assert min(blocks[list(kept & free)]) >= max(blocks[list(free - kept)])
        look_at_gradient(model, handle, inputs, same=True)
        norms = [x.predictor.norms_N for x in plan.layers]
        assert all(n.equal(norms[0]) for n in norms)
        forget_gradient(replace(plan))
        assert all(x.predictor.norms_N is None for x in plan.layers)
