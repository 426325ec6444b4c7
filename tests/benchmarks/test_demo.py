"""The demo runs end to end on a tiny model and leaves everything that it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples import demo
from lemo.measure.record import read_records


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a tiny model whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("demo")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(alphabet), max_position_embeddings=512)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    path = folder / "demo.yaml"
    path.write_text(
        json.dumps(
            {
                "model": {"path": str(folder / "model"), "dtype": "float32"},
                "data": {"window_tokens": 512, "max_windows": 8, "validation_windows": 2},
                "loss_rows": {"share": 0.25},
                "lora": {"rank": 2},
                "training": {"max_steps": 2, "gradient_checkpointing": False},
            }
        )
    )
    return path


def test_the_demo_leaves_what_it_promises(recipe: Path, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "demo-output"
    # Processes of their own are for memory peaks; in one process the test need not import everything four times.
    monkeypatch.setattr(demo, "run_stage", lambda arguments, stage: demo.main([*arguments, "--stage", stage]))
    assert demo.main(["--recipe", str(recipe), "--output", str(output)]) == 0
    for name in ("plan/plan.json", *(f"{variant}/adapter/adapter_config.json" for variant in demo.VARIANTS)):
        assert (output / name).exists(), name
    assert (output / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert "base64," in (output / "report.html").read_text()
    records = {record.name: record for record in read_records(output / "records.jsonl")}
    for variant in demo.VARIANTS:
        for what in ("validation_loss_before", "validation_loss_after", "tokens_per_second", "peak_memory"):
            assert not records[f"demo/{variant}/{what}"].problems()
        assert len(records[f"demo/{variant}/training_loss"].samples) == 2
    before = [records[f"demo/{variant}/validation_loss_before"].value for variant in demo.VARIANTS]
    assert before == pytest.approx([before[0]] * 3, rel=1e-6), "all variants start from the same model"
    assert [records[f"demo/{variant}/forward_share"].value for variant in demo.VARIANTS] == [1, 1, 1]
    assert [records[f"demo/{variant}/backward_share"].value < 1 for variant in demo.VARIANTS] == [False, False, True]
    first = [records[f"demo/{variant}/training_loss"].samples[0] for variant in demo.VARIANTS]
    assert first[2] == pytest.approx(first[1], rel=1e-6) != first[0], "within two chunks all is exact; same loss rows"
    assert records["demo/minutes"].bar == "A.demo_minutes"
    kept = json.loads((output / "keep_map.json").read_text())
    assert kept["rows"] == "backward" and len(kept["kept"]) == 3 and all(0.0 in layer for layer in kept["kept"])
    assert all(kept["kept"][1][k] == 1.0 for k, flag in enumerate(kept["supervised"]) if flag)
    assert "share of rows, backward" in capfd.readouterr().out


def test_options_that_skip_rows_in_forward_are_measured_sparsely_as_well(recipe: Path, tmp_path: Path, monkeypatch):
    """The demo is not bound to its recipe: with rows that skip it calibrates, and notes the look-ahead loss."""
    monkeypatch.setattr(demo, "run_stage", lambda arguments, stage: demo.main([*arguments, "--stage", stage]))
    monkeypatch.setattr(demo, "VARIANTS", ("balanced",))
    ratios = {"sparsity.forward_ratio": 0.5, "sparsity.dense_layers": "[0]", "training.max_steps": 1}
    small = {"calibration.windows": 2, "calibration.tune_windows": 1, "calibration.predictor_steps": 3}
    words = [word for key, value in (ratios | small).items() for word in ("--set", f"{key}={value}")]
    assert demo.main(["--recipe", str(recipe), "--output", str(tmp_path), *words]) == 0
    records = {record.name: record for record in read_records(tmp_path / "records.jsonl")}
    sparse, dense = (
        records[f"demo/balanced/{n}_after"].value for n in ("sparse_validation_loss", "validation_loss_on_loss_rows")
    )
    assert sparse != dense, "rows did skip in the sparse forward"
    assert records["demo/balanced/forward_share"].value < 1
    assert json.loads((tmp_path / "keep_map.json").read_text())["rows"] == "forward"


def test_train_and_validation_share_no_topic_and_no_file(tmp_path: Path):
    demo.write_text(tmp_path)
    train, validation = ({p.name for p in (tmp_path / s).iterdir()} for s in ("train", "validation"))
    assert train & validation == {"topics.txt"} and len(validation) > 3
    texts = [(tmp_path / s / "topics.txt").read_text() for s in ("train", "validation")]
    train_paragraphs, validation_paragraphs = (set(text.split("\n\n")) for text in texts)
    assert not train_paragraphs & validation_paragraphs
    assert min(map(len, texts)) > 50_000


def test_a_wrong_override_exits_with_two(recipe: Path, tmp_path: Path, capsys):
    arguments = ["--recipe", str(recipe), "--output", str(tmp_path), "--set", "training.max_step=1"]
    assert demo.main(arguments) == 2
    assert "max_steps" in capsys.readouterr().err


@pytest.mark.parametrize(("layers", "groups"), [(30, 6), (3, 3), (6, 6)])
def test_layer_groups_cover_every_layer_once(layers: int, groups: int):
    found = demo.layer_groups(layers)
    assert len(found) == groups and [i for a, b in found for i in range(a, b)] == list(range(layers))


def test_a_failing_stage_ends_the_demo(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "__file__", str(Path(demo.__file__).with_name("missing.py")))
    with pytest.raises(SystemExit) as stopped:
        demo.run_stage([], "plan")
    assert stopped.value.code != 0
