"""One step of a model, and what must hold of two of them or of a model without lemo."""

from __future__ import annotations

import torch

from tests.runtime.oracle import batch, gradients

INPUTS = batch(64, supervised_from=52)


def run(model, inputs=INPUTS):
    """Loss and gradients; parameter names without what wrappers put before them."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    found = {n.replace("_orig_mod.", "").replace("module.", ""): g for n, g in gradients(model).items()}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


def assert_equal(got, wanted):
    assert torch.equal(got[0], wanted[0])
    assert got[1].keys() == wanted[1].keys() != set()
    assert all(torch.equal(got[1][name], gradient) for name, gradient in wanted[1].items())


def is_plain(model) -> bool:
    """Whether nothing of lemo is left in a model."""
    modules = list(model.modules())
    marks = any("_lemo" in key for m in modules for key in m.__dict__)
    classes = any("lemo" in c.__module__ for m in modules for c in type(m).__mro__)
    configs = any("lemo" in type(m.config).__module__ for m in modules if hasattr(m, "config"))
    return not (marks or classes or configs)
