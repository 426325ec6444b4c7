"""Methods of the training benchmark have names that people read, and no two of them the same."""

from __future__ import annotations

import pytest

from benchmarks.training_presets import presets
from lemo.report.method_names import name_method


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("liger", "Liger, fp32 adapters"),
        ("liger:adapter=model,recompute=layer", "Liger, recompute"),
        ("lemo:keep=0.3,kv=kept,share=0.3,recompute=none", "lemo, 30 % of rows, kv kept"),
        (
            "lemo:keep=0.5,kv=kept,engine=generic,recompute=layer",
            "lemo, 50 % of rows, kv kept, recompute layer, generic engine",
        ),
        (
            "lemo:keep=0.12,forward=1.0,gradient=keys,scorer=recent,kv=all,dense=,share=0.12,local=0.25,span=1024,"
            "context=1024,offload=1,recompute=lin",
            "lemo, 12 % far + 25 % local loss rows, window 1,024, recompute lin, offload",
        ),
        ("liger:adapter=model,recompute=layer,bits=4", "Liger, recompute, 4-bit base"),
        ("lemo:keep=0.5,kv=kept,offload=keys", "lemo, 50 % of rows, kv kept, offload of keys too"),
        (
            "lemo:keep=0.5,kv=kept,recompute=mlp,last=all",
            "lemo, 50 % of rows, kv kept, recompute mlp, last layer on all rows",
        ),
        ("lemo:keep=0.2,forward=1.0,gradient=pairs", "lemo, 20 % far loss rows, gradient=pairs"),
    ],
)
def test_words(method, words):
    assert name_method(method) == words


def test_no_two_methods_of_a_group_read_alike():
    for groups in presets().values():
        for group in groups:
            assert len({name_method(m) for m in group.methods}) == len(group.methods)
