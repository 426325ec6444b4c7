"""Bytes per kept row and layer: the closed form at real sizes, and what the engine's functions hold at small ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from lemo import attach
from lemo.measure.row_memory import saved_row_kib
from lemo.measure.sizes import read_sizes
from tests.runtime.oracle import batch, tiny_model
from tests.runtime.test_fused import plan_of

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_bounds_at_the_size_of_llama_2_7b(keep):
    """With keys of kept rows: at most 96, 52 and 17 KiB, and not below what must be kept."""
    config = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=1)
    sizes = read_sizes(config, rank=8, targets=TARGETS, dtype=torch.bfloat16)
    found = {level: saved_row_kib(sizes, level, keep=keep) for level in ("none", "mlp", "lin", "layer")}
    assert 91 < found["none"] <= 96 and 48 < found["mlp"] <= 52
    assert 16 < found["lin"] <= 17 and 8 < found["layer"] <= 9


def saved_nodes(loss: torch.Tensor) -> list[int]:
    """Bytes that each fused layer's node of the graph holds, by `saved_tensors` and the rows in its call."""
    found, seen, todo = [], set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [parent for parent, _ in node.next_functions]
        if "_FusedLayer" in type(node).__name__:
            call = node.call
            indices = [call.rows_n, call.skipped_s, call.queries.position_N]
            tensors = [t for t in (*node.saved_tensors, *indices) if t is not None]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            found.append(sum(storages.values()))
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("recompute", ["none", "mlp", "lin", "layer"])
def test_layers_hold_what_the_closed_form_says(recompute, dropout):
    """To the byte, and dropout adds none."""
    model = get_peft_model(
        tiny_model(), LoraConfig(r=2, target_modules=list(TARGETS), lora_dropout=dropout), autocast_adapter_dtype=False
    )
    sizes = read_sizes(model.get_base_model().config, rank=2, targets=TARGETS, dtype=torch.float32)
    plan = plan_of(model, "skip")
    plan = replace(plan, layers=tuple(replace(x, forward_ratio=0.5, backward_ratio=0.5) for x in plan.layers))
    tokens = 64
    with attach(model, plan, engine="fused", recompute=recompute, self_test=False):
        held = saved_nodes(model(**batch(tokens, supervised_from=60)).loss)
    assert len(held) == 4
    wanted = saved_row_kib(sizes, recompute, tokens=tokens) * 1024 * tokens / 2
    # The last layer works on the rows that carry loss alone; nodes are found from the loss backwards.
    assert held[1:] == [round(wanted)] * 3 and held[0] < wanted
