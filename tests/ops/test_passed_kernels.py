"""A kernel that changed since it last passed on a GPU is named in the summary of every test run without one."""

from __future__ import annotations

import json

import pytest

from tests.gpu.kernel_hashes import PASSED, kernel_hashes

RECORDED = json.loads(PASSED.read_text())["sha256"] if PASSED.exists() else {}


def test_hashes_name_every_kernel():
    hashes = kernel_hashes()
    assert "src/lemo/ops/block_score/kernel.py" in hashes and all(len(h) == 64 for h in hashes.values())
    assert set(RECORDED) <= set(hashes), "a kernel that is gone is still recorded; run `make test-gpu`"


@pytest.mark.parametrize("path", sorted(kernel_hashes()))
def test_kernel_is_the_one_that_passed_on_a_gpu(path):
    """Skipped, with the reason shown, for a kernel that only a machine with a GPU can vouch for."""
    if RECORDED.get(path) != kernel_hashes()[path]:
        pytest.skip(f"{path} has no green run on a GPU since it changed: `make test-gpu`")
