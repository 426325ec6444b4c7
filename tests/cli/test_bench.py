"""`lemo bench` on a tiny model: every variant is timed, or its row says why not."""

from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

import lemo.cli.bench
from lemo.cli.main import app
from tests.train.tiny import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "tiny-model"
    tiny_llama().config.save_pretrained(path)
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *(str(a) for a in arguments)], env={"COLUMNS": "200"})


def rows(output):
    """Table rows by variant, as lists of cells."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if cells[0].startswith(("dense", "lemo,"))}


def test_every_variant_has_a_time_and_its_share_of_rows(folder):
    result = run(folder, "--tokens", 512, "--steps", 2, "--keep", 0.5)
    assert result.exit_code == 0, result.output
    found = rows(result.stdout)
    assert len(found) == 4 and "tiny-model, 512 tokens, cpu, float32" in result.stdout
    for name, (milliseconds, _, share, gain) in found.items():
        assert float(milliseconds) > 0 and gain.endswith("x")
        # 8 blocks; the first and last of 3 layers run all, the middle one half of them.
        assert share == ("100%" if name.startswith("dense") else "83%")


def test_out_of_memory_is_a_row_and_the_others_still_run(folder, monkeypatch):
    plain = lemo.cli.bench.Runner._step

    def step(self):
        if not self.model.get_base_model().is_gradient_checkpointing:
            raise torch.OutOfMemoryError("not enough")
        plain(self)

    monkeypatch.setattr(lemo.cli.bench.Runner, "_step", step)
    result = run(folder, "--tokens", 256, "--steps", 2, "--keep", 0.5)
    assert result.exit_code == 0, result.output
    found = rows(result.stdout)
    assert found["dense"] == ["out of memory"]
    assert float(found["dense, layers recomputed"][0]) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["no-such-shape"], "llama2-7b"), (["smollm2-135m", "--layers", "99"], "[1, 30]")],
)
def test_mistakes_are_one_line(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.output
