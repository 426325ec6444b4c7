"""DDP and FSDP2 on two gloo processes, attached before and after wrapping, against plain wrapping and one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.distributed.worker import ORDERS, PLANS, WORLD, WRAPPERS
from tests.runtime.oracle import relative

ROOT = Path(__file__).resolve().parents[2]
SPARSE = [plan for plan in PLANS if plan != "keep_all"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both ranks saw, by scenario; the processes run once for all tests of this file, on all xdist workers."""
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    folder = shared / "ranks"
    with FileLock(shared / "ranks.lock"):
        if not folder.exists():
            folder.mkdir()
            run_ranks(folder)

    def load(name: str) -> list[dict]:
        found = [torch.load(folder / f"{name}.{rank}.pt") for rank in range(WORLD)]
        for one in found:
            assert "error" not in one, one["error"]
        return found

    return load


def run_ranks(folder: Path, worker: str = "tests.distributed.worker") -> None:
    """Both processes, to their end."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", "-m", worker]
    ranks, logs = [], [folder / f"stderr.{rank}" for rank in range(WORLD)]
    try:
        for rank in range(WORLD):
            with logs[rank].open("w") as log:
                ranks.append(
                    subprocess.Popen(
                        [*command, str(rank), str(folder)],
                        cwd=ROOT,
                        env=environment,
                        stdout=subprocess.DEVNULL,
                        stderr=log,
                    )
                )
        codes = [rank.wait(timeout=400) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * WORLD, "\n".join(log.read_text()[-4000:] for log in logs)


def assert_same_gradients(got, wanted, bound):
    assert got.keys() == wanted.keys()
    scale = torch.stack([g.norm() for g in wanted.values()]).norm()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= bound * scale, name


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_keep_all_is_the_plain_wrapped_model(results, wrapper, order):
    """Bit for bit with the model's own loss, within fp32 rounding with the segmented one, on every rank."""
    wanted = results(f"{wrapper}-plain")
    for loss, bound in (("model", 0.0), ("segmented", 1e-5)):
        for mine, plain in zip(results(f"{wrapper}-{order}-keep_all-{loss}"), wanted, strict=True):
            assert relative(mine["loss"], plain["loss"]) <= bound
            assert_same_gradients(mine["gradients"], plain["gradients"], bound)


@pytest.mark.parametrize("plan", SPARSE)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_selection_is_one_process_on_the_whole_batch(results, wrapper, order, plan):
    """Loss and gradients, and each layer is called once, so that its weights are gathered once."""
    ranks, alone = results(f"{wrapper}-{order}-{plan}-segmented"), results(f"alone-{plan}")[0]
    assert relative(sum(rank["loss"] for rank in ranks), alone["loss"]) <= 1e-5
    for rank in ranks:
        assert rank["sparse"] == 1
        assert all(runs == 1 for runs in rank["runs"])
        assert_same_gradients(rank["gradients"], alone["gradients"], 1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_a_head_sharded_by_itself_is_called_once(results, order):
    """Ranks of different lengths have different numbers of loss segments: the model's own loss runs, and it is said."""
    ranks, alone = results(f"fsdp2_head-{order}"), results("alone-skip_all")[0]
    assert relative(sum(rank["loss"] for rank in ranks), alone["loss"]) <= 1e-5
    for rank in ranks:
        assert any("LM head is sharded" in note for note in rank["notes"])
        assert_same_gradients(rank["gradients"], alone["gradients"], 1e-5)


@pytest.mark.parametrize("plan", ["skip_all", "rows"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_rank_runs_every_layer_although_one_has_nothing_to_skip(results, wrapper, order, plan):
    """A rank whose batch is all supervised runs densely; collectives match and the gradients are right."""
    ranks = results(f"{wrapper}-{order}-{plan}-one_dense")
    alone = results(f"alone-{plan}-one_dense")[0]
    assert [rank["sparse"] for rank in ranks] == [1, 0]
    assert [rank["dense"] for rank in ranks] == [0, 1]
    assert relative(sum(rank["loss"] for rank in ranks), alone["loss"]) <= 1e-5
    for rank in ranks:
        assert all(runs == 1 for runs in rank["runs"])
        assert_same_gradients(rank["gradients"], alone["gradients"], 1e-5)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_checkpointing_changes_no_gradient(results, wrapper):
    for mine, wanted in zip(
        results(f"{wrapper}-checkpointed"), results(f"{wrapper}-after-skip_all-segmented"), strict=True
    ):
        assert torch.equal(mine["loss"], wanted["loss"])
        assert_same_gradients(mine["gradients"], wanted["gradients"], 0.0)


def test_steps_lead_to_the_same_weights_however_wrapped(results):
    """Two optimizer steps with accumulation: DDP and FSDP2, attached before and after, end at the same weights."""
    runs = [results(f"{wrapper}-{order}-steps") for wrapper in WRAPPERS for order in ORDERS]
    wanted = runs[0][0]
    assert wanted["sparse"] == 4
    assert wanted["losses"][2] != wanted["losses"][0]
    for ranks in runs:
        for rank in ranks:
            for name, weight in wanted["weights"].items():
                assert relative(rank["weights"][name], weight) <= 1e-5, name


@pytest.mark.parametrize("plan", PLANS)
def test_detach_says_when_another_library_subclassed_on_top(results, plan):
    """FSDP2 changes classes too: attached before it, lemo refuses to detach; everywhere else it detaches."""
    for rank in results(f"fsdp2-before-{plan}-segmented"):
        assert rank["detach"].startswith("UnsupportedModelError: cannot detach")
        assert "fully_shard" in rank["detach"]
    for name in (f"fsdp2-after-{plan}-segmented", f"ddp-before-{plan}-segmented", f"ddp-after-{plan}-segmented"):
        for rank in results(name):
            assert rank["detach"] is None


def test_trainer_over_two_processes_with_keep_all_is_the_plain_trainer(results):
    """Counts of supervised tokens are gathered over ranks and accumulation; curve and weights are bit-equal."""
    for mine, wanted in zip(results("trainer-keep_all"), results("trainer-None"), strict=True):
        assert len(wanted["curve"]) in (0, 2)  # the main process logs
        assert mine["curve"] == wanted["curve"]
        assert all(torch.equal(mine["weights"][name], weight) for name, weight in wanted["weights"].items())


def test_trainer_over_two_processes_under_selection_keeps_ranks_alike(results):
    first, second = results("trainer-skip_all")
    assert first["sparse"] == second["sparse"] == 4
    assert all(torch.equal(second["weights"][name], weight) for name, weight in first["weights"].items())
    plain = results("trainer-None")[0]
    assert any(not torch.equal(plain["weights"][name], weight) for name, weight in first["weights"].items())
