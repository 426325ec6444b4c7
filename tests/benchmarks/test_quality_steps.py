"""How the quality benchmark makes a step: more sequences in fewer steps, and gradients corrected now and then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.quality_costs import gain_at_64k
from benchmarks.quality_grids import Cell
from benchmarks.quality_methods import METHODS
from benchmarks.quality_specs import exact
from benchmarks.quality_train import Correction, at_progress, backward, dense_backward, loss_of, train
from lemo import attach
from tests.benchmarks.test_quality import WINDOW, _study, inputs  # noqa: F401  a fixture

EXACT = exact("some rows", 0.2, span=None, scorer="random")


def _gradients(model) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


def test_more_sequences_make_fewer_steps_of_several_parts(inputs: Path):  # noqa: F811
    study = _study(inputs)
    few, many = METHODS["balanced"], METHODS["balanced_batch_4"]
    steps = [
        Cell(n, 0, flops_steps=200).trained_steps(study.shape, study.protocol) for n in ("balanced", "balanced_batch_4")
    ]
    assert steps[1] == pytest.approx(steps[0] / 2, abs=1)
    small = [batch["input_ids"] for step in study.training_batches(few, 0, 2) for batch in step]
    (large,) = list(study.training_batches(many, 0, 1))
    assert [part["input_ids"].shape for part in large] == [(2, WINDOW)] * 2
    for part, ids in zip(large, small, strict=True):
        assert torch.equal(part["input_ids"], ids), "the same windows in the same order"


def test_a_correction_adds_what_was_missing(inputs: Path):  # noqa: F811
    study = _study(inputs)
    model = study.fresh_adapter(0).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    (first,), (second,) = list(study.training_batches(EXACT, 0, 2))
    correction = Correction(parameters, every=2, decay=0.5)
    with attach(model, study.plan(EXACT), self_test=False) as handle:
        plan = handle.plan
        backward(model, handle, EXACT, [first])
        sparse = _gradients(model)
        dense_backward(model, handle, EXACT, [first])
        assert handle.plan is plan
        dense = _gradients(model)
        assert any(not torch.allclose(a, b) for a, b in zip(sparse, dense, strict=True))

        handle.sparse_batches = 0  # the same draws of rows again
        backward(model, handle, EXACT, [first])
        correction.apply(0, lambda: dense_backward(model, handle, EXACT, [first]))
        for found, wanted in zip(_gradients(model), dense, strict=True):
            torch.testing.assert_close(found, wanted)
        backward(model, handle, EXACT, [second])
        plain = [p.grad.clone() for p in parameters]
        correction.apply(1, lambda: pytest.fail("looks in the first of two steps only"))
        for found, own, a, b in zip(_gradients(model), plain, sparse, dense, strict=True):
            torch.testing.assert_close(found, own + b - a, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "random_ltd_no_ramp"])
def test_methods_of_others_skip_rows_with_loss(inputs: Path, name):  # noqa: F811
    """Loss on every row, and yet as many rows run as the method says; with every row, the loss is the model's own."""
    study, method = _study(inputs), METHODS[name]
    model = study.fresh_adapter(0).train()
    (part,) = next(study.training_batches(method, 0, 1))
    assert bool((part["labels"][:, 1:] != -100).all())
    rows = int(part["labels"][:, 1:].numel())
    with attach(model, study.plan(method), self_test=False, unsafe_no_bypass=True) as handle:
        assert backward(model, handle, method, [part]) > 0 and _gradients(model)
        wanted = method.plan.forward_ratio
        ratios = [ratio for index, ratio in handle.ratios().items() if not handle.plan.layers[index].is_dense]
        assert ratios and all(f == b == pytest.approx(wanted, abs=0.1) for f, b in ratios)
        handle.plan = at_progress(handle.plan, 1.0)
        found = loss_of(model, handle, method, part, rows)
    torch.testing.assert_close(found, model(**part).loss)


def test_corrected_runs_train_and_cost_more(inputs: Path):  # noqa: F811
    study = _study(inputs)
    method = replace(EXACT, corrected=(2, 0.5))
    model = study.fresh_adapter(0)
    with attach(model, study.plan(method), self_test=False) as handle:
        trained = train(study, method, 0, {"steps": 4, "learning_rate": 1e-2, "method": "corrected"}, handle)
    assert len(trained.losses) == 4 and all(x > 0 for x in trained.losses)
    gains = [gain_at_64k(METHODS[f"instruct_corrected_{n}"])["llama-3-8b"] for n in (4, 8, 16)]
    plain = gain_at_64k(METHODS["instruct_default"])["llama-3-8b"]
    assert gains == sorted(gains) and gains[-1] < plain
    assert 1 / gains[0] == pytest.approx(1 / plain + 1 / 4)
