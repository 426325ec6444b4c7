"""`lemo eval --retrieval`: what is asked, how it is counted, what is written, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from lemo.cli.main import app
from lemo.core.plan import Plan
from lemo.errors import ConfigError
from lemo.eval import retrieval
from lemo.eval.needle import exact_matches
from lemo.eval.retrieval import evaluate_retrieval, parse_lengths, parse_tasks
from lemo.eval.ruler import paired_prompts
from lemo.report.retrieval_page import retrieval_page
from lemo.runtime.attach import attach
from tests.report.test_run_page import check_alone
from tests.train.tiny import byte_tokenizer, save_tiny_model, tiny_llama


def lemo(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny_model(tmp_path_factory.mktemp("retrieval") / "model", layers=1, max_position_embeddings=4096)


def answered(model, prompts, *, handle=None, sparse=False):
    """Right where the fact stands in the first half."""
    return [prompt.depth < 0.5 for prompt in prompts]


def test_cells_are_the_prompts_of_their_depth(monkeypatch):
    monkeypatch.setattr(retrieval, "exact_matches", answered)
    report = evaluate_retrieval(None, byte_tokenizer(), {"passkey": 10, "single": 7}, [2000, 3000], depths=4, seed=3)
    assert list(report.rows) == [("passkey", 2000), ("passkey", 3000), ("single", 2000), ("single", 3000)]
    assert report.depths == [0.125, 0.375, 0.625, 0.875]
    for (task, _), cells in report.rows.items():
        assert [cell.accuracy for cell in cells] == [1, 1, 0, 0]
        assert sum(len(cell.right) for cell in cells) == {"passkey": 10, "single": 7}[task]
    page = retrieval_page({"dense": report, "sparse (look-ahead)": report}, "Both")
    check_alone(page)
    assert page.count('class="share"') == 2 * 16 and page.count(">100%<") == page.count(">0%<") == 16


def test_the_answers_are_those_of_exact_matches_on_paired_prompts():
    torch.manual_seed(0)
    model, tokenizer = tiny_llama(layers=1), byte_tokenizer()
    report = evaluate_retrieval(model, tokenizer, {"passkey": 4}, [256], depths=2, seed=5)
    prompts = paired_prompts(tokenizer, 256, task="passkey", count=4, seed=5, depths=2)
    assert [r for cell in report.cells for r in cell.right] == exact_matches(model, prompts)


def test_a_model_folder_is_asked_and_everything_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "exact_matches", answered)
    files = [tmp_path / "new" / f"found.{suffix}" for suffix in ("json", "html", "png")]
    outputs = [part for file in files for part in ("--output", file)]
    asked = ("--retrieval", "needle:4,passkey:6", "--lengths", "3000,2000", "--bins", 2)
    result = lemo("eval", model, *asked, *outputs, "training.seed=9")
    assert result.exit_code == 0, result.output
    assert "100%" in result.stdout and "50% of 6" in result.stdout
    found = json.loads(files[0].read_text())["dense"]
    assert found["seed"] == 9 and found["mode"] == "dense"
    assert {(c["task"], c["length"]) for c in found["cells"]} == {
        (t, n) for t in ("single", "passkey") for n in (2000, 3000)
    }
    assert all(c["accuracy"] == (c["depth"] < 0.5) for c in found["cells"])
    check_alone(files[1].read_text())
    assert files[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--retrieval", "passkey", "--lengths", "400,8192"), "8192 exceeds the model's context of 4096"),
        (("--retrieval", "passkey", "--lengths", "4k"), "'4k' is no positive number"),
        (("--retrieval", "password", "--lengths", "400"), "known are needle, passkey"),
        (("--retrieval", "passkey:4", "--lengths", "400"), "4 prompts are fewer than the 8 depths"),
        (("--retrieval", "passkey:2", "--lengths", "400"), "(--bins)"),
        (("--retrieval", "multi_key", "--lengths", "64"), "leave no room"),
        (("--lengths", "400"), "is for --retrieval"),
        (("--output", "loss.png"), "only --retrieval draws"),
    ],
)
def test_what_cannot_be_asked_is_one_line(model, arguments, part):
    result = lemo("eval", model, *arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and part in errors[0]


def test_longer_prompts_need_an_extended_context(model, monkeypatch):
    monkeypatch.setattr(retrieval, "exact_matches", answered)
    longer = ("model.context_length=8192", "model.rope_scaling=linear")
    result = lemo("eval", model, "--retrieval", "passkey:8", "--lengths", "5000", *longer)
    assert result.exit_code == 0, result.output
    assert "5,000" in result.stdout


def test_tasks_and_lengths_are_read():
    assert parse_tasks("needle, passkey:64") == {"single": 32, "passkey": 64}
    assert parse_lengths("8192,4_096,4096", None) == [4096, 8192]
    for text in ("", "passkey,passkey", "needle,single", "passkey:0", "passkey:x", "passkey:-1"):
        with pytest.raises(ConfigError):
            parse_tasks(text)
    for text in ("", "0", "-5", "1.5"):
        with pytest.raises(ConfigError):
            parse_lengths(text, None)


def test_sparse_answers_are_those_under_the_plan():
    torch.manual_seed(0)
    model, tokenizer = tiny_llama(layers=2), byte_tokenizer()
    plan = Plan.uniform(model, forward_ratio=0.5, backward_ratio=0.5, block_size=16)
    with attach(model, plan, unsafe_no_bypass=True) as handle:
        report = evaluate_retrieval(model, tokenizer, {"single": 2}, [256], depths=2, sparse=handle)
        assert report.mode.startswith("sparse") and handle.sparse_evaluations == 2
