"""Verbs end to end on a tiny model: what they print, write and refuse. Every mistake is one line and exit code 2."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from lemo.cli.main import app
from lemo.cli.recipe import load_recipe
from lemo.core.plan import Plan
from tests.train.tiny import save_tiny_model, words

RECIPE = """
output: {out}
model: {{path: {base}/model, dtype: float32}}
data: {{train: [{base}/train.txt], validation: [{base}/validation.txt], window_tokens: 128, validation_windows: 2}}
loss_rows: {{share: 0.3}}
sparsity: {{forward_ratio: 0.6, backward_ratio: 0.6, block_size: 16, scorer: predictor, dense_layers: [0, -1]}}
calibration: {{windows: 2, tune_windows: 1, pooled_features: 8, predictor_width: 8, predictor_rank: 4,
  predictor_steps: 5, bypass_rank: 4, compare_dense_fit: false}}
lora: {{rank: 2}}
training: {{max_steps: 2, learning_rate: 1e-2}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_model(folder / "model", layers=3)
    (folder / "train.txt").write_text(words(400, seed=1))
    (folder / "validation.txt").write_text(words(80, seed=2))
    (folder / "recipe.yaml").write_text(RECIPE.format(base=folder, out=folder / "run"))
    return folder


def lemo(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result, *parts):
    """Exit code 2, one line for one mistake, the last on standard error; no traceback."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line]
    assert lines[-1].startswith("error: ") and sum(line.startswith("error: ") for line in lines) == 1
    assert "Traceback" not in result.output
    lines = lines[-1:]
    for part in parts:
        assert str(part) in lines[0]


@pytest.fixture(scope="module")
def trained(base):
    """Folder of a finished run that calibrated its own plan."""
    result = lemo("train", base / "recipe.yaml")
    assert result.exit_code == 0, result.output
    assert re.search(r"sparse, loss rows after +\d\.\d{4}", result.stdout)
    return base / "run"


def test_train_writes_a_recipe_that_reproduces_the_run(base, trained):
    names = {p.name for p in trained.iterdir()}
    assert names >= {"adapter", "plan", "recipe.yaml", "metrics.jsonl", "summary.json", "calibration"}
    again = lemo("train", trained / "recipe.yaml", f"output={base / 'again'}")
    assert again.exit_code == 0, again.output
    first, second = (json.loads((d / "summary.json").read_text()) for d in (trained, base / "again"))
    assert first["losses"] == second["losses"]
    assert first["config_hash"] == second["config_hash"]


def test_resume_if_possible_begins_where_there_is_nothing(base, tmp_path):
    overrides = (f"output={tmp_path / 'run'}", "sparsity.enabled=false", "training.max_steps=1")
    refused(lemo("train", base / "recipe.yaml", *overrides, "--resume"), "holds no run to resume")
    result = lemo("train", base / "recipe.yaml", *overrides, "--resume-if-possible")
    assert result.exit_code == 0 and (tmp_path / "run" / "adapter").is_dir()
    again = lemo("train", base / "recipe.yaml", *overrides, "--resume-if-possible")
    assert again.exit_code == 0 and "is finished; nothing is left to do" in again.stderr
    refused(lemo("train", base / "recipe.yaml", *overrides, "--resume"), "is finished; name another folder")


def test_eval_reads_a_run_and_agrees_with_it(trained, tmp_path):
    result = lemo("eval", trained, "--output", tmp_path / "eval.json", "--bins", "4")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "eval.json").read_text())
    losses = json.loads((trained / "summary.json").read_text())["losses"]
    assert found["dense"]["nats"] == pytest.approx(losses["dense after"], rel=1e-6)
    assert found["sparse (look-ahead), loss rows"]["nats"] == pytest.approx(losses["sparse, loss rows after"], rel=1e-6)
    assert len(found["dense"]["by_position"]) == 4
    assert "0-32" in result.stdout and f"{found['dense']['nats']:.4f}" in result.stdout
    refused(lemo("eval", trained, "--output", tmp_path / "eval.json"), "exists already")


def test_eval_of_a_recipe_alone_is_dense_and_of_the_base(base, trained):
    result = lemo("eval", base / "recipe.yaml")
    assert result.exit_code == 0, result.output
    before = json.loads((trained / "summary.json").read_text())["losses"]["dense before"]
    assert f"{before:.4f}" in result.stdout and "sparse" not in result.stdout


@pytest.mark.parametrize("window", [None, 16, 64])
def test_eval_looks_at_a_plan_that_changes_what_rows_see(base, tmp_path, window):
    """Every row runs forward in all: within a window it does not see what a dense row sees, unless all are near."""
    plan = Plan.uniform(3, forward_ratio=1.0, backward_ratio=0.3, block_size=16, gradient="keys", context_window=window)
    plan.save(tmp_path / "plan")
    result = lemo("eval", base / "recipe.yaml", "--plan", tmp_path / "plan", "--output", tmp_path / "eval.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "eval.json").read_text())
    if window != 16:
        assert set(found) == {"dense"} and "its loss is the dense one" in result.stderr
    else:
        assert found["sparse (look-ahead), loss rows"]["nats"] != found["dense, loss rows"]["nats"]


def test_positions_without_a_label_are_no_number(base, tmp_path):
    """Answers alone carry loss: most bins of a row with one answer at its end are empty."""
    row = {"text": "c" * 90, "qas": [{"question": "q", "answers": ["a"]}]}
    (tmp_path / "qas.jsonl").write_text(json.dumps(row) + "\n")
    data = f"data.validation=[{tmp_path}/qas.jsonl]", "data.answer_only=true"
    result = lemo("eval", base / "recipe.yaml", *data, "--output", tmp_path / "eval.json")
    assert result.exit_code == 0, result.output
    assert "nan" not in result.output and " - " in result.stdout
    assert "NaN" not in (tmp_path / "eval.json").read_text()
    found = json.loads((tmp_path / "eval.json").read_text())["dense"]["by_position"]
    assert found[0]["nats"] is None and found[-1]["nats"] > 0
    many = lemo("eval", base / "recipe.yaml", "--bins", 65)
    assert many.exit_code == 2 and "--bins" in many.stderr and "64" in many.stderr


def test_inspect_draws_map_and_mask(base, trained, tmp_path):
    (tmp_path / "text.txt").write_text(words(60, seed=3))
    result = lemo("inspect", trained, "--text", tmp_path / "text.txt", "--out", tmp_path / "deep" / "map.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "deep" / "map.png").read_bytes().startswith(b"\x89PNG")
    layers = re.findall(r"layer +(\d) (.*) +(\d+)%", result.stdout)
    assert [layer for layer, _, _ in layers] == ["0", "1", "2"]
    assert layers[0][2] == layers[2][2] == "100" and int(layers[1][2]) < 100
    assert " " in layers[1][1].rstrip() and "█" in layers[1][1]
    assert "⟦" in result.stdout


def test_calibrate_writes_plan_and_report_that_train_can_use(base, tmp_path):
    result = lemo("calibrate", base / "recipe.yaml", f"output={tmp_path / 'plan'}")
    assert result.exit_code == 0, result.output
    assert {p.name for p in (tmp_path / "plan").iterdir()} >= {"plan", "calibration-report.json", "recipe.yaml"}
    text = (
        (base / "recipe.yaml")
        .read_text()
        .replace(
            "forward_ratio: 0.6, backward_ratio: 0.6, block_size: 16, scorer: predictor, dense_layers: [0, -1]",
            f"plan: {tmp_path / 'plan' / 'plan'}, block_size: 64",
        )
    )
    (tmp_path / "with-plan.yaml").write_text(text)
    refused(
        lemo("train", tmp_path / "with-plan.yaml", f"output={tmp_path / 'run'}"), "sparsity.block_size", "blocks of 16"
    )
    (tmp_path / "with-plan.yaml").write_text(text.replace("block_size: 64", "block_size: 16"))
    done = lemo("train", tmp_path / "with-plan.yaml", f"output={tmp_path / 'other'}", "training.max_steps=1")
    assert done.exit_code == 0, done.output
    refused(lemo("train", base / "recipe.yaml", f"output={tmp_path / 'plan'}"), "holds a calibration", "sparsity.plan=")


def test_the_recipe_that_was_calibrated_trains_under_its_plan_as_it_is(base, tmp_path):
    result = lemo("calibrate", base / "recipe.yaml", f"output={tmp_path / 'plan'}")
    _, _, command = result.stdout.strip().splitlines()[-1].partition("next: lemo ")
    plan = next(word for word in command.split() if word.startswith("sparsity.plan="))
    run = load_recipe(base / "recipe.yaml", [plan, f"output={tmp_path / 'run'}"])
    assert run.sparsity.forward_ratio == 1.0 != load_recipe(base / "recipe.yaml").sparsity.forward_ratio
    done = lemo(*(word.replace("FOLDER", str(tmp_path / "run")) for word in command.split()), "training.max_steps=1")
    assert done.exit_code == 0, done.output
    other = ["sparsity.forward_ratio=0.5", "sparsity.backward_ratio=0.4"]
    refused(
        lemo("train", base / "recipe.yaml", plan, *other, f"output={tmp_path / 'no'}"),
        "sparsity.forward_ratio, sparsity.backward_ratio stand beside sparsity.plan",
    )


def test_calibrate_leaves_a_run_alone(base, trained):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    refused(lemo("calibrate", base / "recipe.yaml"), "holds a run", "name another folder: output=FOLDER")
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["training.learning_rte=1"], ["training.learning_rte", "did you mean training.learning_rate?"]),
        (["training.max_steps=many"], ["training.max_steps", "an integer"]),
        (["sparsity.forward_ratio=0"], ["sparsity.forward_ratio", "(0, 1]"]),
        (["sparsity.backward_ratio=0.9"], ["sparsity.backward_ratio", "must not exceed"]),
        (["calibration.bypass_rank=0"], ["bypass"]),
        (["sparsity.block_size=0"], ["sparsity.block_size"]),
        (["data.train=[absent.txt]"], ["absent.txt", "no such file"]),
        (["data.train=[]"], ["data.train is empty"]),
        (["data.window_tokens=4096"], ["data.window_tokens", "context of 512"]),
        (["model.path=./absent"], ["absent"]),
        (["sparsity.dense_layers=[7]"], ["dense_layers", "7"]),
        (["lora.targets=[nothing]"], ["lora.targets"]),
        (["training.lr_scheduler=sawtooth"], ["training", "sawtooth"]),
        (["nonsense"], ["nonsense"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(base, tmp_path, overrides, parts):
    result = lemo("train", base / "recipe.yaml", f"output={tmp_path / 'out'}", *overrides)
    refused(result, *parts)
    assert not (tmp_path / "out").exists()


def test_bad_data_names_file_and_row(base, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": ""}\n')
    out = tmp_path / "out"
    refused(lemo("train", base / "recipe.yaml", f"output={out}", f"data.train=[{tmp_path}/bad.jsonl]"), "row 2")
    row = {"text": "c" * 300, "qas": [{"question": "q", "answers": ["a"]}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    refused(
        lemo(
            "train",
            base / "recipe.yaml",
            f"output={out}",
            f"data.train=[{tmp_path}/long.jsonl]",
            "data.answer_only=true",
        ),
        "row 1",
        "the window 128",
    )
    assert not out.exists()


def test_a_plan_of_another_model_is_refused(base, trained, tmp_path):
    torch.manual_seed(1)
    save_tiny_model(tmp_path / "other", layers=3)
    result = lemo("eval", trained, f"model.path={tmp_path / 'other'}", "--plan", trained / "plan")
    refused(result, "another base model")
    save_tiny_model(tmp_path / "deeper", layers=4)
    result = lemo("eval", base / "recipe.yaml", f"model.path={tmp_path / 'deeper'}", "--plan", trained / "plan")
    refused(result, "3 layers", "4")
    refused(lemo("eval", base / "recipe.yaml", "--plan", tmp_path), "is not a plan")


def test_folders_that_are_no_run_are_refused(base, trained, tmp_path):
    refused(lemo("train", base / "recipe.yaml"), "is finished")
    refused(lemo("train", base / "recipe.yaml", "lora.rank=3"), "another run")
    refused(lemo("eval", tmp_path), "no output folder of a run")
    refused(lemo("train", base / "absent.yaml"), "absent.yaml", "no such file")


def test_a_run_that_is_not_finished_is_not_taken_for_its_base_model(trained, tmp_path):
    """The newest checkpoint that holds an adapter is named, and can be used; a folder of `lemo calibrate` is no run."""
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("adapter", "checkpoints", "summary.json"))
    refused(lemo("eval", run), f"{run} holds no adapter", "not finished", "wait for a checkpoint", run / "recipe.yaml")
    refused(lemo("merge", run, "--out", tmp_path / "merged"), "not finished", "no checkpoint yet")
    for step in (2, 10):
        shutil.copytree(trained / "adapter", run / "checkpoints" / f"checkpoint-{step}")
        (run / "checkpoints" / f"checkpoint-{step}" / "lemo.json").write_text('{"sparse_batches": 2}')
    (run / "checkpoints" / "checkpoint-11").mkdir()  # was not written to its end
    newest = run / "checkpoints" / "checkpoint-10"
    for arguments in (("eval", run), ("eval", run, "--retrieval", "passkey:1"), ("inspect", run, "--text", "abc")):
        refused(lemo(*arguments), "not finished", f"--adapter {newest}", run / "recipe.yaml")
    refused(lemo("merge", run, "--out", tmp_path / "merged"), "not finished", newest)
    assert lemo("inspect", run, "--samples", "1").exit_code == 0, "samples need no weights"
    found = []
    for source in ((run, "--adapter", newest), (trained,)):
        done = lemo("eval", *source)
        assert done.exit_code == 0, done.output
        found.append(done.stdout)
    assert found[0] == found[1]
    assert lemo("merge", newest, "--out", tmp_path / "merged").exit_code == 0
    shutil.rmtree(run / "checkpoints")
    (run / "run.json").unlink()
    assert lemo("eval", run).exit_code == 0


def test_calibrate_says_when_there_is_nothing_to_calibrate(base):
    refused(lemo("calibrate", base / "recipe.yaml", "sparsity.enabled=false"), "nothing to calibrate")


def test_debug_shows_the_traceback(base):
    result = lemo("--debug", "train", base / "absent.yaml")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "ConfigError"


def test_doctor_gives_a_verdict():
    result = lemo("doctor")
    assert result.exit_code == 0, result.output
    assert "This machine can train" in result.stdout
    assert torch.__version__ in result.stdout
    assert "lemo[" not in result.stdout, "the README installs from a clone"


def test_doctor_names_what_is_missing(monkeypatch):
    from importlib import metadata

    from lemo.cli import doctor

    found = {f.what: f for f in doctor.examine()}
    assert found["Python"].state == "ok"
    real = metadata.version

    def without_peft(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return "4.57.1" if name == "transformers" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", without_peft)
    broken = doctor.examine()
    states = {f.what: f.state for f in broken}
    assert states["peft"] == states["transformers"] == "error"
    assert doctor.verdict(broken) == "This machine cannot train: transformers, peft."
    assert lemo("doctor").exit_code == 1


def test_help_loads_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from lemo.cli.main import app;"
        "r = CliRunner().invoke(app, ['--help']); assert r.exit_code == 0 and 'calibrate' in r.output, r.output;"
        "heavy = {'torch', 'transformers', 'pydantic', 'matplotlib', 'peft'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
