"""block_score against loops, and how its backend is chosen."""

from __future__ import annotations

import logging

import pytest
import torch

from lemo.errors import BackendError
from lemo.ops import backend as backend_module
from lemo.ops import block_score, key_block_scores
from lemo.ops.block_score import reference
from lemo.ops.block_score.cases import SPEC

CASES = [pytest.param(case, id=case.name) for case in SPEC.cases]


def _by_loops(query_HND, key_GND, block_start_K, block_length_K, block_document_K, scaling, softcap=None):
    heads, groups = len(query_HND), len(key_GND)
    logits = torch.einsum("hid,hjd->hij", query_HND, key_GND.repeat_interleave(heads // groups, 0)) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    s_NN = logits.relu().mean(0)
    blocks = list(zip(block_start_K.tolist(), block_length_K.tolist(), block_document_K.tolist(), strict=True))
    pairs = torch.zeros(len(blocks), len(blocks), dtype=s_NN.dtype)
    for m, (start_m, length_m, document_m) in enumerate(blocks):
        for n, (start_n, length_n, document_n) in enumerate(blocks):
            seen = [
                s_NN[i, j]
                for i in range(start_m, start_m + length_m)
                for j in range(start_n, start_n + length_n)
                if j <= i and document_m == document_n
            ]
            pairs[m, n] = max(seen, default=torch.tensor(0.0))
    return pairs


@pytest.mark.parametrize("limit_bytes", [1 << 27, 4096])
@pytest.mark.parametrize("case", CASES[:8])
def test_reference_meets_loops(case, limit_bytes, monkeypatch):
    monkeypatch.setattr(reference, "LIMIT_BYTES", limit_bytes)
    inputs = case.inputs(0, torch.float64)
    torch.testing.assert_close(block_score(**inputs), _by_loops(**inputs), rtol=1e-12, atol=1e-12)


def test_gradient_of_the_reference():
    case = next(c for c in SPEC.cases if c.name == "packed")
    inputs = case.inputs(0, torch.float64)
    query, key = inputs.pop("query_HND")[..., :4], inputs.pop("key_GND")[..., :4]
    torch.autograd.gradcheck(
        lambda q, k: reference.block_score_reference(q, k, **inputs),
        (query.clone().requires_grad_(), key.clone().requires_grad_()),
        fast_mode=True,
    )


def test_packed_documents_are_each_document_alone():
    inputs = next(c for c in SPEC.cases if c.name == "packed").inputs(0, torch.float64)
    packed = block_score(**inputs)
    document = inputs["block_document_K"]
    assert not packed[document[:, None] != document].any()
    for d in document.unique().tolist():
        of = document == d
        alone = {**inputs, "block_start_K": inputs["block_start_K"][of], "block_length_K": inputs["block_length_K"][of]}
        alone["block_document_K"] = document[of]
        assert torch.equal(block_score(**alone), packed[of][:, of])


def test_map_is_causal_and_never_needs_a_gradient():
    inputs = SPEC.cases[0].inputs(0, torch.float32)
    pairs = block_score(**{**inputs, "query_HND": inputs["query_HND"].requires_grad_()})
    assert not pairs.requires_grad and not pairs.triu(1).any() and (pairs >= 0).all()


def test_key_block_scores_is_a_mean_over_later_blocks_of_the_document():
    document = torch.tensor([0, 0, 0, 1, 1])
    pairs = torch.rand(5, 5, dtype=torch.float64).tril() * (document[:, None] == document)
    expected = [pairs[:3, 0].mean(), pairs[1:3, 1].mean(), pairs[2, 2], pairs[3:, 3].mean(), pairs[4, 4]]
    torch.testing.assert_close(key_block_scores(pairs, document), torch.stack(expected))
    with pytest.raises(ValueError, match="pairs_KK"):
        key_block_scores(pairs[:3], document)


def test_no_blocks():
    empty = torch.empty(0, dtype=torch.int64)
    assert block_score(torch.randn(2, 5, 4), torch.randn(1, 5, 4), empty, empty, empty, scaling=1.0).shape == (0, 0)


def test_triton_that_cannot_run_says_why():
    inputs = SPEC.cases[0].inputs(0, torch.float32)
    with pytest.raises(BackendError, match=r"CUDA device|cannot be imported"):
        block_score(**inputs, backend="triton")
    with pytest.raises(BackendError, match=r"float64|cannot be imported"):
        block_score(**SPEC.cases[0].inputs(0, torch.float64), backend="triton")
    with pytest.raises(BackendError, match="quick"):
        block_score(**inputs, backend="quick")


def test_auto_logs_its_choice_once(caplog, monkeypatch):
    monkeypatch.setattr(backend_module, "_logged", set())
    inputs = SPEC.cases[0].inputs(0, torch.float32)
    with caplog.at_level(logging.INFO, logger="lemo"):
        block_score(**inputs)
        block_score(**inputs)
    messages = [r.getMessage() for r in caplog.records if "block_score" in r.getMessage()]
    assert len(messages) == 1 and "reference" in messages[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_GND": torch.zeros(3, 70, 16)}, "multiple"),
        ({"key_GND": torch.zeros(2, 70, 8)}, "do not fit"),
        ({"key_GND": torch.zeros(2, 70, 16, dtype=torch.float64)}, "float64"),
        ({"block_length_K": torch.zeros(1, dtype=torch.int64)}, "integers"),
        ({"scaling": 0.0}, "positive"),
        ({"softcap": -1.0}, "positive"),
    ],
)
def test_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        block_score(**{**SPEC.cases[0].inputs(0, torch.float32), **changes})
