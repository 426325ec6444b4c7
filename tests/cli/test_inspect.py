"""`lemo inspect`: maps say what was selected, pages stand alone, samples show what carries loss."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from lemo.cli.main import app
from lemo.cli.terminal import cut_pieces, show_map
from lemo.core.plan import LayerPlan, Plan
from lemo.eval.keep_map import KeepMap, never_dropped_places, never_dropped_tokens
from lemo.report.keep_page import ShownText, keep_page, span
from tests.report.test_run_page import check_alone
from tests.train.test_chat import PLAIN, TALK
from tests.train.tiny import byte_tokenizer, save_tiny_model, words

RECIPE = """
output: {base}/run
model: {{path: {base}/model, dtype: float32}}
data: {{train: [{base}/train.txt], held_out_share: 0.3, window_tokens: 128, validation_windows: 2}}
loss_rows: {{share: 0.3}}
sparsity: {{forward_ratio: 1.0, backward_ratio: 0.5, block_size: 16, scorer: random, dense_layers: [0, -1]}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("inspect")
    save_tiny_model(folder / "model", layers=3)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(folder / "model")
    (folder / "train.txt").write_text(words(400, seed=1))
    (folder / "recipe.yaml").write_text(RECIPE.format(base=folder))
    for number in (1, 2):
        (folder / f"text{number}.txt").write_text(f"<start & {number}> " + words(16, seed=number))
    return folder


def lemo(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_two_texts_stand_side_by_side(base, tmp_path):
    files = ["--out", tmp_path / "a" / "m.html", "--out", tmp_path / "m.png"]
    done = lemo(base / "recipe.yaml", "--text", base / "text1.txt", "--text", base / "text2.txt", *files)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "a" / "m.html").read_text()
    page = check_alone(text)
    assert text.count("<section>") == 2 and text.count("<svg") == 2
    joined = "".join(page.texts)
    for number in (1, 2):
        assert (base / f"text{number}.txt").read_text() in joined  # every character stands beneath its map
    blocks = re.findall(r'id="t0b(\d+)" style="--kept: ([\d.]+)" title="[^"]*runs in (\d) of 3', text)
    assert [int(block) for block, _, _ in blocks] == list(range(len(blocks)))
    assert all(float(kept) == pytest.approx(int(layers) / 3, abs=0.01) for _, kept, layers in blocks)
    assert {layers for _, _, layers in blocks} == {"2", "3"}  # the middle layer of three skips
    links = {a["href"] for tag, a in page.elements if tag == "a"}
    assert links <= {f"#{a['id']}" for _, a in page.elements if "id" in a} and len(links) > 4


def test_maps_of_validation_windows_say_what_is_never_dropped(base, tmp_path):
    done = lemo(base / "recipe.yaml", "--out", tmp_path / "m.html", "--tokens", 0)
    assert done.exit_code == 0, done.output
    page = check_alone((tmp_path / "m.html").read_text())
    assert "What layers never drop" in page.text and len(re.findall(r"layer +\d", done.stdout)) == 3
    assert "⟦" not in done.stdout


def test_nothing_is_written_that_was_not_asked_for(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(base.rglob("*"))
    done = lemo(base / "recipe.yaml", "sparsity.dense_layers=[]")
    assert done.exit_code == 0, done.output
    assert list(tmp_path.iterdir()) == [] and sorted(base.rglob("*")) == before
    assert "picture" not in done.output and "whose rows pass gradient, by layer" in done.stdout


def test_layers_of_the_same_rows_share_a_line():
    """Those behind each other: a layer of the same rows further down has a line of its own."""
    rows = [[1, 1, 0, 0.5]] * 2 + [[1, 0, 1, 0.5]] + [[1, 1, 0, 0.5]] * 10
    console = Console(width=60, record=True, file=io.StringIO())
    show_map(KeepMap(rows, [False, True, False, False], 2, "forward"), "n", console)
    title, marks, *lines = console.export_text().splitlines()
    assert title == "n: blocks of 2 tokens whose rows run, by layer; ▼ carries loss"
    assert lines == ["layers 0-1  ██ ▒  62%", "layer 2     █ █▒  62%", "layers 3-12 ██ ▒  62%"]
    assert marks.index("▼") == len("layers 3-12 ") + 1


def test_a_page_names_layers_that_never_drop_the_same_together():
    found = KeepMap([[1, 0]] * 3 + [[1, 1]] + [[1, 0]] * 2, [False] * 2, 2, "forward", [0, 2], [2, 2], [0, 1])
    text = keep_page([ShownText("n", found, [])], [[0]] * 5 + [[0, 1]], [[("a", 5)]] * 6)
    cells = re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td>", re.sub(r"<td[^>]*>", "<td>", text))
    assert cells == [("0 to 2, 4", "0"), ("5", "0 to 1")]  # layer 3 drops nothing


def test_samples_need_no_weights(base, tmp_path):
    for file in (base / "model").glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
        file.unlink()
    try:
        done = lemo(base / "recipe.yaml", "--samples", "2", "--out", tmp_path / "s.html")
    finally:
        for file in tmp_path.glob("*.safetensors"):
            (base / "model" / file.name).write_bytes(file.read_bytes())
    assert done.exit_code == 0, done.output
    assert done.stdout.count("carry loss; the first 128") == 2 and "⟦" in done.stdout
    page = check_alone((tmp_path / "s.html").read_text())
    assert sum(tag == "h2" for tag, _ in page.elements) == 2


def test_a_conversation_shows_the_assistants_words(base, tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    options = [f"data.train=[{tmp_path / 'c.jsonl'}]", "data.held_out_share=0", "data.answer_only=true"]
    done = lemo(base / "recipe.yaml", *options, "data.window_tokens=256", "--samples", "1")
    assert done.exit_code == 0, done.output
    assert re.findall(r"⟦(.*?)⟧", done.stdout, re.S) == ["Jupiter.<end>", "Jupiter. Again <|user|> é<end>"]


def test_maps_of_conversations_show_rows_of_prompts_that_carry_loss(base, tmp_path):
    """Drawn rows bring weights and marks, which a forward that only selects does not need."""
    talks = [[{**TALK[0], "content": f"Be brief {i}."}, *TALK[1:]] for i in range(4)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    options = [f"data.train=[{tmp_path / 'c.jsonl'}]", "data.answer_only=true", "data.window_tokens=256"]
    found = []
    for share in (0, 0.5):
        more = [f"loss_rows.prompt_share={share}", "loss_rows.span=16", "sparsity.context_window=16"]
        done = lemo(base / "recipe.yaml", *options, *more, "--out", tmp_path / "m.html")
        assert done.exit_code == 0, done.output
        found.append((tmp_path / "m.html").read_text())
    assert found[0] != found[1]
    blind = Plan((LayerPlan(1.0, 0.5),) * 3, block_size=16, scorer="random", gradient="keys")
    blind.save(tmp_path / "blind")
    done = lemo(base / "recipe.yaml", *options, *more, "--plan", tmp_path / "blind", "--out", tmp_path / "m.html")
    assert done.exit_code == 0, "the plan has no window, so that no row is local: " + done.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--out", "x.pdf"), "x.pdf must end in .html or .png"),
        (("--samples", "1", "--out", "x.png"), "x.png must end in .html"),
        (("--text", "a", "--text", "b", "--text", "c"), "at most 2 texts"),
        (("data.held_out_share=0",), "name a text with --text"),
        (("sparsity.scorer=predictor",), "needs a calibrated plan"),
    ],
)
def test_mistakes_are_said(base, arguments, text):
    done = lemo(base / "recipe.yaml", *arguments)
    assert done.exit_code == 2 and text in done.stderr.splitlines()[-1]


def keep(kept_K, supervised_K=(False,) * 4):
    return KeepMap([kept_K], list(supervised_K), 2, "forward", [0, 2, 4, 6], [2, 2, 2, 2], [0, 1, 2, 3])


def test_never_dropped_counts_competing_blocks_only():
    maps = [keep([1, 0, 1, 1], (False, False, True, False)), keep([1, 1, 1, 0.5])]
    assert never_dropped_places(maps) == [[0]]  # place 2 competed once only
    tokens = [[7, 8, 5, 5, 9, 9, 7, 8], [7, 8, 8, 7, 9, 9, 8, 1]]
    assert never_dropped_tokens(maps, tokens, least=2) == [[(7, 4), (9, 2)]]
    assert never_dropped_tokens(maps, tokens, least=3) == [[(7, 4)]]


def test_pieces_join_to_the_text_and_letters_stay_whole():
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé")["input_ids"]
    assert cut_pieces(tokenizer, ids, [False, True, True]) == [("a", False), ("é", True)]


def test_a_page_without_text_has_maps_only():
    text = keep_page([ShownText("n", keep([1, 0, 0.5, 1]), [])], [[0]], [[("a", 5)]])
    check_alone(text)
    assert 'fill-opacity="0.5"' in text and "'a' (5)" in text.replace("&#x27;", "'")
    assert span([0, 1, 2, 7]) == "0 to 2, 7" and span([]) == ""
