"""Attention's backward by groups of heads: gradients are those of all heads at once, in the heads' own memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lemo.runtime.fused.attention as attention
from lemo.ops.attend_rows import far
from tests.runtime.oracle import batch, tiny_model
from tests.runtime.test_context_window import windowed
from tests.runtime.test_exact import in_double
from tests.runtime.test_far_share import sampled
from tests.runtime.test_fused import MODES, assert_equal_engines, plan_of, run
from tests.runtime.test_local_rows import SEEN, marked

HEADS = {"llama": 2, "qwen3": 2, "llama with as many key heads": 4}
# Where keys of rows without gradient are constants nothing is made again at `layer` that `lin` would keep: groups are
# of dense layers alone.
CONSTANT = ("exact rows", "exact pairs", "both rows", "both pairs")


def small(family: str):
    """A tiny model in fp64 with key heads for two or four groups."""
    name, *_ = family.split(" with ")
    return tiny_model(name, dtype=torch.float64, num_attention_heads=4, num_key_value_heads=HEADS[family])


@pytest.fixture
def seen(monkeypatch):
    """Groups of every call of attention's backward, in pieces as small as can be; gradients lie where heads were."""
    found, inner = [], attention.AttentionBackward.run

    def noted(work, *operands):
        places = {name: heads.data_ptr() for name, heads in work.heads.items()}
        grads = inner(work, *operands)
        if work.groups > 1:
            assert {name: g.data_ptr() for name, g in grads.items()} == places
            assert all(g.is_contiguous() for g in grads.values())
        found.append((work.groups, len(work.heads["key"])))
        return grads

    in_double(monkeypatch)
    monkeypatch.setattr(attention, "PART_BYTES", 1)
    monkeypatch.setattr(attention.AttentionBackward, "run", noted)
    return found


@pytest.mark.parametrize("dense", [(), (0, 3)], ids=["", "dense ends"])
@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", HEADS)
def test_groups_change_nothing(family, mode, kv, dense, seen):
    """Every parameter trainable, with grouped and single heads, normed and not; some layers dense, and loss rows."""
    model = small(family)
    plan = plan_of(model, mode, kv, dense)
    assert_equal_engines(model, plan, batch(48, supervised_from=30), recompute="layer")
    grouped = seen.count((HEADS[family],) * 2)
    assert grouped == (len(dense) if mode in CONSTANT else 4)
    assert seen.count((1, 1)) == HEADS[family] * grouped, "a head at a time"


@pytest.mark.parametrize("forward", SEEN)
@pytest.mark.parametrize("family", HEADS)
def test_local_rows(family, forward, seen):
    """Rows that attend locally and those that see all keys have their gradients added, head by head."""
    model = small(family)
    plan = windowed(model, 1.0, "keys", "all", local_forward=forward)
    plan = replace(plan, layers=tuple(replace(x, backward_ratio=0.6) for x in plan.layers))
    assert_equal_engines(model, plan, marked(), recompute="layer")
    assert seen.count((HEADS[family],) * 2) == 4


@pytest.mark.parametrize("family", HEADS)
def test_far_samples(family, seen, monkeypatch):
    """All heads draw the same keys."""
    monkeypatch.setattr(far, "FAR_STRIPE", 8)
    model = small(family)
    assert_equal_engines(model, sampled(model), batch(64, supervised_from=56), recompute="layer")
    assert seen.count((HEADS[family],) * 2) == 4


@pytest.mark.parametrize(
    ("recompute", "offload"), [("none", False), ("mlp", False), ("lin", False), ("lin", "keys"), ("layer", "keys")]
)
def test_heads_that_are_kept_are_not_spent(recompute, offload, seen):
    """Nor those that come back from the host; layers without any there are as ever."""
    model = small("llama")
    assert_equal_engines(model, plan_of(model, "exact keys"), batch(48), recompute=recompute, offload=offload)
    assert seen == [(1, 2)] * 4


def test_one_group_is_as_without(seen, monkeypatch):
    """Bit for bit: work that fits into one piece is not cut."""
    model, found = small("llama"), []
    for size in (1 << 20, 1 << 40):
        monkeypatch.setattr(attention, "PART_BYTES", size)
        found.append(run(model, plan_of(model, "skip"), batch(48), "fused", recompute="layer")[1])
    assert seen == [(1, 2)] * 8
    assert all(torch.equal(found[0][name], gradient) for name, gradient in found[1].items())


@pytest.mark.parametrize("kv_heads", [1, 2, 6, 8, 32])
def test_groups_divide_the_heads(kv_heads, monkeypatch):
    """As few as the size allows; a head at a time when even that is more."""
    monkeypatch.setattr(attention, "PART_BYTES", 1000)
    for size in range(0, 40_000, 250):
        groups = attention.head_groups(kv_heads, size // 2, size // 2 // attention.QUERY_BYTES)
        assert kv_heads % groups == 0
        whole = size // 2 + size // 2 // attention.QUERY_BYTES * attention.QUERY_BYTES
        assert whole <= 1000 * groups or groups == kv_heads
        fewer = [n for n in range(1, groups) if kv_heads % n == 0]
        assert all(whole > 1000 * n for n in fewer)
