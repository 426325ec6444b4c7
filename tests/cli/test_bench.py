"""`lemo bench` on a tiny model: every variant is timed, or its row says why not."""

from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

import lemo.cli.bench
from lemo.cli.main import app
from lemo.train.sources import write_npz
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


def test_a_share_that_no_layer_can_skip_is_a_note_and_no_row(folder):
    result = run(folder, "--tokens", 128, "--steps", 2, "--keep", 0.5, "--layers", 2)
    assert result.exit_code == 0, result.output
    assert set(rows(result.stdout)) == {"dense", "dense, layers recomputed"}
    assert "keep 0.5: the first and last layer run densely" in result.stderr


@pytest.mark.parametrize("verb", ["bench", "estimate", "init"])
@pytest.mark.parametrize(
    ("config", "words"),
    [('{"model_type": "zork"}', "zork"), ('{"model_ty', "JSON"), ('{"model_type": "vit"}', "no causal language model")],
)
def test_a_folder_that_holds_no_model_is_one_line(tmp_path, verb, config, words):
    (tmp_path / "config.json").write_text(config)
    data = [str(tmp_path / "d.npz")] if verb == "init" else []
    for path in data:
        write_npz(path, [[1, 2, 3]])
    result = CliRunner().invoke(app, [verb, str(tmp_path), *data])
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert result.stderr.count("error: ") == 1 and words in result.stderr and str(tmp_path) in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-shape"], "llama2-7b"),
        (["smollm2-135m", "--layers", "99"], "[1, 30]"),
        (["smollm2-135m", "--dtype", "int8"], "bfloat16, float16, float32, float64"),
        (["smollm2-135m", "--dtype", "Tensor"], "--dtype Tensor"),
    ],
)
def test_mistakes_are_one_line(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.output
