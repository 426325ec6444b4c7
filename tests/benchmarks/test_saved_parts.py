"""Saved bytes by part: counted once each, extended to more layers and tokens, published as the Records say."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import saved_parts
from benchmarks.check_bars import find_problems
from benchmarks.peers.peer import Setting, load_method
from benchmarks.performance import page
from benchmarks.saved_figures import FIGURE, draw_saved, read_saved, saved_section, saved_table
from benchmarks.saved_parts import LEMO, PARTS, PEERS, check_proportional, count_saved, extend_layers, part_of
from benchmarks.training_cell import make_batches
from lemo.errors import DataError
from lemo.measure.fused_memory import index_bytes
from lemo.measure.record import Record, read_records
from lemo.measure.sizes import read_sizes
from lemo.measure.step_memory import layer_rows
from lemo.train.rehearsal import shape_config

WIDTH, FFN, TOKENS, GIB = 64, 160, 128, 2**30
MODEL = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 96,
}


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shapes") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    return str(folder)


def prepared(setting: Setting, method: str):
    peer, options = load_method(method)
    model = peer.prepare(shape_config(setting.shape, tokens=setting.tokens, layers=setting.layers), setting, options)
    return model, next(make_batches(setting, MODEL["vocab_size"], 1))


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("base_model.model.model.layers.3.input_layernorm", "norms"),
        ("model.layers.11.self_attn.q_proj.lora_A.default", "projections"),
        ("model.layers.11.self_attn", "attention"),
        ("model.layers.0.mlp.act_fn", "mlp"),
        ("model.layers.0", "residual"),
        ("model.norm", "head"),
        ("lm_head", "head"),
        ("", "head"),
    ],
)
def test_modules_belong_to_parts(module: str, part: str):
    assert part_of(module) == part


@pytest.mark.parametrize("method", PEERS)
def test_parts_add_up_to_all_that_is_saved(method: str, shape: str):
    """Counted again without modules; and no part of a decoder is empty."""
    setting = Setting(shape, TOKENS, device="cpu")
    model, batch = prepared(setting, method)
    found = count_saved(model, batch)
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.forward(dict(batch))
    known = [*model.model.parameters(), *model.model.buffers(), *batch.values()]
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    assert loss.requires_grad and sum(found.values()) == sum(storage.nbytes() for storage in storages.values())
    assert all(found[part] > 0 for part in ("norms", "projections", "attention", "mlp", "head"))


def test_parts_hold_the_tensors_that_they_are_said_to_hold(shape: str):
    """bf16: three maps of the MLP; fp32 norm inputs with one number a row, the first of all not wanted; fp32 copies."""
    setting = Setting(shape, TOKENS, device="cpu")
    wide, narrow = (count_saved(*prepared(setting, method)) for method in PEERS[:2])
    layers, e = MODEL["num_hidden_layers"], 2
    assert wide["mlp"] == narrow["mlp"] == layers * 3 * TOKENS * FFN * e
    assert wide["norms"] == narrow["norms"] == (2 * layers - 1) * TOKENS * (WIDTH + 1) * 4
    rows = TOKENS * WIDTH
    low = 4 * TOKENS * setting.rank  # of q, k, v and o
    assert narrow["projections"] == layers * (rows * e + low * e), "one input of q, k and v; that of o is attention's"
    assert wide["projections"] == layers * (4 * rows + low) * 4
    assert narrow["attention"] == wide["attention"] > layers * 4 * rows * e


@pytest.mark.parametrize("method", PEERS)
def test_further_layers_are_as_their_difference(method: str, shape: str):
    one, two, four = (count_saved(*prepared(Setting(shape, TOKENS, layers=n, device="cpu"), method)) for n in (1, 2, 4))
    assert extend_layers(one, two, 3) == dict(four)
    assert 4 * one["norms"] != four["norms"], "the first layer saves less than the others"


@pytest.mark.parametrize("method", PEERS)
def test_bytes_are_proportional_to_tokens(method: str, shape: str):
    """Scaled, they are what a run of that length saves."""
    setting = Setting(shape, TOKENS, layers=1, device="cpu")
    scaled = saved_parts.peer_parts(setting, method, 4 * TOKENS)
    long = count_saved(*prepared(replace(setting, tokens=4 * TOKENS, layers=None), method))
    assert {part: samples[-1] for part, samples in scaled.items()} == pytest.approx(dict(long), rel=0.01)


def test_what_is_not_proportional_is_refused():
    even = dict.fromkeys(PARTS, 1000)
    check_proportional(even, dict.fromkeys(PARTS, 2010), 2.0)
    for wrong in (4000, 2030, 1970, 1000):
        with pytest.raises(DataError, match="attention"):
            check_proportional(even, {**dict.fromkeys(PARTS, 2000), "attention": wrong}, 2.0)


def test_the_closed_form_is_what_lemo_saves(shape: str, monkeypatch: pytest.MonkeyPatch):
    """Head and loss too, byte for byte; but for the numbers of rows, which are no saved tensors."""

    @contextmanager
    def no_module(model):  # the fused engine takes no layer with hooks
        yield lambda: ""

    monkeypatch.setattr(saved_parts, "innermost_module", no_module)
    method, tokens = "lemo:keep=0.5,kv=kept,share=0.25", 1024
    model, batch = prepared(Setting(shape, tokens, device="cpu", supervised_share=0.25), method)
    step = saved_parts.lemo_step(method, tokens)
    assert int((batch["labels"] != -100).sum()) == step.loss_rows
    sizes = read_sizes(shape_config(shape, tokens=tokens), rank=8, targets=saved_parts.TARGETS)
    parts = saved_parts.lemo_parts(sizes, step)
    numbers = sum(index_bytes(rows) for rows in layer_rows(sizes, step))
    assert sum(count_saved(model, batch).values()) == sum(samples[-1] for samples in parts.values()) - numbers


def held(method: str, value: float, folder: Path, shape: str = "llama2-7b") -> Record:
    name = f"training/{shape}/16384/qkvo/{method}/held_bytes"
    return Record.measure(name, "bytes", [value], {}, script="t.py").append(folder / "training.jsonl")


def test_the_command_writes_sound_records(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """All parts of all methods, with the share of what was held, where that is known."""
    monkeypatch.setattr(saved_parts, "RESULTS", tmp_path)
    held(PEERS[0], 2.0e8, tmp_path, "tiny")
    out = tmp_path / "saved.jsonl"
    assert saved_parts.main(["--out", str(out), "--shape", shape, "--tokens", str(TOKENS)]) == 0
    records = {record.name: record for record in read_records(out)}
    assert set(records) == {f"saved/tiny/16384/{method}/{part}" for method in (*PEERS, LEMO) for part in PARTS}
    assert not any(find_problems(record, {}) for record in records.values())
    mlp = records[f"saved/tiny/16384/{PEERS[0]}/mlp"]
    assert mlp.value == 4 * 3 * 16384 * FFN * 2 and len(mlp.samples) == 2
    total = sum(records[f"saved/tiny/16384/{PEERS[0]}/{part}"].value for part in PARTS)
    assert mlp.setting["share_of_held"] == pytest.approx(total / 2.0e8)
    assert f"{total / 2.0e8:.1%} of the" in capsys.readouterr().out
    assert "share_of_held" not in records[f"saved/tiny/16384/{LEMO}/mlp"].setting


@pytest.fixture
def published(tmp_path: Path) -> list[Record]:
    """Two methods by part and Liger as a whole, an older figure among them."""
    out = tmp_path / "saved.jsonl"
    for method, scale in ((PEERS[1], 4), (LEMO, 1)):
        for index, part in enumerate(PARTS):
            Record.measure(
                f"saved/llama2-7b/16384/{method}/{part}", "bytes", [scale * (index + 1) * GIB], {}, script="t.py"
            ).append(out)
    records = read_records(out)
    old = replace(records[0], value=900.0 * GIB, time="2020-01-01T00:00:00+00:00")
    whole = [held(PEERS[1], 80 * GIB, tmp_path), held("liger", 50 * GIB, tmp_path), held("unsloth", GIB, tmp_path)]
    return [*records, old, *whole]


def test_the_table_says_what_the_records_say(published: list[Record]):
    methods = read_saved(published)
    assert list(methods) == [PEERS[1], "liger", LEMO], "most bytes first; of others than Liger no whole alone"
    table = [re.split(r" *\| *", line.strip("| ")) for line in saved_table(methods).splitlines()]
    assert table[2] == ["HF + PEFT", *(f"{4 * n:.2f}" for n in range(1, 7)), "84.00", "80.00", "105.0%"]
    assert table[3] == ["Liger, fp32 adapters", *["–"] * 7, "50.00", "–"]
    assert table[4][1:] == [*(f"{n:.2f}" for n in range(1, 7)), "21.00", "–", "–"]


def test_the_figure_is_drawn_and_shown(published: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.axes import Axes

    drawn, inner = {}, Axes.barh
    monkeypatch.setattr(
        Axes, "barh", lambda axes, y, width, **how: drawn.update({how["label"]: width}) or inner(axes, y, width, **how)
    )
    assert draw_saved(published, tmp_path) == [FIGURE] and (tmp_path / FIGURE).stat().st_size > 0
    assert drawn["attention"] == [12, 0, 3] and drawn["held on the GPU, not split"] == [0, 50, 0]
    text = page(published, [FIGURE])
    assert "\n\n".join(saved_section(published, [FIGURE])) in text and text.count(f"({FIGURE})") == 1


def test_nothing_is_drawn_without_records(tmp_path: Path):
    only_whole = [held("liger", GIB, tmp_path)]
    assert draw_saved(only_whole, tmp_path) == [] and not (tmp_path / FIGURE).exists()
    assert "*Not measured yet.*" in saved_section(only_whole, [])
