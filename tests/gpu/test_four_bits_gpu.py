"""Base weights of 4 bits on a GPU: the fused engine gives what it gives for the unpacked weights."""

from __future__ import annotations

import pytest
import torch

from tests.runtime.oracle import batch
from tests.runtime.test_four_bits import assert_close, pair
from tests.runtime.test_fused import plan_of, run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("recompute", ["none", "lin"])
@pytest.mark.parametrize(("mode", "kv"), [("skip", "kept"), ("exact keys", "all")])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_fused_engine_unpacks(family, mode, kv, recompute):
    """Bit for bit, in bf16."""
    pytest.importorskip("bitsandbytes")
    packed, plain = pair(family, torch.bfloat16, "cuda")
    plan, inputs = plan_of(packed, mode, kv), {name: x.cuda() for name, x in batch(192).items()}
    wanted = run(plain, plan, inputs, "fused", recompute=recompute)
    assert_close(run(packed, plan, inputs, "fused", recompute=recompute), wanted, 0.0)
