"""`lemo estimate`: what it prints, and that a step it promises is the step that runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from lemo.cli.estimate import describe
from lemo.cli.main import app
from lemo.config import RunConfig
from lemo.core.plan import LayerPlan, Plan
from lemo.errors import ConfigError
from lemo.measure.card import CARDS, find_card
from lemo.measure.estimate import changes, fit_setting, gain, longest_tokens, make_estimate, needed_bytes
from lemo.measure.memory import GIB
from lemo.measure.sizes import read_sizes
from lemo.measure.step_memory import StepSetting, step_memory
from lemo.train import data_gain as gains_of_data
from lemo.train.data import load_windows
from lemo.train.data_gain import data_gain, look_at_data, window_shares, with_data
from lemo.train.forecast import ANSWER_SHARE, forecast
from lemo.train.planning import training_collator
from lemo.train.rehearsal import shape_config
from tests.train.test_chat import PLAIN, TALK
from tests.train.tiny import byte_tokenizer, save_tiny_model, words


@pytest.fixture(scope="module")
def sizes():
    return read_sizes(shape_config("smollm2-135m", tokens=8192), rank=16)


def run(*arguments) -> str:
    result = CliRunner().invoke(app, ["estimate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_parameters_are_counted_and_not_loaded(sizes):
    """SmolLM2-135M has 134,515,008 parameters with tied embeddings; LoRA's follow from its maps."""
    assert sizes.parameters == 134_515_008
    per_layer = 16 * (576 * 2 + 2 * (576 + 192) + 576 * 2 + 3 * (576 + 1536))
    assert sizes.adapter.parameters == 30 * per_layer
    assert sizes.fused and sizes.defers_norm and sizes.wide_norm


def test_memory_falls_with_recomputation_and_time_rises(sizes):
    card = CARDS["h100"]
    found = [make_estimate(sizes, StepSetting(32768, recompute=x), card) for x in ("none", "mlp", "lin", "layer")]
    assert [e.peak_bytes for e in found] == sorted((e.peak_bytes for e in found), reverse=True)
    assert [e.time.total_s for e in found] == sorted(e.time.total_s for e in found)
    for e in found:
        assert e.peak_bytes == pytest.approx(sum(e.parts_bytes.values()))


def test_the_longest_length_fits_and_the_next_does_not(sizes):
    card, setting = find_card("l4:4"), StepSetting(4096, recompute="lin")
    longest = longest_tokens(sizes, setting, card)
    assert longest > 0
    assert needed_bytes(step_memory(sizes, replace(setting, tokens=longest))) <= card.memory_bytes
    assert needed_bytes(step_memory(sizes, replace(setting, tokens=longest + 1024))) > card.memory_bytes


def test_fit_keeps_the_ratios_where_it_can(sizes):
    """Recomputation first, then offload; rows only when nothing else fits; None when not even that does."""
    setting = StepSetting(32768, recompute="none", kv="all")
    needed = {x: make_estimate(sizes, replace(setting, recompute=x), CARDS["l4"]).needed_bytes for x in ("mlp", "lin")}
    card = find_card(f"l4:{1.001 * needed['mlp'] / GIB}")
    found = fit_setting(sizes, setting, card)
    assert found.fits and found.setting == replace(setting, recompute="mlp")
    layer = replace(setting, recompute="layer")
    offloaded = make_estimate(sizes, replace(layer, offload=True), card)
    tight = find_card(f"l4:{1.001 * offloaded.needed_bytes / GIB}")
    assert not make_estimate(sizes, layer, tight).fits
    assert fit_setting(sizes, setting, tight).setting == replace(layer, offload=True)
    few = replace(layer, loss_share=0.05, offload=True, forward_ratio=0.9, backward_ratio=0.9)
    small = find_card(f"l4:{0.995 * make_estimate(sizes, replace(few, segment_rows=512), card).needed_bytes / GIB}")
    less = fit_setting(sizes, replace(few, offload=False), small)
    assert less is not None and less.fits and less.setting.kv == "kept"
    assert fit_setting(sizes, setting, find_card("l4:0.9")) is None


def test_parked_keys_are_counted(sizes):
    """On the host and in the buffers of the device, three times or less what inputs take; said in words."""
    setting = StepSetting(65536, forward_ratio=1.0, backward_ratio=0.37, gradient="keys", recompute="lin")
    found = {x: make_estimate(sizes, replace(setting, offload=x), CARDS["h200"]) for x in (True, "inputs", "keys")}
    inputs, keys = found[True], found["keys"]
    assert inputs.host_bytes == found["inputs"].host_bytes and inputs.peak_bytes == found["inputs"].peak_bytes
    ratio = 1 + 2 * sizes.key / sizes.shape.width
    assert 1 < ratio <= 3 and keys.host_bytes == pytest.approx(ratio * inputs.host_bytes, rel=0.05)  # whole chunks
    transit = "saved: on its way to the host"
    assert keys.parts_bytes[transit] == pytest.approx(ratio * inputs.parts_bytes[transit])
    assert ", offload;" in describe(inputs) and ", offload of keys too;" in describe(keys)
    told = json.loads(run("smollm2-135m", "training.offload=keys", "--card", "h200", "--json"))["estimate"]
    assert told["setting"]["offload"] == "keys" and told["host_bytes"] > 0
    small = find_card("l4:1")
    assert any(c.text == "training.offload: true" for c in changes(sizes, replace(setting, offload="keys"), small))
    with pytest.raises(ConfigError, match="offload must be false, true, inputs or keys"):
        replace(setting, offload="values")


def test_changes_save_memory(sizes):
    setting, card = StepSetting(65536, kv="all", forward_ratio=0.5), find_card("l4:6")
    now = make_estimate(sizes, setting, card)
    found = changes(sizes, setting, card)
    assert not now.fits and {"sparsity.kv: kept", "data.window_tokens: 32768"} <= {c.text for c in found}
    assert all(c.estimate.peak_bytes < now.peak_bytes for c in found)


def test_a_step_without_skipping_gains_nothing(sizes):
    dense = StepSetting(8192, forward_ratio=1.0, backward_ratio=1.0)
    assert gain(sizes, dense, CARDS["h100"]) == 1.0
    assert gain(sizes, StepSetting(8192, loss_share=1.0), CARDS["h100"]) == 1.0
    assert gain(sizes, StepSetting(131072, loss_share=0.2, backward_ratio=0.3, forward_ratio=0.3), CARDS["h100"]) > 2


def test_a_sample_of_far_keys_takes_time_from_attention_alone(sizes):
    exact = StepSetting(65536, loss_share=0.12, forward_ratio=1.0, backward_ratio=0.12, kv="all", gradient="keys")
    whole, few = (make_estimate(sizes, replace(exact, far_share=x), CARDS["h100"]) for x in (1.0, 0.25))
    assert few.time.attention_s < 0.9 * whole.time.attention_s
    assert few.time.products_s == pytest.approx(whole.time.products_s)
    assert "25% of the far keys" in describe(few) and "far keys" not in describe(whole)


def test_local_loss_rows_cost_less_than_others_and_more_than_none(sizes):
    few = StepSetting(
        65536, 0.12, forward_ratio=1.0, backward_ratio=0.12, kv="all", gradient="keys", context_window=1024
    )
    local, far = replace(few, local_share=0.25), replace(few, loss_share=0.37)
    seconds = [make_estimate(sizes, x, CARDS["h100"]).time for x in (few, local, far)]
    assert seconds[0].total_s < seconds[1].total_s < seconds[2].total_s
    assert seconds[1].products_s == pytest.approx(seconds[2].products_s) and local.loss_rows == far.loss_rows
    assert gain(sizes, few, CARDS["h100"]) > gain(sizes, local, CARDS["h100"]) > gain(sizes, far, CARDS["h100"]) > 1
    text = describe(make_estimate(sizes, local, CARDS["h100"]))
    assert "every row runs each layer, 37% pass gradient: 12% attend to all keys, 25% and the rows without" in text
    assert "gradient within chunks of 1,024, kv all; 37% of the rows carry loss" in text
    assert "; rows without gradient attend within chunks of 1,024," in describe(
        make_estimate(sizes, few, CARDS["h100"])
    )
    wide = replace(local, local_forward="all")
    assert gain(sizes, local, CARDS["h100"]) > gain(sizes, wide, CARDS["h100"]) > gain(sizes, far, CARDS["h100"])
    text = describe(make_estimate(sizes, wide, CARDS["h100"]))
    assert "(25% within chunks of 1,024 only); rows without gradient attend within chunks of 1,024," in text
    short = [replace(x, tokens=2048) for x in (local, far)]
    peaks = [make_estimate(sizes, x, CARDS["h100"]) for x in short]
    assert peaks[0].peak_bytes == peaks[1].peak_bytes and peaks[0].time == peaks[1].time, "the window takes nothing"
    for wrong in ({"context_window": None}, {"gradient": "rows"}, {"local_share": 0.9}):
        with pytest.raises(ConfigError):
            replace(local, **wrong)


def test_shares_of_a_window():
    """Row t carries loss when token t + 1 is learned: rows 3 to 5 of 8 lie in both blocks of 4, rows 5 and 6 in one."""
    assert window_shares([-100] * 4 + [7, 7, 7, -100], 4) == (8, 3 / 8, 1.0)
    assert window_shares([-100] * 6 + [7, 7], 4) == (8, 2 / 8, 0.5)


def test_bad_cards_are_refused():
    for name in ("h300", "h100:", "h100:-3", "h100:many"):
        with pytest.raises(ConfigError):
            find_card(name)
    assert find_card("H100:40").memory_bytes == 40 * GIB


def test_a_known_shape_as_text_and_json():
    text = run("llama3-8b", "data.window_tokens=131072", "--card", "rtx-4090")
    assert "does not fit rtx-4090" in text and "data.window_tokens: 65536" in text
    found = json.loads(run("llama3-8b", "data.window_tokens=131072", "--card", "h200", "--fit", "--json"))
    assert found["estimate"]["fits"] and found["fit"]["fits"]
    # 8.03 billion parameters of two bytes.
    assert found["estimate"]["parts_bytes"]["weights"] == pytest.approx(16.06e9, rel=1e-3)
    assert found["estimate"]["setting"]["kv"] == "all"  # four query heads share a key head
    assert found["longest_tokens"] >= 131072


def test_a_fit_is_the_fastest_of_those_it_may_choose_from():
    """Offload beside it is faster and fits, but nobody said how much memory the host has."""
    text = run("llama3-8b", "data.window_tokens=131072", "--card", "rtx-4090:60", "--fit")
    listed = re.search(r"training.offload: true: [0-9.]+ GiB, ([0-9.]+) s a step, fits", text)
    assert "the fastest that fits without memory of the host: " in text
    assert "the fastest that fits: " in run("llama3-8b", "--card", "h200", "--fit")
    fit = re.search(r"of the host: [0-9.]+ GiB, ([0-9.]+) s", text)
    assert float(listed[1]) < float(fit[1])


def test_the_card_that_is_assumed_is_named(monkeypatch):
    monkeypatch.setattr("lemo.measure.card.here", lambda: None)
    first = run("smollm2-135m").splitlines()[0]
    assert first.endswith(", on h100, which is assumed: this machine has no CUDA device (--card)")
    assert "taken to be h100" in "".join(json.loads(run("smollm2-135m", "--json"))["notes"])
    text = run("smollm2-135m", "--card", "l4")
    assert text.splitlines()[0].endswith(", on l4") and "assumed" not in text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("llama9-7b",), ("llama9-7b", "opt-6.7b", "did you mean llama2-7b?")),
        (("recipe.yam",), ("recipe.yam", "known shapes")),
        (("smollm2-135m", "--data"), ("--data", "data.train is empty", "recipe")),
    ],
)
def test_what_cannot_be_estimated_is_one_line_without_a_network(arguments, parts):
    result = CliRunner().invoke(app, ["estimate", *arguments])
    assert result.exit_code == 2 and result.stderr.count("error: ") == 1
    assert all(part in result.stderr for part in parts)


def test_a_dense_step_knows_one_kind_of_loss_rows():
    """As many rows carry loss as beside local ones; nothing skips."""
    found = [json.loads(run("llama3-8b", *more, "--json"))["estimate"] for more in ((), ("sparsity.enabled=false",))]
    sparse, dense = (x["setting"] for x in found)
    assert sparse["local_share"] > 0 == dense["local_share"] and dense["engine"] == "plain"
    assert dense["loss_share"] == pytest.approx(sparse["loss_share"] + sparse["local_share"])


def of_answers(path="llama3-8b", tokens=65536, prompts=0.1, sparsity=(), **data) -> RunConfig:
    """A recipe whose answers, and a share of prompts, carry loss."""
    made = RunConfig()
    return replace(
        made,
        model=replace(made.model, path=path),
        data=replace(made.data, answer_only=True, window_tokens=tokens, **data),
        loss_rows=replace(made.loss_rows, prompt_share=prompts),
        sparsity=replace(made.sparsity, **dict(sparsity)),
    )


FAR, DENSE = {"context_window": 0}, {"enabled": False}


@pytest.mark.parametrize("tokens", [16384, 65536])
@pytest.mark.parametrize("prompts", [0.05, 0.1, 0.4])
def test_local_rows_of_prompts_cost_less_than_far_ones_and_more_than_none(tokens, prompts):
    """Where answers alone fill the backward ratio: else drawn rows take the place of others that see all keys."""
    full = {"backward_ratio": 0.05}
    near, none = (forecast(of_answers(tokens=tokens, prompts=share, sparsity=full)) for share in (prompts, 0.0))
    far = replace(near.setting, loss_share=ANSWER_SHARE + prompts, local_share=0.0)
    assert (near.setting.loss_share, near.setting.local_share) == (ANSWER_SHARE, prompts)
    assert none.setting == replace(near.setting, local_share=0.0)
    card = CARDS["h100"]
    steps = [make_estimate(near.sizes, each, card) for each in (none.setting, near.setting, far)]
    assert steps[0].time.total_s < steps[1].time.total_s < steps[2].time.total_s
    assert steps[1].time.products_s == pytest.approx(steps[2].time.products_s), "as many rows pass gradient"
    ratio = near.setting.backward_ratio
    assert near.setting.kept_rows(ratio) == far.kept_rows(ratio) and near.setting.loss_rows == far.loss_rows
    text = f"10% attend to all keys, {prompts:.0%} and the rows without gradient within chunks of 2,048"
    assert text in describe(steps[1])


@pytest.mark.parametrize("sparsity", [FAR, DENSE, {"gradient": "rows"}, {"plan": None}, {"plan": 512}])
def test_rows_of_prompts_are_estimated_as_the_collator_marks_them(tmp_path, sparsity):
    """Far where recipe or plan have no window, gradients of rows alone, or no row skips; else local."""
    plan = None
    if "plan" in sparsity:
        plan = Plan((LayerPlan(1.0, 0.12),) * 32, gradient="keys", scorer="recent", context_window=sparsity["plan"])
        plan.save(tmp_path / "plan")
        sparsity = {"plan": str(tmp_path / "plan"), "context_window": 0 if plan.context_window else None}
    made = of_answers(sparsity=sparsity)
    local = training_collator(made, None, plan=plan).local
    setting = forecast(made).setting
    assert local == (plan is not None and plan.context_window == 512)
    assert (setting.local_share > 0) == local
    assert setting.loss_share + setting.local_share == pytest.approx(ANSWER_SHARE + 0.1)


def test_many_rows_of_prompts_leave_room_for_answers():
    for sparsity in ({}, FAR, DENSE):
        setting = forecast(of_answers(prompts=0.99, sparsity=sparsity)).setting
        assert setting.loss_share + setting.local_share == pytest.approx(1.0)


@pytest.fixture
def documents(tmp_path):
    """Documents of other lengths with a few answers, and one that is nothing but an answer; and their tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    ask = [{"question": "q", "answers": [words(30, seed=9)]}]
    rows = [{"text": words(n, seed=n), "qas": ask} for n in (300, 700, 1500)]
    rows.append({"text": "t", "qas": [{"question": "q", "answers": [words(900, seed=8)]}]})
    (tmp_path / "qas.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "qas.jsonl"), tokenizer


@pytest.mark.parametrize("prompts", [0.0, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("sparsity", [{}, FAR])
def test_data_are_counted_as_training_draws_them(documents, monkeypatch, prompts, sparsity):
    """Shares of rows and blocks with loss are those of real batches, and each step has every such block once."""
    path, tokenizer = documents
    made = of_answers(tokens=16384, prompts=prompts, sparsity=sparsity, train=(path,))
    steps, known = {}, gains_of_data.gain
    monkeypatch.setattr(
        gains_of_data, "gain", lambda *given: steps.setdefault(given[1].tokens, given[1]) and known(*given)
    )
    first = forecast(made)
    found = data_gain(made, first, look_at_data(made, first, tokenizer), CARDS["h100"])
    dataset, _ = load_windows(made.data, tokenizer, "train")
    collator = training_collator(made, tokenizer)
    drawn = [window_shares(collator([dataset[i]])["labels"][0].tolist(), 64) for i in range(len(dataset))]
    tokens = sum(t for t, _, _ in drawn)
    assert found.supervised_share == pytest.approx(sum(t * r for t, r, _ in drawn) / tokens, abs=0.01)
    assert found.forced_share == pytest.approx(sum(t * b for t, _, b in drawn) / tokens, abs=0.01)
    for i, (length, rows, blocks) in enumerate(drawn):
        step = steps[round(length / 256) * 256]
        answers, holding = window_shares(dataset[i]["labels"], 64)[1:]
        far = (answers, holding) if sparsity == {} else (rows, blocks)
        assert (step.loss_share, step.forced_share) == pytest.approx(far, abs=0.02)
        assert step.local_share == pytest.approx(blocks - far[1], abs=0.02)


def test_data_gain_most_from_answers_alone_and_more_from_local_rows_of_prompts_than_from_far_ones(documents):
    path, tokenizer = documents
    none, near = (of_answers(tokens=16384, prompts=share, train=(path,)) for share in (0.0, 0.3))
    found = [forecast(none), forecast(near)]
    setting = replace(found[1].setting, local_share=0.0)
    gains = [
        data_gain(made, each, look_at_data(made, each, tokenizer), CARDS["h100"])
        for made, each in ((none, found[0]), (near, found[1]), (near, replace(found[1], setting=setting)))
    ]
    assert gains[0].gain > gains[1].gain > gains[2].gain
    assert gains[0].forced_share < gains[1].forced_share == gains[2].forced_share


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_tiny_model(tmp_path / "model", layers=3, max_position_embeddings=512)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "book.txt").write_text(words(2000))
    talks = ([{**TALK[0], "content": f"Be brief, {i:02}."}, *TALK[1:]] for i in range(12))
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("data", ["book.txt", "chat.jsonl"])
def test_a_recipe_its_data_and_a_real_step(folder, data):
    """The drafted recipe is estimated without change; its windows are counted; the step runs here."""
    assert CliRunner().invoke(app, ["init", "model", data, "--out", "r.yaml", "--machine", "cpu"]).exit_code == 0
    (folder / "model" / "model.safetensors").rename(folder / "weights")  # nothing but configuration is read
    found = json.loads(run("r.yaml", "--data", "--probe", "--json", "--card", "l4"))
    gains = found["data"]
    assert gains["windows"] > 0 and 0 <= gains["gaining"] <= 1 and 0 < gains["gain"] <= gains["best"]
    assert found["probe"]["source"] == "resident" and found["probe"]["seconds"] > 0
    tokens = found["estimate"]["setting"]["tokens"]
    assert tokens == gains["longest_tokens"] == gains["largest"]["tokens"]
    assert any(f"most demanding window seen, {tokens:,} tokens" in note for note in found["notes"])
    assert not any("taken to be" in note for note in found["notes"])
    if data == "chat.jsonl":
        assert 0 < gains["supervised_share"] < 1
        assumed = json.loads(run("r.yaml", "--json", "--card", "l4"))
        assert any("--data counts them" in note for note in assumed["notes"])
        assert assumed["estimate"]["setting"]["tokens"] > tokens


def test_loss_on_nearly_all_rows_is_counted(folder):
    """Far and local rows together stay within all rows where shares of windows are rounded."""
    CliRunner().invoke(app, ["init", "model", "book.txt", "--out", "r.yaml", "--machine", "cpu"])
    shares = "loss_rows.share=0.876", "loss_rows.local_share=null", "sparsity.backward_ratio=0.9"
    found = json.loads(run("r.yaml", *shares, "--data", "--json", "--card", "l4"))
    assert found["estimate"]["setting"]["local_share"] == pytest.approx(0.124)
    assert found["data"]["supervised_share"] == pytest.approx(1.0)


def test_the_step_of_the_data_is_the_one_that_needs_most_memory(documents):
    """Not the longest one where a shorter one has more rows with loss."""
    path, tokenizer = documents
    made = of_answers(tokens=16384, prompts=0.0, sparsity={}, train=(path,))
    first, card = forecast(made), CARDS["h100"]
    found = data_gain(made, first, look_at_data(made, first, tokenizer), card)
    own = make_estimate(first.sizes, with_data(first, found).setting, card)
    dataset, _ = load_windows(made.data, tokenizer, "train")
    for i in range(len(dataset)):
        tokens, rows, blocks = window_shares(dataset[i]["labels"], 64)
        step = replace(first.setting, tokens=tokens, loss_share=rows, forced_share=blocks)
        assert make_estimate(first.sizes, step, card).needed_bytes <= 1.02 * own.needed_bytes
    assert own.setting.batch == first.setting.batch


@pytest.mark.parametrize("options", [(), ("--data",)])
def test_what_fits_says_how_long_a_run_takes(folder, options):
    CliRunner().invoke(app, ["init", "model", "chat.jsonl", "--out", "r.yaml", "--machine", "cpu"])
    steps = "training.max_steps=40", "training.recompute=layer"
    found = json.loads(run("r.yaml", *steps, *options, "--fit", "--json", "--card", "l4"))
    assert found["fit_run"]["batches"] == found["run"]["batches"]
    assert found["fit"]["step_s"] < found["estimate"]["step_s"]
    assert found["fit_run"]["training_s"] < found["run"]["training_s"]
    text = run("r.yaml", *steps, *options, "--fit", "--card", "l4")
    assert text.split("the fastest that fits")[1].count("run: ") == 1


def test_a_preset_beside_a_recipe_is_refused(folder):
    CliRunner().invoke(app, ["init", "model", "book.txt", "--out", "r.yaml", "--machine", "cpu"])
    result = CliRunner().invoke(app, ["estimate", "r.yaml", "--preset", "fast"])
    assert result.exit_code == 2 and "--preset" in result.output
