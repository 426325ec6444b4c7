"""The training benchmark on a tiny model: peers agree where they must, runs resume, Records are sound."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import check_bars, training
from benchmarks.peers import hf_peft, jenga_rule, longlora_s2
from benchmarks.peers.peer import Setting, Unsupported, load_method, parse_method
from benchmarks.training_cell import Job, make_batches, read_job, run_job
from benchmarks.training_presets import Comparison, Group, estimate_turn_seconds, presets
from benchmarks.training_records import make_records, read_cells
from lemo.measure.record import read_records
from lemo.ops.attend_rows import far
from lemo.train.rehearsal import SHAPES, random_model, shape_config
from tests.train.tiny import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shapes") / "tiny"
    tiny_llama().config.save_pretrained(path)
    return path


@pytest.fixture
def setting(folder) -> Setting:
    return Setting(str(folder), 256, dtype="float32", device="cpu", block_size=16)


def run(setting: Setting, method: str, **changes) -> dict:
    return run_job(Job(setting, method, **{"turn": 0, "steps": 2, "warmup": 1, **changes}))


# -- peers -----------------------------------------------------------------------------------------------------------

EXACT = ["hf_peft:recompute=layer", "trl_chunked", "offload", "lemo_dense:engine=auto", "lemo_dense", "lemo:keep=1"]


@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_have_the_losses_of_the_plain_model(setting, method):
    """Over three optimizer steps, so gradients agree too."""
    expected = run(setting, "hf_peft")
    found = run(setting, method)
    assert found["status"] == "ok", found.get("reason")
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-5)


@pytest.mark.parametrize("lora", ["qkvo", "all"])
@pytest.mark.parametrize("engine", ["fused", "generic"])
def test_lemo_runs_the_rows_that_were_asked_for(setting, lora, engine):
    found = run(dataclasses.replace(setting, lora=lora), f"lemo:engine={engine},keep=0.5,share=0.25,kv=all")
    assert found["status"] == "ok", found.get("reason")
    assert found["describe"]["layers_that_skip"] == 1
    assert found["describe"]["backward_share"] == pytest.approx((1 + 0.5 + 1) / 3)


def test_exact_forward_has_the_dense_loss_on_runs_of_rows_and_offload_changes_nothing(setting, monkeypatch):
    """The first loss is the plain model's on the same runs; offload repeats every later one to the bit."""
    rows = "share=0.25,span=32"
    exact = f"lemo:keep=0.3,forward=1.0,gradient=keys,scorer=random,kv=all,dense=,{rows}"
    plain, found, offloaded = (run(setting, method) for method in (f"hf_peft:{rows}", exact, exact + ",offload=1"))
    assert found["status"] == offloaded["status"] == "ok", (found.get("reason"), offloaded.get("reason"))
    assert found["losses"][0] == pytest.approx(plain["losses"][0], rel=2e-5)
    assert found["losses"] == offloaded["losses"]
    assert found["describe"]["forward_share"] == 1 and found["describe"]["backward_share"] < 0.5
    keys = run(setting, exact + ",offload=keys,recompute=lin")
    assert keys["losses"] == pytest.approx(found["losses"], rel=2e-5)
    assert run(setting, exact + ",offload=yes")["status"] == "unsupported"
    with monkeypatch.context() as patch:
        patch.setattr(far, "FAR_STRIPE", 16)
        sampled = run(setting, exact + ",far=0.25")
    assert sampled["losses"][0] == found["losses"][0] and sampled["losses"] != found["losses"], sampled.get("reason")
    near = run(setting, exact + ",context=32")
    assert near["status"] == "ok" and near["losses"] != found["losses"], near.get("reason")
    local = run(setting, exact + ",context=32,local=0.25")
    assert local["status"] == "ok", local.get("reason")
    assert local["describe"]["backward_share"] > near["describe"]["backward_share"] + 0.15
    assert run(setting, exact + ",local=0.25")["status"] == "unsupported", "no window"


@pytest.mark.parametrize("share", [0.25, 0.4])
def test_supervised_rows_come_in_runs(setting, share):
    """Runs of `span` rows, one of them perhaps shorter; as many rows as without runs."""
    (single,), (runs,) = (list(make_batches(setting, 512, 1, span)) for span in (None, 64))
    single, runs = (batch["labels"][0] != -100 for batch in (single, runs))
    changes = int((runs[1:] != runs[:-1]).sum())
    assert abs(int(runs.sum()) - int(single.sum())) <= 1 and changes <= 2 * -(-int(runs.sum()) // 64) + 1


@pytest.mark.parametrize("method", ["longlora_s2", "jenga_rule", "random_ltd"])
def test_inexact_methods_train(setting, method):
    found = run(setting, method)
    assert found["status"] == "ok", found.get("reason")
    assert len(found["seconds"]) == len(found["phases"]["backward"]) == 2 and min(found["seconds"]) > 0
    assert found["losses"] != run(setting, "hf_peft")["losses"]


def test_one_shifted_group_of_unshifted_heads_is_plain_causal_attention():
    q, k, v = torch.randn(3, 1, 4, 32, 8).unbind()
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    grouped = longlora_s2.shifted_groups(q, k, v, 4, None)
    assert torch.allclose(grouped[:, :8, :2], plain[:, :8, :2], atol=1e-6), "first group, heads that stay"
    assert not torch.allclose(grouped[:, 8:, :2], plain[:, 8:, :2], atol=1e-3), "later groups see less"
    shifted = torch.nn.functional.scaled_dot_product_attention(
        q[:, 2:, 4:12], k[:, 2:, 4:12], v[:, 2:, 4:12], is_causal=True
    )
    assert torch.allclose(grouped[:, 4:12, 2:], shifted.transpose(1, 2), atol=1e-6), "shifted by half a group"


def test_the_pruned_mlp_is_exact_with_all_channels_and_saves_a_share():
    x = torch.randn(2, 8, 6, dtype=torch.float64, requires_grad=True)
    gate, up, down = torch.randn(10, 6).double(), torch.randn(10, 6).double(), torch.randn(6, 10).double()
    assert torch.autograd.gradcheck(lambda x: jenga_rule.PrunedMlp.apply(x, gate, up, down, 1.0), (x,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape[-1]) or t, lambda t: t):
        out = jenga_rule.PrunedMlp.apply(x, gate, up, down, 0.2)
    assert saved[:2] == [2, 2]
    reference = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert torch.equal(out, reference)


def test_adapters_have_the_dtype_that_was_asked_for(folder):
    setting = Setting(str(folder), 64, dtype="bfloat16", device="cpu")
    config = shape_config(setting.shape, tokens=64)
    for adapter, dtype in (("float32", torch.float32), ("model", torch.bfloat16)):
        model = hf_peft.prepare(config, setting, {"adapter": adapter, "recompute": "none"}).model
        trained = {p.dtype for p in model.parameters() if p.requires_grad}
        assert trained == {dtype}


def test_what_cannot_run_is_a_result_with_its_reason(setting, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for method in ("liger", "unsloth"):
        found = run(setting, method)
        assert found["status"] == "unsupported" and "not installed" in found["reason"]
    found = run(setting, "hf_peft:recompute=mlp")
    assert found["status"] == "unsupported" and "'mlp'" in found["reason"]


def test_out_of_memory_is_a_result(setting, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 99 GiB")

    monkeypatch.setattr(hf_peft, "plain_forward", lambda model: fail)
    found = run(setting, "hf_peft")
    assert found["status"] == "out of memory" and "99 GiB" in found["reason"]


def test_unknown_methods_and_options_are_named():
    assert parse_method("lemo:keep=0.5,kv=all") == ("lemo", {"keep": "0.5", "kv": "all"})
    for method, words in (("lmeo", "lmeo"), ("lemo:kepe=1", "kepe"), ("lemo:keep", "KEY=VALUE")):
        with pytest.raises(Unsupported, match=words):
            load_method(method)


# -- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "billions"),
    [("llama2-7b", 6.738), ("llama3-8b", 8.030), ("opt-6.7b", 6.658), ("opt-1.3b", 1.316), ("smollm2-135m", 0.1345)],
)
def test_shapes_have_the_parameters_of_their_models(shape, billions):
    config = shape_config(shape, tokens=2048)
    with torch.device("meta"):
        model = random_model(config, dtype=torch.bfloat16, device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert shape_config(shape, tokens=131072).max_position_embeddings == 131072


# -- turns, work file, Records ---------------------------------------------------------------------------------------


class InProcess:
    """A pool that runs turns in this process."""

    ran: list[str]

    def __init__(self) -> None:
        InProcess.ran = []

    def run(self, turn, limit_s, following):
        InProcess.ran.append(f"{turn.method} {turn.turn}")
        return run_job(
            Job(turn.group.setting, turn.method, turn.turn, turn.group.steps_of(turn.turn), turn.group.warmup)
        )

    def close(self) -> None:
        pass


@pytest.fixture
def command(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "Pool", InProcess)
    fixed = ["--shape", str(folder), "--tokens", "256", "--device", "cpu", "--dtype", "float32", "--steps", "2"]
    fixed += ["--warmup", "1", "--work", str(tmp_path / "work.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    return lambda *arguments: training.main([*fixed, *arguments])


def test_methods_take_turns_and_a_second_run_measures_nothing(command, tmp_path, capsys):
    methods = ["--methods", "hf_peft,lemo:keep=0.5+share=0.25"]
    assert command(*methods) == 0
    lemo = "lemo:keep=0.5,share=0.25"
    assert InProcess.ran == ["hf_peft 0", f"{lemo} 0", "hf_peft 1", f"{lemo} 1"]
    records = {r.name: r for r in read_records(tmp_path / "out.jsonl")}
    step = records[f"training/tiny/256/qkvo/{lemo}/step_time"]
    assert len(step.samples) == 2 and step.setting["supervised_share"] == 0.25
    assert str(tmp_path) not in json.dumps(dataclasses.asdict(step))
    assert records["training/tiny/256/qkvo/hf_peft/step_time"].setting["options"]["adapter"] == "float32"
    assert check_bars.main([str(tmp_path / "out.jsonl")]) == 0
    assert command(*methods) == 0
    assert InProcess.ran == [] and "0 new Records" in capsys.readouterr().out
    assert command(*methods, "--fresh", "lemo") == 0
    assert InProcess.ran == [f"{lemo} 0", f"{lemo} 1"]


def test_a_turn_that_does_not_fit_the_budget_waits_for_the_next_command(command, tmp_path, capsys):
    assert command("--methods", "hf_peft", "--budget-seconds", "0") == 3
    assert InProcess.ran == [] and "are left" in capsys.readouterr().out
    assert command("--methods", "hf_peft") == 0
    assert len(read_cells(tmp_path / "work.jsonl")) == 2


def test_a_method_that_cannot_run_is_asked_once(command, capsys):
    assert command("--methods", "hf_peft:recompute=mlp,hf_peft") == 0
    assert InProcess.ran == ["hf_peft:recompute=mlp 0", "hf_peft 0", "hf_peft 1"]
    assert "unsupported" in capsys.readouterr().out


def test_a_real_child_process_answers(setting, tmp_path):
    pool = training.Pool()
    group = Group(setting, ("hf_peft",), steps=2, warmup=1)
    try:
        found = pool.run(training.Turn(group, "hf_peft", 0), 300.0, 0)
    finally:
        pool.close()
    assert found["status"] == "ok" and found["losses"] == run(setting, "hf_peft", steps=1, probe=True)["losses"]


@pytest.mark.parametrize(
    ("code", "limit_s", "status"),
    [("raise SystemExit('what broke')", 60.0, "failed"), ("import time; time.sleep(60)", 0.5, "timeout")],
)
def test_a_child_that_breaks_or_hangs_is_said(setting, monkeypatch, code, limit_s, status):
    monkeypatch.setattr(training.Pool, "COMMAND", (sys.executable, "-c", code))
    found = training.Pool().run(training.Turn(Group(setting, ("hf_peft",)), "hf_peft", 0), limit_s, 0)
    assert found["status"] == status and (status == "timeout" or "what broke" in found["reason"])


def test_jobs_survive_the_pipe(setting):
    job = Job(setting, "lemo", 1, 3, 2, True)
    read, path = read_job(json.dumps({"job": dataclasses.asdict(job), "result": "x"}))
    assert read == job and path == Path("x")


def cell(seconds: float, peak: float, command: str = "c", **changes) -> dict:
    """A finished turn as the work file has it."""
    phases = {name: [seconds / 3] for name in ("forward", "backward", "optimizer")}
    made = {"status": "ok", "seconds": [seconds], "peak_gib": peak, "reserved_gib": peak + 1, "phases": phases}
    made |= {"held_bytes": [2**30], "memory_source": "cuda", "losses": [1.0], "describe": {}, "command": command}
    made |= {"device": "a GPU", "versions": {"torch": "2"}, "commit": "c0ffee", "time": "2026-01-01T00:00:00+00:00"}
    return made | changes


def cells_of(group: Group, **turns: tuple[float, float, str]) -> dict:
    """Cells of a group, one (seconds, peak, command) for both turns of each method."""
    found = {}
    for method, (seconds, peak, name) in zip(group.methods, turns.values(), strict=True):
        options = load_method(method)[1]
        for turn in (0, 1):
            key = training.Turn(group, method, turn).key
            found[key] = cell(seconds, peak, name, options=options, method=method, turn=turn)
    return found


GROUP = Group(
    Setting("llama2-7b", 8192),
    ("liger", "liger:adapter=model", "lemo:keep=0.5"),
    (
        Comparison("lemo:keep=0.5", ("liger", "liger:adapter=model"), "time", "C.8k_k50"),
        Comparison("lemo:keep=0.5", ("liger", "liger:adapter=model"), "memory"),
        Comparison("lemo:keep=0.5", (), "gib", "C.8k_gib"),
    ),
    steps=2,
)


def test_the_strongest_baseline_counts_and_bars_are_answered(tmp_path, capsys):
    cells = cells_of(GROUP, fp32=(4.0, 40.0, "c"), bf16=(3.0, 44.0, "c"), lemo=(1.0, 20.0, "c"))
    records, remarks = make_records([GROUP], cells)
    found = {r.name.rpartition("/")[2]: r for r in records if "lemo" in r.name}
    assert not remarks
    assert found["speedup"].value == 3.0 and found["speedup"].setting["baseline"] == "liger:adapter=model"
    assert found["memory_ratio"].value == 2.0 and found["memory_ratio"].setting["baseline"] == "liger"
    assert found["speedup"].bar == "C.8k_k50/llama2/qkvo" and found["peak_memory_at_bar"].bar == "C.8k_gib/llama2/qkvo"
    assert found["speedup"].device == "a GPU" and found["speedup"].commit == "c0ffee"
    for record in records:
        record.append(tmp_path / "r.jsonl")
    assert check_bars.main([str(tmp_path / "r.jsonl")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("C.8k_k50 ") and " met " in line for line in lines)


def test_no_ratio_over_a_baseline_of_another_command():
    cells = cells_of(GROUP, fp32=(4.0, 40.0, "c"), bf16=(3.0, 44.0, "other"), lemo=(1.0, 20.0, "c"))
    records, _ = make_records([GROUP], cells)
    assert [r.setting["baseline"] for r in records if r.name.endswith("speedup")] == ["liger"]
    cells = cells_of(GROUP, fp32=(4.0, 40.0, "x"), bf16=(3.0, 44.0, "other"), lemo=(1.0, 20.0, "c"))
    records, remarks = make_records([GROUP], cells)
    assert not [r for r in records if r.name.endswith("speedup")] and any("same command" in text for text in remarks)


def test_only_turns_of_common_commands_are_compared():
    cells = cells_of(GROUP, fp32=(4.0, 40.0, "c"), bf16=(3.0, 44.0, "x"), lemo=(1.0, 20.0, "c"))
    key = training.Turn(GROUP, "liger", 0).key
    cells[key] = cell(9.0, 99.0, "earlier", options={})
    records, remarks = make_records([GROUP], cells)
    (speedup,) = [r for r in records if r.name.endswith("speedup")]
    assert speedup.samples["baseline"] == [4.0] and any("fewer steps" in text for text in remarks)


def test_a_round_that_does_not_fit_is_left_to_the_next_command(command, monkeypatch, capsys):
    monkeypatch.setattr(training, "estimate_turn_seconds", lambda *arguments: 1000.0)
    methods = ["--methods", "hf_peft,lemo_dense"]
    assert command(*methods, "--budget-seconds", "3000") == 0
    monkeypatch.setattr(training.Session, "left_s", property(lambda self: 3500 - 1000 * len(InProcess.ran)))
    assert command(*methods, "--fresh", "hf_peft,lemo_dense") == 3
    assert InProcess.ran == ["hf_peft 0", "lemo_dense 0"], "one more would fit, but not the round"
    assert "the next round" in capsys.readouterr().out


def test_the_papers_bars_are_means_over_every_shape_or_nothing():
    groups = presets()["paper"]
    cells = {}
    for number, group in enumerate(groups):
        gain = 2.0 if number % 2 else 8.0
        figures = {"a": (gain, 10.0, "c"), "b": (20.0, 30.0, "c"), "s2": (1.0, 1.0, "c"), "lemo": (1.0, 5.0, "c")}
        cells |= cells_of(group, **figures)
    found = {r.bar: r for r in make_records(groups, cells)[0] if r.bar}
    assert found["C.paper_time"].value == pytest.approx(4.0) and found["C.paper_memory"].value == pytest.approx(2.0)
    cells.pop(training.Turn(groups[0], groups[0].methods[-1], 1).key)
    records, remarks = make_records(groups, cells)
    assert not [r for r in records if r.bar] and any("7 of 8" in text for text in remarks)
    assert not [r for r in make_records(groups[2:], cells)[0] if r.bar], "some groups are not all"


def test_a_model_cut_short_answers_no_bar():
    group = dataclasses.replace(GROUP, setting=dataclasses.replace(GROUP.setting, layers=4))
    cells = cells_of(group, fp32=(4.0, 40.0, "c"), bf16=(3.0, 44.0, "c"), lemo=(1.0, 20.0, "c"))
    assert not [r for r in make_records([group], cells)[0] if r.bar]


# -- presets ---------------------------------------------------------------------------------------------------------


def test_every_preset_names_known_methods_and_bars():
    bars = {bar.id for bar in check_bars.BARS}
    for name, groups in presets().items():
        for group in groups:
            assert group.setting.shape in SHAPES, name
            for method in group.methods:
                load_method(method)
                assert estimate_turn_seconds(group, method) > 0
            for wanted in group.comparisons:
                assert {wanted.candidate, *wanted.baselines} <= set(group.methods)
                assert wanted.bar is None or wanted.bar in bars


def test_timed_steps_are_as_many_as_the_issue_asks_for():
    least = {8192: 20, 32768: 7, 65536: 5, 131072: 3}
    for name in ("8k", "32k", "64k", "128k"):
        for group in presets()[name]:
            assert sum(map(group.steps_of, range(group.turns))) >= least[group.setting.tokens]
