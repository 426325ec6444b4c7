"""Errors of files and of memory are one line that names the file, and exit code 1; --debug still shows where."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil

import pytest
import torch
from typer.testing import CliRunner

from lemo.cli.failures import explain_failure
from lemo.cli.main import app
from tests.train.tiny import save_tiny_model, words

RECIPE = """
output: {base}/run
model: {{path: {base}/model, dtype: float32}}
data: {{train: [{base}/train.txt], validation: [{base}/train.txt], window_tokens: 128, validation_windows: 1}}
sparsity: {{block_size: 16}}
lora: {{rank: 2}}
training: {{max_steps: 1}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model, a recipe, a run that knows nothing but its recipe, and a file where folders are asked for."""
    folder = tmp_path_factory.mktemp("failures")
    save_tiny_model(folder / "model", layers=1)
    (folder / "train.txt").write_text(words(200))
    (folder / "file").write_text("in the way")
    (folder / "recipe.yaml").write_text(RECIPE.format(base=folder))
    (folder / "done").mkdir()
    shutil.copy(folder / "recipe.yaml", folder / "done")
    (folder / "done" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    (folder / "done" / "adapter").mkdir()
    return folder


def lemo(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def failed(result, *parts):
    """Exit code 1, and one line that says all of this."""
    assert result.exit_code == 1, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.output
    for part in parts:
        assert str(part) in errors[0]


@pytest.mark.parametrize(
    ("arguments", "path", "what"),
    [
        (("train", "{}/recipe.yaml", "output={}/file/run"), "file", "cannot be created"),
        (("schema", "--output", "{}/file/s.json"), "file", "cannot be"),
        (("report", "{}/done", "--out", "{}/file/r.html"), "file", "cannot be"),
        (("report", "{}/done", "--out", "{}/done"), "done", "cannot be written (Is a directory)"),
        (("merge", "{}/done", "--out", "{}/file/merged"), "file", "cannot be"),
        (("eval", "{}/recipe.yaml", "--output", "{}/file/e.json"), "file", "cannot be"),
        (("inspect", "{}/recipe.yaml", "--samples", "1", "--out", "{}/file/i.html"), "file", "cannot be"),
        (("init", "{}/model", "{}/train.txt", "--out", "{}/file/r.yaml"), "file", "cannot be"),
    ],
)
def test_what_cannot_be_written_is_named(base, arguments, path, what):
    failed(lemo(*(part.format(base) for part in arguments)), base / path, what)


def test_nothing_is_left_of_a_trial_to_write(base, tmp_path):
    """A run without weights of an adapter cannot be merged; the folder that could have been written is not there."""
    lemo("merge", base / "done", "--out", tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_debug_raises_it(base):
    result = lemo("--debug", "schema", "--output", base / "file" / "s.json")
    assert isinstance(result.exception, OSError)


def test_weights_that_were_cut_off_are_named(base, tmp_path):
    shutil.copytree(base / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    failed(lemo("eval", base / "recipe.yaml", f"model.path={tmp_path}/model"), weights, "damaged or was cut off")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), MemoryError()])
def test_out_of_memory_points_to_the_estimate(base, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("lemo.train.run.train", full)
    failed(lemo("train", base / "recipe.yaml"), "out of memory", "lemo estimate")


def test_other_errors_keep_their_traceback(base, monkeypatch):
    def wrong(*_, **__):
        raise KeyError("nobody's fault but ours")

    monkeypatch.setattr("lemo.train.run.train", wrong)
    assert isinstance(lemo("train", base / "recipe.yaml").exception, KeyError)
    assert explain_failure(BrokenPipeError(32, "pipe")) is None


@pytest.mark.parametrize(("device", "part"), [("foo", "foo"), ("meta", "no numbers"), ("cuda:99", "--device cuda:99")])
def test_a_device_that_is_not_there_is_named(base, tmp_path, device, part):
    result = lemo("merge", base / "done", "--out", tmp_path / "merged", "--device", device)
    assert result.exit_code == 2 and "error: --device" in result.stderr and part in result.stderr


def during_training(monkeypatch, work):
    """`lemo train` does this, and nothing else."""
    monkeypatch.setattr("lemo.train.run.train", lambda *_, **__: work())


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_under_weights_is_no_damaged_file(base, tmp_path, monkeypatch):
    """The error of safetensors is the same for both but for its text."""
    import safetensors.torch

    def full(*_, **__):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "serialize_file", full)
    path = tmp_path / "adapter_model.safetensors"
    during_training(monkeypatch, lambda: safetensors.torch.save_file({"a": torch.zeros(2)}, path))
    result = lemo("train", base / "recipe.yaml")
    failed(result, f"{path} cannot be written: the disk is full")
    assert "damaged" not in result.stderr


def test_weights_that_cannot_be_written_are_no_damaged_file(base, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    during_training(monkeypatch, lambda: save_file({"a": torch.zeros(2)}, tmp_path / "absent" / "a.safetensors"))
    result = lemo("train", base / "recipe.yaml")
    failed(result, "cannot be written")
    assert "damaged" not in result.stderr


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0",
        "PytorchStreamWriter failed writing file data/0: file write failed",
        "basic_ios::clear: iostream error",
    ],
)
def test_a_state_that_torch_cannot_write_is_named(base, tmp_path, monkeypatch, text):
    def full(*_, **__):
        raise RuntimeError(text)

    monkeypatch.setattr(torch.serialization, "_save", full)
    during_training(monkeypatch, lambda: torch.save({}, tmp_path / "optimizer.pt"))
    failed(lemo("train", base / "recipe.yaml"), f"{tmp_path}/optimizer.pt cannot be written: the disk may be full")


def test_a_full_disk_behind_an_open_file_names_it(base, tmp_path, monkeypatch):
    def write():
        with (tmp_path / "metrics.jsonl").open("w") as file:
            no_space(file)

    during_training(monkeypatch, write)
    failed(lemo("train", base / "recipe.yaml"), f"{tmp_path}/metrics.jsonl cannot be written: the disk is full")


def test_a_full_disk_in_a_copy_names_the_copy(base, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "_USE_CP_SENDFILE", False)
    monkeypatch.setattr(shutil, "copyfileobj", no_space)
    during_training(monkeypatch, lambda: shutil.copyfile(base / "train.txt", tmp_path / "copy.txt"))
    failed(lemo("train", base / "recipe.yaml"), f"{tmp_path}/copy.txt cannot be written: the disk is full")


def test_a_full_disk_without_any_path_is_still_said(base, monkeypatch):
    during_training(monkeypatch, no_space)
    failed(lemo("train", base / "recipe.yaml"), "cannot be written: the disk is full")


@pytest.mark.parametrize("kind", ["empty", "pickled", "gzip"])
def test_a_file_that_ends_too_early_is_named(base, tmp_path, monkeypatch, kind):
    """Click would say no more than that it aborted."""
    path = tmp_path / "state"
    if kind == "gzip":
        path.write_bytes(gzip.compress(words(200).encode())[:100])
    else:
        torch.save({"a": torch.zeros(100)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[: 50 if kind == "pickled" else 0])

    def work():
        if kind != "gzip":
            return torch.load(path)
        with gzip.open(path) as file:
            return file.read()

    during_training(monkeypatch, work)
    result = lemo("train", base / "recipe.yaml")
    failed(result, f"{path} ends too early")
    assert "Aborted" not in result.output
    debugged = lemo("--debug", "train", base / "recipe.yaml")
    assert isinstance(debugged.exception, RuntimeError) and isinstance(debugged.exception.__cause__, EOFError)


def test_a_state_that_was_cut_off_is_named():
    for where in ("", "[enforce fail at inline_container.cc:145] . "):  # which is also where it writes
        error = RuntimeError(f"{where}PytorchStreamReader failed reading zip archive: failed finding central directory")
        assert "cut off" in explain_failure(error)


def test_an_interrupt_is_no_failure(base, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lemo.train.run.train", stop)
    result = lemo("train", base / "recipe.yaml")
    assert result.exit_code == 130 and "error: " not in result.output
