"""The retrieval benchmark runs on a tiny model: paired prompts, sound Records, resumable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import check_bars, retrieval
from lemo.measure.record import read_records
from tests.train.tiny import byte_tokenizer, save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def _options(model: Path, tmp_path: Path, *more: str) -> list[str]:
    places = ["--model", str(model), "--tokenizer", str(model), "--plans", str(tmp_path / "plans")]
    sizes = ["--length", "512", "--steps", "2", "--batch", "2", "--rank", "2", "--train-prompts", "8"]
    asked = ["--prompts", "6", "--depths", "3", "--predictor-steps", "5", "--tasks", "passkey,two_hop"]
    return [*places, *sizes, *asked, "--dtype", "float32", "--device", "cpu", "--out", str(tmp_path / "r.jsonl"), *more]


def test_cells_are_written_once(model: Path, tmp_path: Path):
    options = _options(model, tmp_path, "--methods", "untrained,dense,skip,words_alone_12")
    assert retrieval.main(options) == 0
    records = {r.name: r for r in read_records(tmp_path / "r.jsonl")}
    for task in ("passkey", "two_hop"):
        for what in ("skip/{}/dense", "skip/{}/sparse", "dense/{}/no_context", "untrained/{}/dense"):
            samples = records["retrieval/" + what.format(task)].samples
            assert len(samples) == 6 and set(samples) <= {0.0, 1.0}
    assert records["retrieval/skip/forward_share"].value < 1
    assert check_bars.main([str(tmp_path / "r.jsonl")]) == 0
    count = len(read_records(tmp_path / "r.jsonl"))
    assert retrieval.main(options) == 0 and len(read_records(tmp_path / "r.jsonl")) == count


def test_training_prompts_are_not_those_that_are_asked(model: Path, tmp_path: Path):
    study = retrieval.Runner(retrieval.read_options(_options(model, tmp_path))).study
    for task in ("passkey", "two_hop"):
        asked = {p.tokens_T.tobytes() for p in study.prompts(task, 6, 3)}
        trained = {w.tokens_T.astype(np.int64).tobytes() for w in study.windows(task, "train", 512).windows}
        assert len(asked) == 6 and not asked & trained
    tokenizer = byte_tokenizer()
    window = retrieval.RetrievalStudy.windows(study, "single", "train", 1024).windows[0]
    learned = tokenizer.decode(window.tokens_T[window.learned_T].tolist())
    assert len(learned.split()) == 4, "several questions a prompt while training"


def test_gaps_count_misses_of_the_same_prompts(model: Path, tmp_path: Path, capsys):
    runner = retrieval.Runner(retrieval.read_options(_options(model, tmp_path)))
    right = {"dense": [1.0] * 5 + [0.0], "skip": [1.0] * 4 + [0.0, 1.0]}
    for name, found in right.items():
        for task in ("passkey", "two_hop"):
            runner.ask(name, runner.setting(name), 0, f"{task}/dense", found)
    for task, blind in (("passkey", [0.0] * 6), ("two_hop", [1.0] * 6)):
        runner.ask("dense", runner.setting("dense"), 0, f"{task}/no_context", blind)
    retrieval.compare(tmp_path / "r.jsonl")
    gap = next(r for r in read_records(tmp_path / "r.jsonl") if r.name == "retrieval/skip/gap/dense")
    assert gap.setting["tasks"] == ["passkey"], "what can be guessed does not count"
    assert gap.samples == {"baseline": [0.0] * 5 + [100.0], "lemo": [0.0] * 4 + [100.0, 0.0]}
    assert gap.value > 0, "no gap in the mean, but an error"
    assert "+0.00 points" in capsys.readouterr().out
