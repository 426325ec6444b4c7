"""Laws of a whole calibration on a tiny model: interrupted or not, one result, on the stream that training sees."""

import dataclasses
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lemo
from lemo.calibrate import session
from lemo.calibrate.collect import EDGE_WEIGHT, BypassFit, block_target, skip_weights
from lemo.calibrate.report import curves, print_report, recall
from lemo.calibrate.session import calibrate
from lemo.config import CalibrationConfig
from lemo.core.plan import Plan
from lemo.core.score import ScoreInputs
from lemo.core.target import TARGETS, target_scores
from lemo.errors import ConfigError, DataError
from lemo.runtime.batch import BatchContext, document_keys
from lemo.runtime.stream import LayerStream

TOKENS, BLOCK, LAYERS = 96, 8, 4
CONFIG = CalibrationConfig(
    compare_dense_fit=True,
    pooled_features=6,
    predictor_width=6,
    predictor_rank=3,
    predictor_steps=12,
    bypass_rank=4,
    tune_windows=1,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


def _batches(count=4, supervised=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index in range(count):
        blocks = torch.rand(1, TOKENS // BLOCK, generator=generator) < 0.25
        batches.append(
            {
                "input_ids": torch.randint(0, 50, (1, TOKENS), generator=generator),
                "supervised": blocks.repeat_interleave(BLOCK, 1) if supervised else None,
                "domain": "ab"[index % 2],
            }
        )
    return batches


def _skeleton(model, **choices):
    ratios = {"forward_ratio": 0.5, "backward_ratio": 0.5, "dense_layers": (0,), "block_size": BLOCK, "kv": "all"}
    return Plan.uniform(model, **{**ratios, **choices})


def _run(model, config=CONFIG, batches=None, skeleton=None, **options):
    batches = _batches() if batches is None else batches
    skeleton = _skeleton(model) if skeleton is None else skeleton
    return calibrate(model, batches, config, plan=skeleton, progress=False, **options)


def _same(first, second):
    for a, b in zip(first.layers, second.layers, strict=True):
        assert (a.predictor is None) == (b.predictor is None)
        if a.predictor is not None:
            assert all(torch.equal(x, b.predictor.state_dict()[k]) for k, x in a.predictor.state_dict().items())
        assert (a.bypass is None) == (b.bypass is None)
        if a.bypass is not None:
            assert torch.equal(a.bypass.down_MR, b.bypass.down_MR) and torch.equal(a.bypass.up_RM, b.bypass.up_RM)
        assert a.threshold == b.threshold


@pytest.fixture(scope="module")
def plain(model):
    return _run(model)


def test_a_plan_comes_out_and_the_model_is_as_before(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    plan = lemo.calibrate(model, _batches(), CONFIG, plan=_skeleton(model), progress=False)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert plan.scorer == "predictor" and plan.fingerprint is not None and not plan.needs_bypass
    assert [layer.predictor is None for layer in plan.layers] == [True, False, False, False]
    assert set(plan.provenance["losses"]) == {"dense", "sparse, dense fit", "sparse, sequential fit"}
    with lemo.attach(model, plan):
        ids = _batches(1)[0]["input_ids"]
        labels = ids.clone()
        labels[:, :48] = -100
        model(input_ids=ids, labels=labels).loss.backward()
    model.zero_grad()


def test_the_result_is_a_function_of_its_inputs(model, plain):
    torch.manual_seed(99)
    _same(plain, _run(model))


@pytest.mark.parametrize("scorer", ["recent", "random"])
@pytest.mark.parametrize("options", [{}, {"bypass_target": "update", "compare_dense_fit": False}])
def test_without_predictors_only_bypasses_are_fitted_on_rows_that_the_scorer_skips(model, scorer, options, tmp_path):
    config = dataclasses.replace(CONFIG, scorer=scorer, **options)
    plan = _run(model, config, output_dir=tmp_path)
    assert plan.scorer == scorer and all(x.predictor is None for x in plan.layers) and not plan.needs_bypass
    report = json.loads((tmp_path / "calibration-report.json").read_text())
    assert report["fits"]["sequential"]["recall"] == {} and report["losses"]["dense"]
    print_report(report)
    assert curves(report)["recall"] == {} and len(curves(report)["explained"]["sequential"]) == LAYERS - 1
    _same(plan, _run(model, config))
    _same(plan, Plan.load(tmp_path / "plan"))
    # The first layer that skips sees the dense stream: its fit can be made from scratch.
    fit, windows = BypassFit(24), _batches()[:-1]
    for batch in windows:
        stream = LayerStream.open(model, batch["input_ids"], supervised_BT=batch["supervised"], block_size=BLOCK)
        x_BTM = stream.dense(0, stream.hidden_BTM).output_BTM
        context = BatchContext(plan, stream.layout, in_place=False, document_keys_D=document_keys(stream.layout))
        kept_N = context.select(1, x_BTM[0]).forward.rows_N
        competing_N = (~stream.layout.forced_K)[stream.layout.block_of_row_N].float()
        weight_N = competing_N.clone()
        weight_N[kept_N] *= EDGE_WEIGHT
        fit.add(x_BTM[0], (stream.dense(1, x_BTM).output_BTM - x_BTM)[0], weight_N)
    wanted = fit.solve(CONFIG.bypass_rank, CONFIG.bypass_ridge)
    found = plan.layers[1].bypass
    assert torch.allclose(wanted.down_MR @ wanted.up_RM, found.down_MR @ found.up_RM, atol=1e-5)


def test_thresholds_need_the_scores_that_they_are_of(model):
    for changes, skeleton in (({"tune_steps": 1}, None), ({}, _skeleton(model, policy="threshold"))):
        with pytest.raises(ConfigError, match=r"needs scorer predictor .*the scorer is recent"):
            _run(model, dataclasses.replace(CONFIG, scorer="recent", **changes), skeleton=skeleton)


def test_an_interrupted_run_continues_to_the_same_plan(model, plain, tmp_path, monkeypatch):
    original, calls = session.fit_part, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 5:  # two sequential layers are finished by then
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(session, "fit_part", failing)
    with pytest.raises(KeyboardInterrupt):
        _run(model, output_dir=tmp_path)
    monkeypatch.setattr(session, "fit_part", original)
    resumed = []
    monkeypatch.setattr(session, "fit_part", lambda *args: (resumed.append(1), original(*args))[1])
    plan = _run(model, output_dir=tmp_path)
    _same(plain, plan)
    assert len(resumed) == 2 * 3 - 4
    _same(plain, Plan.load(tmp_path / "plan"))


def test_a_finished_run_is_only_loaded(model, plain, tmp_path, monkeypatch):
    _run(model, output_dir=tmp_path)

    def forbidden(*args, **kwargs):
        raise AssertionError("a finished stage ran again")

    monkeypatch.setattr(session.LayerCollector, "collect", forbidden)
    monkeypatch.setattr(session, "window_losses", forbidden)
    _same(plain, _run(model, output_dir=tmp_path))


def test_a_folder_of_another_calibration_is_refused(model, tmp_path):
    _run(model, output_dir=tmp_path)
    with pytest.raises(ConfigError, match="other options"):
        _run(model, dataclasses.replace(CONFIG, seed=1), output_dir=tmp_path)
    with pytest.raises(ConfigError, match="other options"):
        _run(model, batches=_batches(seed=5), output_dir=tmp_path)


def test_the_memory_limit_moves_streams_to_files_and_changes_nothing(model, plain, tmp_path):
    tight = dataclasses.replace(CONFIG, memory_limit_gib=1e-9)
    _same(plain, _run(model, tight, output_dir=tmp_path))
    assert not list((tmp_path / "streams").glob("*.safetensors"))
    with pytest.raises(ConfigError, match="memory_limit_gib"):
        _run(model, tight)


@pytest.mark.parametrize("aim", ["update", "dense_stream"])
def test_a_layer_is_fitted_on_the_sparse_stream_of_the_layers_before(model, aim):
    # Rebuild the streams at layer 2 from the plan itself and solve for the bypass again.
    plain = _run(model, dataclasses.replace(CONFIG, bypass_target=aim))
    model.eval()
    fit = BypassFit(24)
    for batch in _batches()[:3]:
        stream = LayerStream.open(model, batch["input_ids"], supervised_BT=batch["supervised"], block_size=BLOCK)
        x = stream.sparse(1, stream.sparse(0, stream.hidden_BTM, plain), plain)
        trace = stream.dense(2, x, ("attention",))
        inputs = ScoreInputs(stream.layout, None, trace.query_HND, trace.key_GND, trace.scaling)
        target = target_scores(CONFIG.target, inputs, CONFIG.query_stride).block_K
        dense = stream.hidden_BTM
        for layer in range(3):
            dense = stream.dense(layer, dense).output_BTM
        reached = trace.output_BTM if aim == "update" else dense
        update = (reached - x).flatten(0, 1)
        fit.add(x.flatten(0, 1), update, skip_weights(stream.layout, target, 0.5))
    expected = fit.solve(4, CONFIG.bypass_ridge)
    found = plain.layers[2].bypass
    torch.testing.assert_close(found.down_MR @ found.up_RM, expected.down_MR @ expected.up_RM, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_target_can_be_learnt_and_is_what_recall_is_measured_against(model, plain, target, tmp_path):
    config = dataclasses.replace(CONFIG, target=target)
    plan = _run(model, config, output_dir=tmp_path)
    assert plan.provenance["config"]["target"] == target
    assert all(layer.predictor is not None for layer in plan.layers[1:])
    for layer in plan.layers[1:]:
        assert layer.predictor.projection_MF.isfinite().all() and layer.bypass.down_MR.isfinite().all()
    stage = json.loads((tmp_path / "calibration-report.json").read_text())["fits"]["sequential"]
    positions = [row["position_mass_0.3"] for row in stage["rows"]]
    layer, batch = 1, _batches()[3]  # the held-out window
    stream = LayerStream.open(model.eval(), batch["input_ids"], supervised_BT=batch["supervised"], block_size=BLOCK)
    x = stream.sparse(0, stream.hidden_BTM, plan)
    wanted = block_target(stream.dense(layer, x, ("attention",)), stream.layout, config).block_K
    row = next(r for r in stage["rows"] if r["layer"] == layer)
    scores = plan.layers[layer].predictor.scores(x.flatten(0, 1), stream.layout)
    assert recall(scores, wanted, stream.layout, 0.3) == pytest.approx((row["recall_0.3"], row["mass_0.3"]), rel=1e-4)
    assert len(positions) == LAYERS - 1


@pytest.mark.parametrize("loss", [None, "everywhere", "and padding", "some"])
def test_predictors_are_told_where_loss_is_only_where_they_learned_it(model, loss):
    batches = _batches(supervised=loss == "some")
    for batch in batches:
        if loss in ("everywhere", "and padding"):
            batch["supervised"] = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        if loss == "and padding":
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][:, -BLOCK:] = batch["supervised"][:, -BLOCK:] = 0
    plan = _run(model, dataclasses.replace(CONFIG, compare_dense_fit=False), batches)
    assert plan.provenance["config"]["target"] == ("mass_loss_rows" if loss == "some" else "attention_mass")
    told = {layer.predictor.loss_distance for layer in plan.layers if layer.predictor is not None}
    assert told == {loss == "some"}


def test_own_mlp_rows_get_their_own_predictor_and_bypass(model):
    skeleton = _skeleton(model, mlp="own")
    for index in (1, 2, 3):
        skeleton = skeleton.replace_layer(index, mlp_ratio=0.4)
    plan = _run(model, skeleton=skeleton)
    for layer in plan.layers[1:]:
        assert layer.mlp_ratio == 0.4 and layer.mlp_predictor is not None and layer.mlp_bypass is not None
        assert not torch.equal(layer.mlp_bypass.down_MR, layer.bypass.down_MR)


def test_exact_forward_needs_no_bypass(model):
    plan = _run(model, skeleton=_skeleton(model, forward_ratio=1.0))
    assert all(layer.bypass is None and layer.predictor is not None for layer in plan.layers[1:])
    assert plan.provenance["losses"] == {}


def test_pruning_keeps_within_the_goal(model, plain):
    plan = _run(model, dataclasses.replace(CONFIG, prune_to=0.65))
    for layer, full in zip(plan.layers[1:], plain.layers[1:], strict=True):
        assert layer.predictor.parameter_count() <= 0.65 * full.predictor.parameter_count()


@pytest.mark.parametrize("policy", ["threshold", "topk"])
def test_tuning_keeps_the_mean_ratio(model, policy, tmp_path):
    config = dataclasses.replace(CONFIG, tune_steps=1)
    plan = _run(model, config, skeleton=_skeleton(model, policy=policy), output_dir=tmp_path)
    tuning = json.loads((tmp_path / "tune.json").read_text())
    assert plan.policy == policy and all(layer.threshold is not None for layer in plan.layers[1:])
    for entry in tuning["history"]:
        assert sum(entry["ratios"].values()) / 3 == pytest.approx(0.5, abs=0.03)
    losses = [entry["loss"] for entry in tuning["history"]]
    chosen = next(e for e in tuning["history"] if e["thresholds"] == tuning["thresholds"])
    assert chosen["loss"] == min(losses)


def test_unequal_batches_padding_and_packing_are_taken(model):
    batches = _batches(3, supervised=False)
    mask = torch.ones(1, TOKENS, dtype=torch.int64)
    mask[:, -20:] = 0
    batches[0]["attention_mask"] = mask
    batches[1]["position_ids"] = torch.cat([torch.arange(40), torch.arange(TOKENS - 40)])[None]
    batches[2] = {"input_ids": torch.randint(0, 50, (2, 56))}
    plan = _run(model, batches=batches)
    assert not plan.needs_bypass


def test_bad_batches_are_named(model):
    with pytest.raises(DataError, match="at least one"):
        _run(model, batches=[])
    with pytest.raises(DataError, match="batch 1: input_ids"):
        _run(model, batches=[*_batches(1), {"domain": "x"}, *_batches(1)])
    wrong = _batches(2)
    wrong[0]["supervised"] = torch.zeros(1, 3, dtype=torch.bool)
    with pytest.raises(DataError, match="batch 0: supervised"):
        _run(model, batches=wrong)
    with pytest.raises(ConfigError, match="exact forward"):
        _run(model, dataclasses.replace(CONFIG, tune_steps=1), skeleton=_skeleton(model, forward_ratio=1.0))
