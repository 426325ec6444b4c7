"""`lemo train` in two gloo processes: the run of one process with twice the accumulation, and outputs written once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from lemo.errors import ConfigError
from lemo.eval.perplexity import evaluate_loss
from lemo.train.distributed import PeerError, Processes
from lemo.train.run import train
from tests.distributed.test_wrapped import run_ranks
from tests.distributed.train_worker import WORLD, alone, prepare, recipe
from tests.runtime.oracle import relative


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where both processes left their runs; they run once for all tests of this file, on all xdist workers."""
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    folder = shared / "train-ranks"
    with FileLock(shared / "train-ranks.lock"):
        if not folder.exists():
            folder.mkdir()
            prepare(folder)
            run_ranks(folder, "tests.distributed.train_worker")
            (folder / "alone.json").write_text(json.dumps(alone(folder)))
    return folder


def results(folder: Path, name: str) -> list[dict]:
    """What both processes returned."""
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(WORLD)]


def good(folder: Path, name: str) -> list[dict]:
    """The same, of a run in which nothing failed."""
    found = results(folder, name)
    assert not any("error" in one for one in found), found[0].get("trace") or found[1].get("trace")
    return found


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def metrics(folder: Path, key: str) -> list[float]:
    """Values of one key of the log, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def test_two_processes_are_one_with_twice_the_accumulation(folder):
    """Loss curve, validation during and around training, and weights; to fp32 rounding."""
    first, second = good(folder, "whole")
    single = json.loads((folder / "alone.json").read_text())
    assert first["steps"] == single["steps"] == 4
    assert set(first["losses"]) == set(single["losses"]) and len(first["losses"]) == 6
    for name, nats in single["losses"].items():
        assert first["losses"][name] == second["losses"][name] == pytest.approx(nats, rel=2e-5)
    for key, count in (("loss", 4), ("eval_loss", 2)):
        got = metrics(folder / "whole", key)
        assert len(got) == count and got == pytest.approx(metrics(folder / "alone", key), rel=2e-5)
    assert metrics(folder / "whole", "loss")[0] != metrics(folder / "whole", "loss")[3]
    got, wanted = adapter_of(folder / "whole"), adapter_of(folder / "alone")
    assert got.keys() == wanted.keys()
    assert all(relative(got[name], wanted[name]) <= 1e-3 for name in wanted)


def test_rows_of_prompts_weigh_the_same_however_a_step_is_parted(folder):
    """Two processes, one with twice the accumulation, and one with batches of two; answers are short and long."""
    good(folder, "asked")
    batch = adapter_of(folder / "asked-batch")
    for name in ("asked", "asked-alone"):
        assert metrics(folder / name, "loss") == pytest.approx(metrics(folder / "asked-batch", "loss"), rel=2e-5)
        got = adapter_of(folder / name)
        assert all(relative(got[key], batch[key]) <= 1e-3 for key in batch)


def test_reports_are_in_the_order_of_the_data(folder):
    """Windows that the processes shared come back in order, with all tokens counted."""
    report = good(folder, "whole")[0]["evaluations"]["dense before"]
    single = json.loads((folder / "alone.json").read_text())["evaluations"]["dense before"]
    assert report["tokens"] == single["tokens"] and len(report["by_sequence"]) == 3
    assert report["by_sequence"] == pytest.approx(single["by_sequence"], rel=1e-6)
    assert [x["tokens"] for x in report["by_position"]] == [x["tokens"] for x in single["by_position"]]


def test_outputs_are_written_and_said_once(folder):
    """The second process prints nothing; the log has one line per step; the plan was made once."""
    first, second = good(folder, "whole")
    assert "adapter in" in first["screen"] and second["screen"] == ""
    assert len(metrics(folder / "whole", "loss")) == 4
    assert {p.name for p in (folder / "whole").iterdir()} == {p.name for p in (folder / "alone").iterdir()}
    summary = json.loads((folder / "whole" / "summary.json").read_text())
    assert summary["processes"] == WORLD and summary["losses"] == first["losses"]
    again = results(folder, "again")
    assert "finished" in again[0]["error"]
    assert again[1]["error"].startswith("PeerError: process 0 of 2 stopped: FinishedRunError")
    # A job that was queued once more is told so in every process, and none fails for another's sake.
    assert all(result["error"].startswith("FinishedRunError") for result in results(folder, "requeued"))


def test_a_signal_to_one_process_stops_both_at_the_same_step_and_the_run_resumes_to_the_same_bits(folder):
    cut = good(folder, "cut")
    assert [(one["interrupted"], one["steps"]) for one in cut] == [(True, 2), (True, 2)]
    resumed = good(folder, "resumed")
    assert [(one["interrupted"], one["steps"]) for one in resumed] == [(False, 4), (False, 4)]
    assert resumed[0]["losses"] == good(folder, "whole")[0]["losses"]
    got, wanted = adapter_of(folder / "cut"), adapter_of(folder / "whole")
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_an_error_of_one_process_ends_both(folder):
    first, second = results(folder, "failing")
    assert second["error"] == "OSError: no room"
    assert first["error"] == "PeerError: process 1 of 2 stopped: OSError: no room"
    assert not (folder / "failing" / "adapter").exists()


def test_a_run_is_resumed_by_as_many_processes_as_began_it(folder, tmp_path):
    """A checkpoint's place in the data is that of its number of processes."""
    run = recipe(folder, "failing")
    checkpoint = folder / "failing" / "checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True, exist_ok=True)
    for name in ("trainer_state.json", "lemo.json"):
        (checkpoint / name).write_text("{}")
    with pytest.raises(ConfigError, match="has 2 processes, not 1"):
        train(run, evaluate_loss, resume=True)


def test_a_single_process_has_nobody_to_talk_to():
    alone = Processes()
    with alone.together():
        assert alone.gather(3) == [3] and alone.from_main(lambda: 4) == 4
        assert alone.any(True, False) == (True, False) and list(alone.share([1, 2, 3])) == [1, 2, 3]
    assert alone.is_main and alone.trainer_arguments() == {} and alone.device is None
    with pytest.raises(PeerError), alone.together():
        raise PeerError("process 1 of 2 stopped")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
def test_threads_of_the_group_have_ended_when_a_run_ends():
    """One that outlives the interpreter's lock ends the process by a signal, after all has gone well."""
    script = """
import os
import socket
import subprocess
import sys
from lemo.train.distributed import Processes
processes = Processes.start()
assert processes.gather(os.environ["RANK"]) == ["0", "1"]
before = len(os.listdir("/proc/self/task"))
processes.close()
assert processes.group is None and len(os.listdir("/proc/self/task")) <= before - 4, before
"""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    names = {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen([sys.executable, "-c", script], env={**os.environ, **names, "RANK": rank, "LOCAL_RANK": rank})
        for rank in map(str, range(WORLD))
    ]
    assert [process.wait(timeout=120) for process in started] == [0] * WORLD
