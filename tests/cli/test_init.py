"""`lemo init` finds out what it can, and what it writes is a recipe that trains."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from typer.testing import CliRunner

from lemo.cli.draft import draft_recipe
from lemo.cli.estimate import read_source
from lemo.cli.init import PresetName
from lemo.cli.main import app
from lemo.cli.presets import PRESETS
from lemo.cli.recipe import build_run, load_recipe, parse_yaml
from lemo.cli.schema import describe_fields, recipe_schema
from lemo.cli.shape import Wish, find_shape
from lemo.config import RunConfig, resolved
from lemo.errors import ConfigError, DataError
from lemo.train.data import load_windows
from lemo.train.planning import needs_calibration
from lemo.train.run_time import count_steps
from lemo.train.survey import DataFacts, MachineFacts, survey_data, survey_model
from tests.train.test_chat import PLAIN, TALK
from tests.train.tiny import byte_tokenizer, save_tiny_model, words

CPU, GPU = MachineFacts("CPU", False, 0, False), MachineFacts("card", True, 80 * 2**30, True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("m") / "model", layers=3)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(folder)
    return folder


def lemo(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def text_facts(*lengths):
    return DataFacts("text", None, tuple(lengths), max(lengths))


def draft(model, data, machine=GPU, **wish):
    text = draft_recipe(Wish(("d.txt",), **wish), survey_model(str(model)), data, machine)
    return build_run(parse_yaml(text, "draft"), "draft")


def test_one_text_file_trains_as_it_stands(model, tmp_path):
    (tmp_path / "book.txt").write_text(words(1600))
    made = lemo("init", model, tmp_path / "book.txt", "--out", tmp_path / "r.yaml", "--run", tmp_path / "run")
    assert made.exit_code == 0, made.output
    assert "context of 512 tokens" in made.stdout and f"next: lemo train {tmp_path / 'r.yaml'}" in made.stdout
    run = load_recipe(tmp_path / "r.yaml")
    assert run.data.held_out_share == 0.1 and run.data.window_tokens == 512 and run.loss_rows.share == 0.12
    done = lemo("train", tmp_path / "r.yaml", "training.max_steps=1", "calibration.predictor_steps=3")
    assert done.exit_code == 0, done.output
    assert "dense after" in done.stdout
    again = lemo("init", model, tmp_path / "book.txt", "--out", tmp_path / "r.yaml")
    assert again.exit_code == 2 and "exists already" in again.stderr


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
def test_every_preset_is_a_valid_recipe(model, preset, machine):
    run = draft(model, text_facts(40_000, 30_000), machine, preset=preset)
    assert run.sparsity.forward_ratio == 1
    assert run.loss_rows.share == PRESETS[preset].loss_share
    assert run.training.gradient_checkpointing is machine.gpu
    assert run.model.dtype == ("bfloat16" if machine.gpu else "float32")
    assert run.training.max_steps == (20 if not machine.gpu and run.training.max_steps > 0 else -1)


def test_presets_are_ordered_by_what_they_skip():
    presets = [PRESETS[name] for name in ("quality", "balanced", "fast")]
    for found in ([p.loss_share for p in presets], [p.loss_share + p.local_share for p in presets]):
        assert found == sorted(found, reverse=True) and len(set(found)) == 3
    windows = [p.context_window for p in presets]
    assert windows == sorted(windows, reverse=True)


@pytest.mark.parametrize(
    ("lengths", "window", "packing"),
    [
        ((100_000,), 512, False),  # the model's context
        ((3000,), 256, False),  # a tenth is held out and has to fill windows
        ((1000,) * 30, 256, False),  # 512 would leave half of each document over
        ((150,) * 30, 512, True),
        ((60,) * 8, 128, True),
    ],
)
def test_windows_fit_the_documents(model, lengths, window, packing):
    shape = find_shape(Wish(("d",)), survey_model(str(model)), text_facts(*lengths), GPU)
    assert (shape.window_tokens, shape.packing) == (window, packing)


@pytest.mark.parametrize(
    ("lengths", "held", "why"),
    [
        ((100_000,), (), "the model's own context"),
        ((3000,), (), "only 300 tokens of the longest document are held out (--validation FILE avoids that)"),
        ((3000,), ("v",), "the model's own context"),
        ((1000,) * 30, (), "windows of 512, one document each, would leave more than a quarter unused"),
        ((150,) * 30, (), "several documents share one: no document has 512 tokens"),
        ((700,) * 30, (), "several documents share one: windows of 512, one document each, would leave more than a"),
        ((1200,), (), "several documents share one: only 120 tokens of the longest document are held out (--val"),
    ],
)
def test_windows_have_their_true_reason(model, lengths, held, why):
    shape = find_shape(Wish(("d",), held), survey_model(str(model)), text_facts(*lengths), GPU)
    assert shape.why.startswith(why)


def test_few_samples_beyond_the_context_are_left_out(model, tmp_path):
    talks = [{"messages": [{**TALK[1], "content": f"Say {i:02}."}, TALK[2]]} for i in range(29)]
    long = {"messages": [{**TALK[1], "content": "x" * 700}, TALK[2]]}
    for count, left_out in ((1, True), (2, False)):
        out = tmp_path / f"{count}.yaml"
        data = jsonl(tmp_path / f"{count}.jsonl", [*talks, *[long] * count])
        made = lemo("init", model, data, "--out", out, "--run", tmp_path / "run")
        run, text = load_recipe(out), out.read_text()
        if left_out:
            assert (run.data.window_tokens, run.data.long_rows, run.model.rope_scaling) == (512, "drop", "none")
            assert "long_rows: drop " in text and "leaves out longer samples, about 1 of 30; lemo init --window" in text
            warning = (
                "left out (data.long_rows: drop): about 1 of 30 samples, the longest " + data + ", row 30 with about"
            )
            keeps = re.search(r"--window (\d+) keeps all and extends the context", made.stderr)
            done = lemo("train", out, "training.max_steps=1", "training.eval_steps=null", "training.save_steps=null")
            assert done.exit_code == 0 and "samples dropped: 1" in done.stderr, done.output
            again = tmp_path / "again.yaml"
            made_again = lemo("init", model, data, "--out", again, "--window", keeps[1])
            assert load_recipe(again).model.rope_scaling == "linear" and "--window asks for it" in made_again.stderr
        else:
            assert run.data.long_rows == "error" and run.data.window_tokens == run.model.context_length > 700
            warning = f"512 tokens, is extended (model.rope_scaling: linear): the longest sample is {data}, row 3"
        assert "warning: " in made.stderr and warning in made.stderr


def test_samples_that_fit_the_context_leave_it_as_it_is(model):
    """Room for a few tokens more is no reason to change the model."""
    run = draft(model, DataFacts("messages", "messages", (510, 90), 510, 0.2))
    assert (run.data.window_tokens, run.model.context_length, run.data.long_rows) == (512, None, "error")


def test_validation_that_is_trained_on_is_said(model, tmp_path):
    (tmp_path / "a.txt").write_text(words(1600))
    made = lemo("init", model, tmp_path / "a.txt", "--validation", tmp_path / "a.txt", "--out", tmp_path / "r.yaml")
    assert made.exit_code == 0 and "warning: data.validation has text of data.train, in 1 of 1 documents" in made.stderr


def test_a_longer_window_extends_the_context(model):
    facts, data = survey_model(str(model)), text_facts(100_000)
    run = draft(model, data, window_tokens=1024)
    assert (run.model.context_length, run.model.rope_scaling) == (1024, "linear")
    assert find_shape(Wish(("d",), window_tokens=4096), facts, data, GPU).rope_scaling == "yarn"
    assert draft(model, data, window_tokens=512).model.rope_scaling == "none"


def test_a_context_that_cannot_grow_is_said_or_samples_are_cut(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    fixed = save_tiny_model(tmp_path / "model", rope_parameters=rope)
    with pytest.raises(ConfigError, match="512 tokens of this model cannot be extended"):
        draft(fixed, text_facts(100_000), window_tokens=1024)
    run = draft(fixed, DataFacts("qas", "text", (900, 300), 900, 0.1))
    assert run.data.window_tokens == 512 and run.data.long_rows == "truncate"
    assert run.model.context_length is None
    row = {"text": words(300), "qas": [{"question": "q", "answers": ["a"]}]}
    data = jsonl(tmp_path / "q.jsonl", [row, row])
    made = lemo("init", fixed, data, "--out", tmp_path / "r.yaml")
    assert "warning: longer samples are shortened (data.long_rows: truncate), the longest " + data in made.stderr


def test_a_single_sample_is_not_held_out(model):
    assert draft(model, DataFacts("messages", "messages", (90,), 90, 0.2)).data.held_out_share == 0
    assert draft(model, DataFacts("messages", "messages", (90, 80), 90, 0.2)).data.held_out_share == 0.1


@pytest.mark.parametrize("preset", PRESETS)
def test_documents_with_questions_have_a_loss_on_some_of_their_rows(model, preset):
    fields = {"qas": "text", "messages": "messages"}
    facts = {kind: DataFacts(kind, field, (400, 300), 400, 0.1) for kind, field in fields.items()}
    shares = {kind: draft(model, found, preset=preset).loss_rows.prompt_share for kind, found in facts.items()}
    assert shares == {"qas": 0.0 if preset == "quality" else 0.1, "messages": 0.0}
    text = draft_recipe(Wish(("d.jsonl",), preset=preset), survey_model(str(model)), facts["messages"], GPU)
    assert ("0.1 where prompts are documents" in text) == (preset != "quality")
    assert "scorer: words " in text and "shares rare words with their questions" in text
    assert "of answers carry loss" in " ".join(text.replace("\n# ", " ").split()) and "three of eight" not in text


def test_short_data_is_refused(model):
    with pytest.raises(ConfigError, match="about 100 tokens, too few"):
        draft(model, text_facts(100))


def test_presets_write_all_that_they_choose(model):
    for name, preset in PRESETS.items():
        run = draft(model, text_facts(100_000), preset=name)
        chosen = run.sparsity
        assert (run.loss_rows.share, run.loss_rows.span) == (preset.loss_share, preset.span)
        assert (chosen.scorer, tuple(chosen.dense_layers), chosen.gradient) == ("recent", (), "keys")
        assert (chosen.context_window, run.loss_rows.local_share) == (preset.context_window, preset.local_share)
        assert not needs_calibration(run)
        estimated = read_source(str(model), [], PresetName[name])
        assert estimated.loss_rows == run.loss_rows
        names = preset.sparsity
        assert [getattr(estimated.sparsity, n) for n in names] == [getattr(chosen, n) for n in names]


def test_the_default_preset_is_what_a_recipe_without_keys_does(model):
    drafted, plain = draft(model, text_facts(100_000)), RunConfig()
    plain = dataclasses.replace(plain, data=drafted.data)
    found, wanted = ({k: resolved(run)[k] for k in ("loss_rows", "sparsity")} for run in (drafted, plain))
    found["sparsity"]["block_size"] = wanted["sparsity"]["block_size"]
    assert found == wanted and (plain.context_window, plain.local_share) == (1024, 0.25)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_answers_get_the_window_that_was_measured_with_them(model, preset):
    run = draft(model, DataFacts("qas", "text", (9000, 4000), 9000, 0.1), preset=preset)
    assert run.context_window == run.sparsity.context_window == PRESETS[preset].answer_window
    silent = dataclasses.replace(run, sparsity=dataclasses.replace(run.sparsity, context_window=None))
    assert silent.context_window == PRESETS["balanced"].answer_window == 2048


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_kinds_of_data_are_told_apart(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    qas = {"body": "b" * 90, "qas": [{"question": "q" * 5, "answers": ["a" * 10]}]}
    found = survey_data([jsonl(tmp_path / "q.jsonl", [{"id": "7", **qas}])], tokenizer)
    assert (found.kind, found.field) == ("qas", "body") and 0.05 < found.supervised_share < 0.15
    found = survey_data([jsonl(tmp_path / "c.jsonl", [{"talk": TALK[1:3]}, {"talk": TALK}])], tokenizer)
    rendered = len(tokenizer.apply_chat_template(TALK, tokenize=False).replace("<end>", "*").encode())
    assert (found.kind, found.field, found.longest_tokens) == ("messages", "talk", rendered)
    found = survey_data([jsonl(tmp_path / "t.jsonl", [{"id": "x", "text": "y" * 50}, {"text": "z" * 70}])], tokenizer)
    assert (found.kind, found.field, found.lengths) == ("text", "text", (50, 70))
    with pytest.raises(DataError, match="no field holds text"):
        survey_data([jsonl(tmp_path / "n.jsonl", [{"n": 1}])], tokenizer)
    with pytest.raises(DataError, match="one kind at a time"):
        survey_data([str(tmp_path / "c.jsonl"), jsonl(tmp_path / "u.jsonl", [{"text": "y"}])], tokenizer)


def test_conversations_become_an_answer_only_recipe(model, tmp_path):
    talks = [{"messages": [{**TALK[0], "content": f"Be brief, {i:02}."}, *TALK[1:]]} for i in range(12)]
    data = jsonl(tmp_path / "c.jsonl", talks)
    made = lemo("init", model, data, "--out", tmp_path / "r.yaml", "--preset", "quality", "--run", tmp_path / "run")
    assert made.exit_code == 0, made.output
    run = load_recipe(tmp_path / "r.yaml")
    assert run.data.answer_only and run.data.packing and run.data.window_tokens == 256
    done = lemo("train", tmp_path / "r.yaml", "training.max_steps=1", "calibration.predictor_steps=3")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("templated", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("kind", ["conversations", "instruction"])
def test_rows_of_other_tools_become_a_recipe_that_trains(model, tmp_path, kind, templated):
    folder = model if templated else save_tiny_model(tmp_path / "model", layers=3)
    asked = {"from": "human", "value": "Which is the largest?"}
    rows = [
        {"conversations": [asked, {"from": "gpt", "value": f"Jupiter, {i}."}]}
        if kind == "conversations"
        else {"instruction": f"Say {i}.", "input": "Be brief." * (i % 2), "output": f"{i}."}
        for i in range(12)
    ]
    data = jsonl(tmp_path / "d.jsonl", rows)
    made = lemo("init", folder, data, "--out", tmp_path / "r.yaml", "--run", tmp_path / "run")
    if kind == "conversations" and not templated:
        assert made.exit_code == 2 and "d.jsonl, row 1: is a conversation, and" in made.stderr
        return
    assert made.exit_code == 0, made.output
    assert f"data: 12 {'conversations' if templated else 'prompts with completions'}, about" in made.stdout
    text = (tmp_path / "r.yaml").read_text()
    assert "_field" not in text and load_recipe(tmp_path / "r.yaml").data.answer_only
    done = lemo("train", tmp_path / "r.yaml", "training.max_steps=1")
    assert done.exit_code == 0 and "dense after" in done.stdout, done.output
    assert ("no chat template, so each instruction" in done.stderr) == (not templated)


@pytest.mark.parametrize("kind", ["messages", "text"])
def test_steps_are_those_of_samples_that_share_windows(model, tmp_path, kind):
    """Many short samples fill few windows: evaluations and checkpoints are to come before the end."""
    many = [f"Which is it, {i}? " + "x" * (i % 50) for i in range(300)]
    talks = ([{**TALK[1], "content": said}, TALK[2]] for said in many)
    rows = [{"messages": talk} for talk in talks] if kind == "messages" else [{"text": said} for said in many]
    data = jsonl(tmp_path / "d.jsonl", rows)
    asked = ["--window", 256] if kind == "messages" else []  # text is packed where nobody asks for a window
    made = lemo("init", model, data, "--out", tmp_path / "r.yaml", "--machine", "gpu", *asked)
    assert made.exit_code == 0, made.output
    run = load_recipe(tmp_path / "r.yaml")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    dataset, _ = load_windows(run.data, tokenizer)
    steps, _ = count_steps(run, len(dataset))
    assert run.data.packing and len(dataset) < 150
    said = int(re.search(r"about ([\d,]+) steps", (tmp_path / "r.yaml").read_text())[1])
    assert said == pytest.approx(steps, rel=0.15) and run.training.eval_steps < steps


def test_the_schema_knows_every_key_with_its_meaning_and_range(tmp_path):
    made = lemo("schema", "--output", tmp_path / "s.json")
    assert made.exit_code == 0 and json.loads((tmp_path / "s.json").read_text()) == recipe_schema()
    schema = recipe_schema()
    sparsity = schema["$defs"]["SparsityConfig"]
    assert sparsity["additionalProperties"] is False
    assert sparsity["properties"]["forward_ratio"]["maximum"] == 1
    assert "share of rows that run a layer" in sparsity["properties"]["forward_ratio"]["description"]
    assert sparsity["properties"]["kv"]["enum"] == ["kept", "all"]
    assert schema["$defs"]["DataConfig"]["properties"]["train"]["items"] == {"type": "string"}
    assert set(schema["properties"]) == set(RunConfig.__dataclass_fields__)
    assert describe_fields(RunConfig().training.__class__)["max_steps"] == "optimizer steps; -1 for `epochs`."
