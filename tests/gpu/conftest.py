"""After a GPU run in which every kernel test passed, the hash of each kernel.py is written down."""

from __future__ import annotations

import json

import pytest

from tests.gpu.kernel_hashes import PASSED, kernel_hashes


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    passed = (
        [r for r in reporter.stats.get("passed", []) if "tests/gpu/test_kernels_gpu.py" in r.nodeid] if reporter else []
    )
    if exitstatus != 0 or len(passed) < 10:
        return
    import torch
    import triton

    record = {
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "tests": len(passed),
        "sha256": kernel_hashes(),
    }
    PASSED.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
