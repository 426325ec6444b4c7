"""Scorer `words` in a model: both engines keep the rows that a question asks for, and recipes may name it."""

from __future__ import annotations

import pytest
import torch

from lemo import attach
from lemo.cli.recipe import build_run
from lemo.core.plan import Plan
from lemo.errors import ConfigError
from lemo.train.checks import check_run
from tests.runtime.oracle import tiny_model

TOKENS, NEEDLE, BLOCK = 256, 6, 4


def asked() -> dict[str, torch.Tensor]:
    """Filler, a rare word in one block, and a question for it at the end."""
    ids = torch.arange(TOKENS).remainder(5).add(10)[None]
    ids[0, NEEDLE * BLOCK + 1] = ids[0, -6] = 50
    labels = torch.full_like(ids, -100)
    labels[0, -4:] = ids[0, -4:]
    return {"input_ids": ids, "labels": labels}


def plan_of(model, scorer: str) -> Plan:
    choices = {"gradient": "keys", "dense_layers": (), "context_window": 16}
    return Plan.uniform(model, backward_ratio=0.35, block_size=BLOCK, scorer=scorer, **choices)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_engines_keep_what_is_asked_for_and_agree(family):
    found = {}
    for engine in ("fused", "generic"):
        model = tiny_model(family).train()
        plan = plan_of(model, "words")
        with attach(model, plan, engine=engine, self_test=False, unsafe_no_bypass=True) as handle:
            loss = model(**asked()).loss
            loss.backward()
            kept = {i: set((s.backward.rows_N.cpu() // BLOCK).tolist()) for i, s in handle.selections.items()}
        assert all(NEEDLE in blocks for blocks in kept.values()) and len({tuple(sorted(x)) for x in kept.values()}) == 1
        found[engine] = loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found["fused"][0], found["generic"][0])
    for one, other in zip(found["fused"][1], found["generic"][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_rows_before_the_answers_alone_miss_it():
    model, kept = tiny_model("llama").train(), {}
    for scorer in ("words", "recent"):
        with attach(model, plan_of(model, scorer), self_test=False, unsafe_no_bypass=True) as handle:
            model(**asked()).loss.backward()
            kept[scorer] = set((handle.selections[0].backward.rows_N.cpu() // BLOCK).tolist())
    assert NEEDLE in kept["words"] - kept["recent"] and len(kept["words"]) == len(kept["recent"])


def test_embeddings_alone_have_no_words():
    model = tiny_model("llama").train()
    inputs = asked()
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with (
        attach(model, plan_of(model, "words"), self_test=False, unsafe_no_bypass=True),
        pytest.raises(ConfigError, match="'words' needs input_ids"),
    ):
        model(inputs_embeds=embedded, labels=inputs["labels"])


def test_a_recipe_may_name_it():
    recipe = {"output": "out", "model": {"path": "m"}, "data": {"train": ["x.txt"]}, "sparsity": {"scorer": "words"}}
    run = build_run(recipe, "recipe")
    check_run(run)
    assert run.sparsity.scorer == "words"
    with pytest.raises(ConfigError, match=r"sparsity\.scorer"):
        build_run(recipe | {"sparsity": {"scorer": "sentences"}}, "recipe")
