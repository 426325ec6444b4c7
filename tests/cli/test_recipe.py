"""Recipes: what is read is what was written, and every mistake is one line that names key and file."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemo.cli.recipe import _OTHER_NAMES, _keys, build_run, dump_recipe, load_recipe, parse_yaml
from lemo.config import DataConfig, ModelConfig, RunConfig, SparsityConfig, TrainingConfig, resolved
from lemo.errors import ConfigError

GOOD = "output: out\nmodel: {path: m}\ndata: {train: [a.txt]}\n"


def recipe(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def test_defaults_are_those_of_the_dataclasses(tmp_path):
    run = load_recipe(recipe(tmp_path, GOOD))
    assert run == RunConfig(output="out", model=ModelConfig(path="m"), data=DataConfig(train=("a.txt",)))


@given(
    rate=st.floats(1e-9, 1.0),
    ratio=st.floats(0.01, 1.0),
    window=st.integers(2, 10**7),
    layers=st.lists(st.integers(-50, 50), max_size=4),
    name=st.text(min_size=1, max_size=12).filter(lambda t: t.isprintable()),
)
def test_a_dumped_recipe_reads_back_equal(tmp_path_factory, rate, ratio, window, layers, name):
    run = RunConfig(
        output=name,
        model=ModelConfig(path=name),
        data=DataConfig(train=(name, "no", "1e-4"), window_tokens=window),
        sparsity=SparsityConfig(forward_ratio=ratio, backward_ratio=ratio, dense_layers=tuple(layers)),
        training=TrainingConfig(learning_rate=rate, max_steps=3),
    )
    path = tmp_path_factory.mktemp("r") / "r.yaml"
    path.write_text(dump_recipe(run), encoding="utf-8")
    assert resolved(load_recipe(path)) == resolved(run)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("010", 10),
        ("16_384", 16384),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-4'", "1e-4"),
        ("[0, -1]", [0, -1]),
    ],
)
def test_yaml_scalars_are_those_of_version_1_2(text, value):
    read = parse_yaml(text, "x")
    assert read == value
    assert type(read) is type(value)


def test_overrides_win_and_are_typed(tmp_path):
    path = recipe(tmp_path, GOOD + "training:\n")
    run = load_recipe(
        path,
        [
            "training.learning_rate=3e-4",
            "training.max_steps=7",
            "data.train=[x.txt, y.npz]",
            "sparsity.enabled=false",
            "data.max_windows=5",
            "data.max_windows=null",
            "model.gguf_file=a=b.gguf",
        ],
    )
    assert (run.training.learning_rate, run.training.max_steps) == (3e-4, 7)
    assert run.data.train == ("x.txt", "y.npz")
    assert (run.sparsity.enabled, run.data.max_windows, run.model.gguf_file) == (False, None, "a=b.gguf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {learning_rte: 1}", "unknown key training.learning_rte; did you mean training.learning_rate?"),
        ("trainng: {}", "unknown key trainng; did you mean training?"),
        ("learning_rate: 1", "unknown key learning_rate; did you mean training.learning_rate?"),
        ("sparsity: {max_steps: 1}", "unknown key sparsity.max_steps; did you mean training.max_steps?"),
        ("lora: {zzz: 1}", "unknown key lora.zzz; keys there are rank, alpha, dropout, targets, modules_to_save"),
        ("training: {learning_rate: fast}", "training.learning_rate must be a number, got the text 'fast'"),
        ("training: {learning_rate: '1e-4'}", "training.learning_rate must be a number, got the text '1e-4'"),
        ("training: {learning_rate: .nan}", "training.learning_rate must be a"),
        ("training: {max_steps: 1.5}", "training.max_steps must be an integer, got 1.5"),
        ("training: {max_steps: true}", "training.max_steps must be an integer, got true"),
        ("sparsity: {enabled: yes}", "sparsity.enabled must be true or false, got the text 'yes'"),
        (
            "training: {offload: values}",
            "training.offload must be true or false or one of inputs, keys, got the text 'values'",
        ),
        ("sparsity: {kv: some}", "sparsity.kv must be one of kept, all, got the text 'some'"),
        ("sparsity: {block_size: 64.5}", "sparsity.block_size must be an integer, got 64.5"),
        ("sparsity: {block_size: 0}", "sparsity.block_size must be positive, got 0"),
        ("sparsity: {block_size: -64}", "sparsity.block_size must be positive, got -64"),
        ("sparsity: {forward_ratio: 0}", "sparsity.forward_ratio must lie in (0, 1], got 0"),
        ("sparsity: {forward_ratio: 1.2}", "sparsity.forward_ratio must lie in (0, 1], got 1.2"),
        ("sparsity: {backward_ratio: -0.1}", "sparsity.backward_ratio must lie in (0, 1], got -0.1"),
        (
            "sparsity: {forward_ratio: 0.3, backward_ratio: 0.5}",
            "sparsity.backward_ratio (0.5) must not exceed sparsity.forward_ratio (0.3)",
        ),
        (
            "sparsity: {forward_ratio: 0.5}\ncalibration: {bypass_rank: 0}",
            "rows that skip layers without a bypass ruin the model",
        ),
        ("loss_rows: {share: 0.0}", "loss_rows.share must lie in (0, 1]"),
        ("loss_rows: {local_share: 1.0}", "loss_rows.local_share must lie in [0, 1)"),
        (
            "loss_rows: {local_share: 0.2}\nsparsity: {context_window: 0}",
            "loss_rows.local_share needs sparsity.context_window",
        ),
        (
            "loss_rows: {local_share: 0.2}\nsparsity: {context_window: 128, gradient: rows}",
            "loss_rows.local_share needs sparsity.context_window, within which such rows attend, and sparsity.gradient",
        ),
        ("loss_rows: {local_share: 0.9}\nsparsity: {context_window: 128}", "add up to 1.02, above 1"),
        (
            "loss_rows: {local_share: 0.2, placement: tail}\nsparsity: {context_window: 128}",
            "goes with placement random or spread, not with 'tail'",
        ),
        ("loss_rows: {local_share: 0.2, reweight: true}\nsparsity: {context_window: 128}", "cannot be reweighted"),
        (
            "loss_rows: {local_share: 0}\nsparsity: {local_forward: all}",
            "sparsity.local_forward is of local loss rows, which this recipe does not have",
        ),
        ("data: {answer_only: true}\nsparsity: {local_forward: near}", "sparsity.local_forward is of local loss rows"),
        ("sparsity: {local_forward: far}", "sparsity.local_forward must be"),
        ("sparsity: {far_share: 0}", "far_share must lie in (0, 1], got 0"),
        ("sparsity: {far_share: 0.5, gradient: pairs}", "`pairs` reads kept keys only"),
        (
            "sparsity: {forward_ratio: 0.5, backward_ratio: 0.5, far_share: 0.5}",
            "sparsity.far_share is of exact forward",
        ),
        ("sparsity: {context_window: 100}", "context_window must be a positive multiple of block_size (64), got 100"),
        (
            "sparsity: {forward_ratio: 0.5, backward_ratio: 0.5, context_window: 128}",
            "sparsity.context_window is for rows that run forward only",
        ),
        ("sparsity: {mlp: own}", "set sparsity.mlp_ratio"),
        ("sparsity: {mlp_ratio: 0.2}", "sparsity.mlp_ratio needs sparsity.mlp=own"),
        ("model: {path: m, context_length: 100}", "data.window_tokens (4096) exceeds model.context_length (100)"),
        ("model: 3", "model must be a section with keys of its own, got 3"),
        ("data: {train: a.txt}", "data.train must be a list of texts, got the text 'a.txt'; write train: [a.txt]"),
        ("data: {train: [a.txt, 3]}", "data.train must be a list of texts, got 3"),
        ("model: {}", "model.path is empty"),
        ("training: {max_steps: 0}", "training.max_steps must be positive"),
        ("training: {seed: -1}", "training.seed must not be negative, got -1"),
        ("training: {seed: 4294967296}", "training.seed must be below 2^32, as NumPy's seeds are, got 4294967296"),
        ("calibration: {scorer: random}", "calibration.scorer is random, but the run's scorer is recent"),
        ("training: {max_steps: 1, max_steps: 2}", "line 4: key 'max_steps' stands twice"),
        ("training: {max_steps: 1", "line 5: "),
        ("training: {1: 2}", "key 1 is no text"),
        ("training: !!python/object:os.system {}", "line 4: could not determine a constructor"),
        ("sparsity: {plan: p, forward_ratio: 0.9}", "sparsity.forward_ratio stands beside sparsity.plan"),
    ],
)
def test_mistakes_are_one_line_with_key_and_file(tmp_path, text, message):
    good = (
        GOOD
        if not text.startswith(("model:", "data:"))
        else "\n".join(line for line in GOOD.splitlines() if not line.startswith(text.split(":")[0])) + "\n"
    )
    path = recipe(tmp_path, good + text + "\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_each_mistake_has_its_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe(tmp_path, GOOD + "lora: {rnk: 8, alpha: big}\n"))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rte=1", "command line: unknown key training.learning_rte; did you mean"),
        ("training.learning_rate=fast", "command line: training.learning_rate must be a number"),
        ("sparsity.forward_ratio=2", "command line: sparsity.forward_ratio must lie in (0, 1], got 2"),
        ("training.learning_rate", "command line: 'training.learning_rate' is no override"),
        ("--debug=1", "is no override"),
        ("traning.max_steps=4", "command line: unknown key traning; did you mean training?"),
        ("lr=1e-4", "command line: unknown key lr; did you mean training.learning_rate?"),
        ("lora.r=8", "command line: unknown key lora.r; did you mean lora.rank?"),
        ("training.max_seq_length=8", "did you mean data.window_tokens?"),
        ("batch_size=2", "did you mean training.batch_size?"),
        ("data.train=texts", "data.train must be a list of texts, got the text 'texts'; write data.train=[texts]"),
        ("lora.targets=q_proj", "got the text 'q_proj'; write lora.targets=[q_proj]"),
        ("output.x=1", "command line: output.x cannot be set, output is no section"),
        ("training.max_steps=[1", "command line, training.max_steps, line 1"),
    ],
)
def test_bad_overrides_name_the_command_line(tmp_path, override, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe(tmp_path, GOOD), [override])
    assert message in str(caught.value)


def test_validation_of_the_command_line_replaces_what_the_recipe_holds_out(tmp_path, caplog):
    path = recipe(tmp_path, GOOD.replace("data: {", "data: {held_out_share: 0.1, "))
    assert load_recipe(path).data.held_out_share == 0.1 and not caplog.messages
    data = load_recipe(path, ["data.validation=[v.txt]"]).data
    assert (data.validation, data.held_out_share) == (("v.txt",), 0.0)
    assert caplog.messages == [f"{path}: data.held_out_share does not count, the command line names data.validation"]
    with pytest.raises(ConfigError, match=r"^command line: .* or set data\.held_out_share=0$"):
        load_recipe(path, ["data.validation=[v.txt]", "data.held_out_share=0.2"])
    both = recipe(tmp_path, GOOD.replace("data: {", "data: {held_out_share: 0.1, validation: [v.txt], "))
    with pytest.raises(ConfigError, match="remove one of them"):
        load_recipe(both)


def test_names_of_other_tools_lead_to_keys():
    """Each to one that there is, and none is a key itself."""
    known = set(_keys(RunConfig))
    assert set(_OTHER_NAMES.values()) <= known
    assert not set(_OTHER_NAMES) & {key.rpartition(".")[2] for key in known}


def test_unreadable_recipes_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: the recipe cannot be read \(no such file\)"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="a recipe is a mapping of keys, got the list"):
        load_recipe(recipe(tmp_path, "- a\n- b\n"))
    with pytest.raises(ConfigError, match=r"model\.path is empty"):
        load_recipe(recipe(tmp_path, ""))


def test_every_range_key_exists_and_is_checked():
    from lemo.train import checks

    good = {"output": "o", "model": {"path": "m"}}
    for names, bad in ((checks._POSITIVE, -1), (checks._NOT_NEGATIVE, -1), (checks._SHARES, 1.5)):
        for key in names:
            section, name = key.split(".")
            values = {**good, section: {**good.get(section, {}), name: bad}}
            with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
                build_run(values)
    assert dataclasses.is_dataclass(build_run(good))


def test_answers_are_no_local_rows(tmp_path):
    """What a recipe says of drawn rows is in force where rows are drawn."""
    text = GOOD + "loss_rows: {local_share: 0.3}\n"
    for answers, share in ((False, 0.3), (True, 0.0)):
        run = load_recipe(recipe(tmp_path, text), [f"data.answer_only={answers}".lower()])
        assert run.local_share == resolved(run)["loss_rows"]["local_share"] == share
        assert run.local_forward == resolved(run)["sparsity"]["local_forward"] == (None if answers else "near")
    run = dataclasses.replace(run, sparsity=SparsityConfig(block_size=0))
    assert run.context_window is None, "check_run names the key"


def test_answers_are_learned_with_what_their_questions_name(tmp_path):
    """A recipe without a scorer: `words` where there are questions and no row skips forward; a named one stays."""
    found = []
    for text in ("{}", "{forward_ratio: 0.5, backward_ratio: 0.5}", "{scorer: random}"):
        for answers in ("true", "false"):
            run = load_recipe(recipe(tmp_path, f"{GOOD}sparsity: {text}\n"), [f"data.answer_only={answers}"])
            assert run.scorer == resolved(run)["sparsity"]["scorer"]
            found.append(run.scorer)
    assert found == ["words", "recent", "recent", "recent", "random", "random"]


def test_the_saved_recipe_of_a_run_with_a_plan_loads(tmp_path):
    """A plan brings its own choices; the recipe stored beside a run's output leaves out what it overrides."""
    run = load_recipe(recipe(tmp_path, GOOD))
    run = dataclasses.replace(run, sparsity=SparsityConfig(plan="p", kv="kept", forward_ratio=0.7, backward_ratio=0.3))
    saved = tmp_path / "saved.yaml"
    for text in (dump_recipe(run), json.dumps(resolved(run))):
        saved.write_text(text, encoding="utf-8")
        read = load_recipe(saved)
        assert read.sparsity == SparsityConfig(plan="p") and read.loss_rows.local_share == run.local_share
        assert resolved(read) == resolved(run)


def test_a_recipe_beside_a_plan_that_is_none_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("[]")
    (tmp_path / "mine.yaml").write_text(f"{GOOD}\nsparsity: {{plan: {tmp_path / 'plan'}}}\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: a recipe is a mapping of keys, got the list"):
        load_recipe(tmp_path / "mine.yaml")
