"""What lies in a run's folder: checkpoints that are whole, the date that the run began, and who is at work there."""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import json
import shutil
import subprocess
import sys
from subprocess import PIPE
from types import SimpleNamespace

import pytest

from lemo.errors import ConfigError
from lemo.eval.perplexity import evaluate_loss
from lemo.train.checkpoint import RunFolder
from lemo.train.files import locked
from lemo.train.run import train
from tests.train.test_resume import stopped
from tests.train.test_run import recipe
from tests.train.tiny import byte_tokenizer, words


def test_checkpoints_whose_files_were_cut_off_are_passed_over(base, tmp_path, screen):
    """A power cut or a full disk leaves files empty, short, or not there; the checkpoint before is good."""
    run = recipe(base, tmp_path / "run", training={"save_steps": 1})
    stopped(run, 2, screen)
    last = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    names = ["trainer_state.json", "lemo.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
    for path in [last / name for name in [*names, "adapter_model.safetensors"]]:
        whole = path.read_bytes()
        for left in (b"", whole[: len(whole) // 2], None):
            path.unlink() if left is None else path.write_bytes(left)
            opened = RunFolder.open(run, resume=True)
            readable = "" if left is None else " that can be read"
            assert opened.resume_from.name == "checkpoint-1", path
            assert opened.notes == (f"checkpoint-2 is incomplete and passed over: it has no {path.name}{readable}",)
        path.write_bytes(whole)
    assert RunFolder.open(run, resume=True).resume_from.name == "checkpoint-2"


def test_a_template_that_writes_the_date_is_resumed_the_next_day(base, tmp_path, screen, monkeypatch):
    shutil.copytree(base / "model", tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}[{{ m.role }}] {{ m.content }}<end>"
    tokenizer.chat_template += "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [[{"role": "user", "content": words(9, n)}, {"role": "assistant", "content": words(4, n)}] for n in range(9)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    data = {"train": (str(tmp_path / "chat.jsonl"),), "validation": (), "answer_only": True, "packing": True}
    sections = {"model": {"path": str(tmp_path / "model")}, "data": data, "loss_rows": {"share": 1.0}}
    run = recipe(base, tmp_path / "run", **sections)
    stopped(run, 2, screen)

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return datetime.date.fromordinal(cls.now + 1)

    Tomorrow.now = datetime.date.today().toordinal()
    monkeypatch.setattr(
        "lemo.train.chat.datetime", SimpleNamespace(date=Tomorrow, datetime=datetime.datetime, time=datetime.time)
    )
    assert train(run, evaluate_loss, resume=True, console=screen).steps == 4
    with pytest.raises(ConfigError, match="the data of the run"):  # it is the date that the run began which counts
        monkeypatch.setattr(RunFolder, "date", lambda folder: Tomorrow.today())
        stopped(dataclasses.replace(run, output=str(tmp_path / "other")), 2, screen)
        monkeypatch.setattr(RunFolder, "date", lambda folder: datetime.date(2001, 2, 3))
        train(dataclasses.replace(run, output=str(tmp_path / "other")), evaluate_loss, resume=True, console=screen)


def test_a_folder_in_which_another_process_trains_is_refused(base, tmp_path, screen):
    """Jobs that are queued again may be started while the first still runs."""
    run = recipe(base, tmp_path / "run")
    (tmp_path / "run").mkdir()
    holder = f"""
import pathlib, sys
from lemo.train.files import locked
with locked(pathlib.Path({str(tmp_path / "run")!r})):
    print("locked", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", holder], stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match="another process is training into"):
            train(run, evaluate_loss, resume="if possible", console=screen)
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.lock"}
        other.kill()  # the lock goes with it, its file stays
    assert train(run, evaluate_loss, resume="if possible", console=screen).steps == 4
    assert not (tmp_path / "run" / "run.lock").exists()
    kept = [tmp_path / "run" / "adapter", *(tmp_path / "run" / "checkpoints").iterdir()]
    for folder in kept:
        weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        assert weights.stat().st_mode & 0o777 == settings.stat().st_mode & 0o777


def test_a_lock_whose_file_was_just_taken_away_is_taken_anew(tmp_path, monkeypatch):
    """Between opening the file and locking it, the process that held it may end and remove it."""
    taken, flock = [], fcntl.flock

    def late(file, how):
        if not taken:
            taken.append((tmp_path / "run.lock").unlink())
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path):
        assert taken and (tmp_path / "run.lock").exists()
        with pytest.raises(ConfigError, match="another process is training into"), locked(tmp_path):
            pass
    assert not (tmp_path / "run.lock").exists()
