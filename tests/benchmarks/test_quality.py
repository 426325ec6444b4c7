"""The quality grid runs on a tiny model: paired, resumable, within its budget, with sound Records."""

from __future__ import annotations

import argparse
import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import check_bars, quality, quality_answers, quality_grids
from benchmarks.quality_batches import far_copy
from benchmarks.quality_compare import Cells, domain_means
from benchmarks.quality_costs import equal_steps, gain_at_64k, sequence_flops
from benchmarks.quality_grids import _RANKED as RANKED
from benchmarks.quality_grids import GRIDS, Cell
from benchmarks.quality_methods import METHODS, dense_twin
from benchmarks.quality_study import Protocol, QualityStudy
from lemo.cli.presets import PRESETS
from lemo.measure.record import read_records
from lemo.ops.attend_rows import far
from lemo.train.data import write_npz
from tests.train.tiny import byte_tokenizer, save_tiny_model

WINDOW = 512


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tiny model and random tokens of two domains."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, max_position_embeddings=256)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    for domain in ("books", "code"):
        for split, windows in (("train", 7), ("validation", 2)):
            write_npz(folder / f"{domain}-{split}.npz", [generator.integers(0, 64, WINDOW * windows)])
    return folder


def _options(inputs: Path, out: Path, grid: str, *more: str) -> list[str]:
    sizes = ["--window", str(WINDOW), "--batch", "2", "--rank", "2", "--dtype", "float32", "--device", "cpu"]
    counts = ["--validation-windows", "2", "--calibration-windows", "1", "--predictor-steps", "10"]
    places = ["--model", str(inputs / "model"), "--data", str(inputs), "--plans", str(inputs / "plans")]
    return ["run", grid, *places, "--out", str(out), "--domains", "books,code", *sizes, *counts, *more]


def _study(inputs: Path, **changes) -> QualityStudy:
    sizes = {"window": WINDOW, "rank": 2, "dtype": "float32", "calibration_windows": 1, "predictor_steps": 10}
    protocol = Protocol(domains=("books", "code"), validation_windows=2, **sizes, **changes)
    return QualityStudy(inputs / "model", inputs, inputs / "plans", protocol, "cpu")


def test_a_grid_runs_resumes_and_compares(inputs: Path, tmp_path: Path, capsys, monkeypatch):
    out = tmp_path / "r.jsonl"
    cells = [
        *quality_grids._sweep(2),
        *(
            Cell(n, s, 2)
            for s in (0, 1)
            for n in ("dense_rows_balanced", "balanced", "skip_30_all_predictor", "skip_30_all_random")
        ),
    ]
    monkeypatch.setitem(GRIDS, "pilot", [*cells, Cell("before", 0, 2)])
    options = _options(inputs, out, "pilot", "--started-seconds", "0")
    assert quality.main([*options, "--seeds", "0", "--only", "dense_all"]) == 0
    assert quality.main([*options, "--budget-seconds", "0"]) == 0
    shown = capsys.readouterr().out
    assert "9 cells left" in shown and shown.count("done before") == 4, "the sweep is done, nothing else may start"
    assert quality.main(options) == 0
    records = read_records(out)
    assert sum(r.name.endswith("/cell_seconds") for r in records) == len(cells) + 1
    for record in (r for r in records if r.name == "quality/balanced/sparse"):
        assert record.setting["window_order"] == ["books"] * 2 + ["code"] * 2 and len(record.samples) == 4
    pooled = next(r for r in records if r.name == "quality/skip_30_all_predictor/gap/skip_30_all_random/dense")
    assert len(pooled.samples["lemo"]) == 4 and pooled.bar is None, "two steps are no published figure"
    assert check_bars.main([str(out)]) == 0

    capsys.readouterr()
    assert quality.main(options) == 0
    assert capsys.readouterr().out.count("done before") == len(cells) + 1
    assert len(read_records(out)) == len(records), "nothing is written twice"


def test_later_choices_leave_the_hashes_of_earlier_cells():
    assert "context_window" not in METHODS["far_12"].setting()["plan"]
    assert METHODS["window_512"].setting()["plan"]["context_window"] == 512
    assert "context_window" not in METHODS["far_12"].plan.fit and METHODS["window_512_30"].loss_share == 0.3
    assert "far_share" not in METHODS["far_12"].setting()["plan"]
    mixed = METHODS["far_25_rows_42_window_2048"]
    assert mixed.setting()["plan"]["far_share"] == 0.25 and mixed.loss_share == 0.42
    assert gain_at_64k(METHODS["far_25_rows_12"])["llama-3-8b"] > gain_at_64k(METHODS["far_12"])["llama-3-8b"]
    assert gain_at_64k(METHODS["window_512"])["llama-3-8b"] > gain_at_64k(METHODS["far_12"])["llama-3-8b"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_gain_or_none(name):
    gains = gain_at_64k(METHODS[name])
    assert set(gains) in (set(), {"llama-3-8b", "llama-2-7b"})


def test_local_loss_rows_count_by_their_kind():
    few, local, many = METHODS["window_1024"], METHODS["balanced"], METHODS["dense_rows_balanced"]
    assert "local_share" not in few.setting() and local.setting()["local_share"] == 0.25
    assert (local.loss_share, local.plan.backward_ratio, local.plan.context_window) == (0.12, 0.12, 1024)
    gains = [gain_at_64k(method)["llama-3-8b"] for method in (few, local, METHODS["window_1024_30"])]
    assert gains[0] > gains[1] > gains[2], "12 %, 12 % and 25 % local ones, 30 %"
    shape, sizes = quality.SMOLLM2, (16384, 16)
    costs = [sequence_flops(m, shape, *sizes) for m in (few, local, many)]
    assert costs[0] < costs[1] < costs[2] and dense_twin("balanced") == "dense_rows_balanced"


def test_local_rows_that_see_all_cost_their_forward():
    """Between local loss rows and far ones; hashes of cells without them stay."""
    near, wide, far = (METHODS[name] for name in ("balanced", "near_grad_12_25", "all_far_window"))
    gains = [gain_at_64k(method)["llama-3-8b"] for method in (near, wide, far)]
    assert gains[0] > gains[1] > gains[2]
    assert wide.setting()["plan"].pop("local_forward") == "all" and "local_forward" not in near.setting()["plan"]
    assert dense_twin("near_grad_12_25") == "dense_rows_balanced"


def test_far_rows_are_drawn_as_without_local_ones(inputs: Path):
    study, (far_only, both) = _study(inputs), (METHODS[n] for n in ("window_1024", "far_drawn"))
    pairs = zip(*(study.training_batches(m, 3, 3) for m in (far_only, both)), strict=True)
    for (before,), (after,) in pairs:
        local = torch.nn.functional.pad(after["local_rows"][:, :-1], (1, 0))  # of rows, to their labels
        assert torch.equal(after["labels"].masked_fill(local, -100), before["labels"]) and local.any()
        assert "local_rows" not in before
    for (_, batch, few), (_, _, more) in zip(*(study.validation(m) for m in (far_only, both)), strict=True):
        assert more.sum() > few.sum() and not (few & ~more).any() and "local_rows" not in batch


def test_far_rows_by_repeats_leave_which_rows_carry_loss(inputs: Path):
    study = _study(inputs)
    kinds = [study.training_batches(METHODS[n], 3, 3) for n in ("far_drawn", "balanced", "dense_rows_balanced")]
    for (drawn,), (chosen,), (dense,) in zip(*kinds, strict=True):
        assert torch.equal(drawn["labels"], chosen["labels"]) and torch.equal(drawn["labels"], dense["labels"])
        assert chosen["local_rows"].any() and "local_rows" not in dense
    assert study.collator(METHODS["balanced"], 0).repeats_beyond == 1024
    assert study.collator(METHODS["far_drawn"], 0).repeats_beyond is None


def test_processes_of_one_grid_run_every_cell_once(inputs: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(GRIDS, "pilot", [Cell(n, s) for s in (0, 1) for n in ("dense_all", "balanced", *RANKED)])
    monkeypatch.setattr(quality.Grid, "done", lambda self, cell: cell == Cell("balanced", 1))
    more = ("--learning-rate", "1e-2", "--claims", str(tmp_path / "claims"))
    options = quality.read_options(_options(inputs, tmp_path / "r.jsonl", "pilot", *more))
    first, second = quality.Grid(options), quality.Grid(options)
    ran = []
    monkeypatch.setattr(second, "run_cell", lambda cell: ran.append((2, cell)))

    def run_first(cell):
        ran.append((1, cell))
        second.run() if len(ran) == 1 else None

    monkeypatch.setattr(first, "run_cell", run_first)
    assert first.run() == 0
    cells = [cell for _, cell in ran]
    assert set(cells) == set(GRIDS["pilot"]) - {Cell("balanced", 1)} and len(cells) == len(set(cells))
    assert {who for who, _ in ran} == {1, 2}
    for method in RANKED:
        assert len({who for who, cell in ran if cell.method == method}) == 1, "one calibration, one process"


def test_a_cell_that_does_not_fit_leaves_room_for_shorter_ones(inputs: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(GRIDS, "pilot", [Cell("balanced", 0), Cell("dense_all", 0)])
    more = ("--learning-rate", "1e-2", "--budget-seconds", "50", "--started-seconds", "0")
    grid = quality.Grid(quality.read_options(_options(inputs, tmp_path / "r.jsonl", "pilot", *more)))
    monkeypatch.setattr(grid, "predicted", lambda cell: 90.0 if cell.method == "balanced" else 10.0)
    ran = []
    monkeypatch.setattr(grid, "run_cell", ran.append)
    assert grid.run() == 1 and ran == [Cell("dense_all", 0)]
    assert "balanced seed 0 comes next" in capsys.readouterr().out


def test_seeds_of_the_command_line_replace_those_of_the_grid(inputs: Path, tmp_path: Path, capsys):
    more = ("--learning-rate", "1e-2", "--seeds", "3,4", "--only", "local_12_40")
    grid = quality.Grid(quality.read_options(_options(inputs, tmp_path / "r.jsonl", "explore", *more)))
    assert [(cell.method, cell.seed) for cell in grid.cells] == [("local_12_40", 3), ("local_12_40", 4)]
    assert quality.main(_options(inputs, tmp_path / "r.jsonl", "main", "--only", "local_12_40")) == 2
    assert "grid main has none of the methods local_12_40" in capsys.readouterr().err


def test_a_grid_needs_a_swept_rate(inputs: Path, tmp_path: Path, capsys):
    assert quality.main(_options(inputs, tmp_path / "r.jsonl", "main", "--only", "balanced")) == 2
    assert "run the grid `sweep`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method",
    [
        "no_context",
        "dense_4k",
        "random_ltd",
        "longlora",
        "fixed_rule",
        "plain",
        "tokentune",
        "dense_at_end",
        "oracle_mass",
        "hardest_weighted",
        "window_512",
        "balanced",
        "far_25_rows_12",
        "refit_10",
        "rising",
        "threshold_+0.5",
        "allocated",
        "near_grad_12_25",
        "predict_mass_loss_rows",
        "bypass_update",
        "block_16",
        "tails",
        "far_12_norm_embed_tokens",
        "alone_35",
    ],
)
def test_methods_train_and_leave_no_trace(inputs: Path, tmp_path: Path, monkeypatch, method: str):
    monkeypatch.setitem(GRIDS, "pilot", [Cell(method, 0, 2)])
    options = quality.read_options(_options(inputs, tmp_path / "r.jsonl", "pilot", "--learning-rate", "1e-2"))
    grid = quality.Grid(options)
    model = grid.study.model()
    ids = torch.randint(0, 64, (1, 96))
    before = model.eval()(ids).logits
    if method == "refit_10":
        monkeypatch.setitem(METHODS, method, replace(METHODS[method], refit_every=1))
    if method == "far_25_rows_12":
        monkeypatch.setattr(far, "FAR_STRIPE", 16)
    if method in ("window_512", "balanced", "near_grad_12_25"):
        shorter = replace(METHODS[method].plan, context_window=128)
        monkeypatch.setitem(METHODS, method, replace(METHODS[method], plan=shorter))
    assert grid.run() == 0
    recalls = {r.name: r for r in grid.records if "/recall_" in r.name}
    assert bool(recalls) == (METHODS[method].plan is not None and METHODS[method].plan.scorer == "predictor") or (
        method in ("oracle_mass", "plain", "fixed_rule")
    )
    for record in recalls.values():
        assert list(domain_means(record)) == ["books", "code"] and 0 <= record.value <= 1
    whole = {n: p for n, p in model.named_parameters() if n in grid.study._originals}
    assert len(whole) == (2 * 3 + 2 if METHODS[method].trains else 0), "norms and the embedding"
    assert all(not torch.equal(p, grid.study._originals[n]) and p.grad is None for n, p in whole.items())
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.isfinite().all() for p in named.values())
    assert any(p.abs().sum() > 0 for n, p in named.items() if "lora_B" in n), "something was learned"
    grid.study.fresh_adapter(0)
    assert torch.equal(model.eval()(ids).logits, before), "the model is dense and its own again"


def test_a_far_copy_repeats_what_stands_near_the_start():
    ids = torch.arange(1024)[None]
    copied, rows = far_copy(ids)
    assert torch.equal(copied[0, :992], ids[0, :992]) and torch.equal(copied[0, 992:], torch.arange(64, 96))
    assert rows[0].nonzero()[:, 0].tolist() == list(range(999, 1023)), "they predict the last three quarters of it"


def test_methods_of_one_seed_are_paired(inputs: Path):
    study = _study(inputs)
    for left, right in (("dense_all", "random_ltd"), ("dense_rows_balanced", "balanced")):
        batches = [list(study.training_batches(METHODS[n], 3, 3)) for n in (left, right)]
        for (a,), (b,) in zip(*batches, strict=True):
            assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["labels"], b["labels"])
    other = list(study.training_batches(METHODS["dense_rows_balanced"], 4, 3))
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for (a,), (b,) in zip(other, batches[0], strict=True))
    name = next(n for n in study.model().state_dict() if "lora_A" in n)
    kept = [study.fresh_adapter(s).state_dict()[name].clone() for s in (0, 1, 0)]
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[1])


def test_training_never_reads_calibration_windows_and_mixes_domains_equally(inputs: Path):
    study = _study(inputs)
    seen: dict[bytes, str] = {}
    for domain in ("books", "code"):
        for index in range(7):
            sample = study.windows(domain, "train", WINDOW)[index]
            seen[sample["input_ids"].tobytes()] = f"{domain}{index}"
    batches = study.training_batches(METHODS["dense_all"], 0, 6)
    drawn = [seen[row.numpy().tobytes()] for (batch,) in batches for row in batch["input_ids"]]
    assert sum(n.startswith("books") for n in drawn) == len(drawn) // 2
    reserved = {f"{d}{i}" for d in ("books", "code") for i in study.reserved(d)}
    assert not reserved & set(drawn)
    (short,) = next(study.training_batches(METHODS["dense_4k"], 0, 1))
    assert short["input_ids"].shape == (8, WINDOW // 4)
    kept = {
        study.windows(d, "train", WINDOW)[i]["input_ids"].tobytes()
        for d in ("books", "code")
        for i in study.reserved(d)
    }
    for (batch,) in study.training_batches(METHODS["dense_4k"], 0, 6):
        assert not any(row.numpy().tobytes() in whole for row in batch["input_ids"] for whole in kept)


def test_sweep_of_answers_is_one_by_itself():
    """Enough rates for a choice, the protocol of the grid that needs it, and its cells are that grid's own."""
    found = [
        quality.make_protocol(argparse.Namespace(grid=name, domains=None)) for name in ("instruct_sweep", "instruct")
    ]
    assert found[0] == found[1] and found[0].data == "answers"
    sweep = GRIDS["instruct_sweep"]
    assert set(sweep) <= set(GRIDS["instruct"]) and len({cell.learning_rate for cell in sweep}) == len(sweep) >= 3


def test_presets_are_those_of_the_command_line():
    for name, preset in PRESETS.items():
        method = METHODS[name]
        spec = method.plan
        assert (method.loss_share, method.span, method.placement) == (preset.loss_share, preset.span, "random")
        assert method.local_share == preset.local_share
        # Loss rows fill the share that passes gradient: there is nothing left to rank.
        names = preset.sparsity.keys() - {"scorer"}
        assert {n: getattr(spec, n) for n in names} == {n: preset.sparsity[n] for n in names} | {"dense_layers": ()}


def test_equal_flops_and_gains():
    shape, sizes = quality.SMOLLM2, (16384, 16)
    steps = equal_steps(METHODS["balanced"], METHODS["dense_all"], 100, shape, *sizes)
    spent = steps * sequence_flops(METHODS["balanced"], shape, *sizes)
    assert spent == pytest.approx(100 * sequence_flops(METHODS["dense_all"], shape, *sizes), rel=0.01)
    assert gain_at_64k(METHODS["balanced"])["llama-3-8b"] > gain_at_64k(METHODS["loss_20"])["llama-3-8b"] > 1
    ramped = sequence_flops(METHODS["random_ltd"], shape, *sizes)
    dense = sequence_flops(METHODS["dense_all"], shape, *sizes)
    assert sequence_flops(METHODS["random_ltd_no_ramp"], shape, *sizes) < ramped < dense
    assert sequence_flops(METHODS["dense_4k"], shape, *sizes) < dense


def test_newest_cell_counts(inputs: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(GRIDS, "pilot", [Cell("before", 0, 2)])
    options = quality.read_options(_options(inputs, tmp_path / "r.jsonl", "pilot"))
    grid = quality.Grid(options)
    grid.run_cell(grid.cells[0])
    grid.run_cell(grid.cells[0])
    cells = Cells(read_records(options.out))
    (only,) = cells.of("before", "dense", cells.protocols()[0])
    assert set(domain_means(only)) == {"books", "code"}


_ANSWERS = ("instruct_dense", "instruct_no_document", "instruct_skip", "instruct_context_15", "instruct_words_alone_15")


def test_answers_are_scored_with_and_without_documents(inputs: Path, tmp_path: Path, monkeypatch):
    rows = []
    for place in range(6):
        words = " ".join(f"word{i}" for i in range(12 + place))
        text = "\n\n".join(f"[Story {n}: {n}{place}]\n\n{words}" for n in (1, 2))
        asked = [{"question": f"What is {n}?", "answers": [f"a{n}"], "document": n} for n in (1, 1, 2)]
        rows.append(json.dumps({"text": text, "qas": asked}))
    for split in ("train", "validation"):
        with gzip.open(tmp_path / f"instruct-{split}.jsonl.gz", "wt") as file:
            file.write("\n".join(rows))
    quality_answers.write_answers(tmp_path, byte_tokenizer(), tmp_path, WINDOW)
    whole, alone = (quality_answers.read_answers(tmp_path / f"{n}-train.npz") for n in ("answers", "answers-alone"))
    assert len(whole) == len(alone) > 6
    for a, b in zip(whole.windows, alone.windows, strict=True):
        assert a.sample_id == b.sample_id and len(a.tokens_T) > len(b.tokens_T)
        assert a.tokens_T[a.learned_T].tolist() == b.tokens_T[b.learned_T].tolist(), "the same answers"
        assert a.tokens_T[-len(b.tokens_T) :].tolist() == b.tokens_T.tolist()
        assert len(a.tokens_T) <= WINDOW
    save_tiny_model(tmp_path / "model")
    options = _options(tmp_path, tmp_path / "r.jsonl", "instruct", "--learning-rate", "1e-3")
    options[options.index("books,code")] = "answers"
    cells = [Cell(n, 0, 1) for n in _ANSWERS]
    monkeypatch.setitem(GRIDS, "instruct", cells)
    assert quality.main(options) == 0
    found = {r.name: r for r in read_records(tmp_path / "r.jsonl")}
    assert found["quality/instruct_no_document/dense"].value != found["quality/instruct_dense/dense"].value
    for name in _ANSWERS[2:]:
        assert found[f"quality/{name}/forward_share"].value < 1
