"""A kernel that changed since it last passed on a GPU is found without one."""

from __future__ import annotations

import json

import pytest

from tests.gpu.kernel_hashes import PASSED, kernel_hashes


def test_hashes_name_every_kernel():
    hashes = kernel_hashes()
    assert "src/lemo/ops/block_score/kernel.py" in hashes and all(len(h) == 64 for h in hashes.values())


@pytest.mark.skipif(not PASSED.exists(), reason="no GPU run has been recorded yet: make test-gpu")
def test_kernels_are_those_that_passed_on_a_gpu():
    recorded = json.loads(PASSED.read_text())["sha256"]
    changed = {path for path, digest in kernel_hashes().items() if recorded.get(path) != digest}
    assert not changed, f"changed since they passed on a GPU; run `make test-gpu`: {sorted(changed)}"
