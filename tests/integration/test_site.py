"""The documentation as a whole: it builds, its reference is up to date, and a test runs what it shows to be run."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import yaml

import lemo
import lemo.ops
from docs.generate import PAGES as REFERENCE
from tests.integration.pages import DOCS, blocks
from tests.integration.test_guide import SMALL
from tests.report.test_browser import BROWSER
from tests.train.tiny import save_tiny_model, tiny_llama, words

ROOT = DOCS.parent
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
# Which test runs the commands (`sh`) and the code (`python`) of a page.
RUN_BY = {
    "first-run.md": "tests/integration/test_first_run.py",
    "guide/data.md": "tests/integration/test_guide.py",
    "guide/estimate.md": "tests/integration/test_guide.py",
    "guide/looking.md": "tests/integration/test_guide.py",
    "guide/merge.md": "tests/integration/test_guide.py",
    "guide/recipes.md": "tests/integration/test_guide.py",
    "guide/trainers.md": "tests/integration/test_site.py",
    "cookbook/code-repositories.md": "tests/integration/test_cookbook.py",
    "cookbook/context-extension.md": "tests/integration/test_cookbook.py",
    "cookbook/long-documents.md": "tests/integration/test_cookbook.py",
    "extending.md": "tests/integration/test_extending.py",
    "index.md": "tests/integration/test_site.py",
    "results.md": "tests/report/test_tables.py",
}
# `shell` blocks: what cannot be run in a test as it stands, with the reason.
NOT_RUN = {
    "first-run.md": "installs from a registry; the test builds the wheel without one",
    "measuring.md": "needs a corpus and a GPU; tests/benchmarks runs each script at a small size",
    "cookbook/context-extension.md": "retrieval at real lengths; tests/cli/test_retrieval.py runs it at small ones",
}


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_is_up_to_date(name):
    """When this fails: python -m docs.generate."""
    assert (DOCS / "reference" / name).read_text(encoding="utf-8") == REFERENCE[name]().strip() + "\n"


def test_the_reference_has_every_public_name_and_every_key():
    from lemo.cli.recipe import _keys
    from lemo.config import RunConfig

    page = (DOCS / "reference" / "api.md").read_text()
    heads = set(re.findall(r"^#{2,3} (\S+)$", page, flags=re.M))
    assert set(lemo.__all__) | set(lemo.ops.__all__) <= heads
    recipe = (DOCS / "reference" / "recipe.md").read_text()
    assert all(f"`{key.rpartition('.')[2]}`" in recipe or f"## {key}" in recipe for key in _keys(RunConfig))


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_is_run(page):
    """A page with commands or code names the test that runs them; blocks in other languages are none."""
    known = {"sh", "shell", "python", "text", "json", "yaml"}
    languages = set(re.findall(r"^```(\w*)\n(?:.*\n)*?```$", (DOCS / page).read_text(), flags=re.M))
    assert languages <= known, page
    if languages & {"sh", "python"}:
        assert (ROOT / RUN_BY[page]).exists(), page
    assert ("shell" in languages) == (page in NOT_RUN), page


def batch(tokens: int = 256) -> dict[str, torch.Tensor]:
    ids_BT = torch.randint(3, 250, (1, tokens), generator=torch.Generator().manual_seed(0))
    labels_BT = torch.full_like(ids_BT, -100)
    labels_BT[:, -32:] = ids_BT[:, -32:]
    return {"ids": ids_BT, "labels": labels_BT}


def test_the_code_of_the_first_page_works():
    from transformers import DataCollatorWithFlattening

    (code,) = blocks("index.md", "python")
    samples = [{"input_ids": batch(4096)["ids"][0].tolist()}]
    model = tiny_llama(max_position_embeddings=4096).train()
    names = {"model": model, "collator": DataCollatorWithFlattening(), "samples": samples}
    exec(compile(code, "index.md", "exec"), names)
    assert model.lm_head.weight.grad is not None and names["handle"].sparse_batches == 1
    # Of 64 blocks 8 carry loss over all keys and 16 over the nearest; guards may be among them.
    assert all(24 <= 64 * backward <= 26 for _, backward in names["handle"].ratios().values())


def test_the_code_for_trainers_works(capsys):
    from transformers import DataCollatorWithFlattening

    (code,) = blocks("guide/trainers.md", "python")
    samples = [{"input_ids": batch(1024)["ids"][0].tolist()}]
    model = tiny_llama(layers=4, max_position_embeddings=1024).train()
    names = {"model": model, "collator": DataCollatorWithFlattening(), "samples": samples}
    exec(compile(code, "trainers.md", "exec"), names)
    # Two and four of 16 blocks carry loss, and the guards run with them unless they are the same.
    assert names["handle"].sparse_batches == 1 and capsys.readouterr().out.startswith("{0: (1.0, ")
    assert {forward for forward, _ in names["handle"].ratios().values()} == {1.0}
    assert all(6 / 16 <= backward <= 8 / 16 for _, backward in names["handle"].ratios().values())
    # Detached: a training forward without labels is no longer refused.
    assert model(input_ids=batch(8)["ids"]).logits.shape[1] == 8


def test_pages_are_reached_from_the_navigation():
    def leaves(nav):
        for entry in nav:
            for value in entry.values():
                yield from leaves(value) if isinstance(value, list) else [value]

    listed = list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    decisions = {page for page in PAGES if page.startswith("decisions/0")}
    assert len(listed) == len(set(listed)) and set(listed) == set(PAGES) - decisions


def test_every_figure_is_made_by_a_script_and_shown():
    made = {path.name for path in (DOCS / "figures").iterdir() if path.suffix in (".svg", ".png")}
    shown = {name for page in PAGES for name in re.findall(r"\(figures/([\w.-]+)\)", (DOCS / page).read_text())}
    scripts = "".join(path.read_text() for path in (DOCS / "figures").glob("*.py"))
    assert made == shown
    assert all(f"{name}`" in scripts or f"figures/{name}:" in scripts for name in made)


def test_the_diagrams_are_drawn_again(tmp_path):
    from docs.figures.diagrams import draw_budgets, draw_rows

    for draw in (draw_rows, draw_budgets):
        draw(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.svg", "budgets.svg"}
    assert all(path.read_text().count("<path") > 40 for path in tmp_path.iterdir())


def test_numbers_of_the_figure_of_saved_activations():
    """What method.md's table says of the fused engine's levels, counted."""
    from docs.figures.diagrams import saved_widths

    found = saved_widths()
    ffn, kept = 2 * 688 / 256, 0.5
    expected = {
        "fused, nothing skips": 6 + ffn,
        "fused, half skips": kept * (6 + ffn),
        "fused, half skips; mlp recomputed": kept * 6,
        "fused, half skips; lin recomputed": kept * 2,
        "fused, half skips; layer recomputed": kept,
        # Inputs, keys and values of all rows; queries, output of attention, A and the MLP's maps of those that pass
        # gradient.
        "fused, as by default, 6 of 16 blocks backward": 3 + (3 + ffn) * 6 / 16,
    }
    assert set(found) == {*expected, "Transformers, nothing recomputed"}
    for name, value in expected.items():
        # Beside them: a norm's scale and one log-sum-exp per head and row.
        assert value <= found[name] <= value + 0.08, (name, found[name])


def build(folder):
    pytest.importorskip("mkdocs", reason="the site is built where mkdocs is installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(folder.rglob("*.html"))


def test_the_site_builds_without_warnings_and_asks_nobody(tmp_path):
    pages = build(tmp_path)
    assert len(pages) >= len(PAGES)
    for page in pages:
        # A reader's link may lead elsewhere; what the page loads may not.
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert not loaded, (page, loaded)
    assert not list(tmp_path.rglob("*.py"))


# Text and paper as drawn, figures that did not load, and whether the page is wider than the window.
PROBE = """<script>
const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => { v /= 255;
  return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
addEventListener('load', () => {
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const inks = [...document.querySelectorAll('[role=main] :is(p, h1, h2, h3, li, a:not(.headerlink))')]
    .map(e => light(getComputedStyle(e).color));
  const contrast = inks.map(ink => (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05));
  const out = document.createElement('output');
  out.textContent = JSON.stringify({ worst: Math.min(...contrast), paper,
    wide: document.documentElement.scrollWidth > innerWidth,
    broken: [...document.images].filter(i => !i.naturalWidth).length });
  document.body.append(out);
});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_are_drawn_and_readable(tmp_path, dark):
    """In a real browser, on a wide and a narrow window, from a server on this machine."""
    site = tmp_path / "site"
    names = [str(page.parent.relative_to(site)) for page in build(site) if page.name == "index.html"]
    for page in site.rglob("*.html"):
        page.write_text(page.read_text() + PROBE)
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for number, name in enumerate(names):
            width = (1200, 500)[number % 2]
            options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
            options += ["--enable-logging=stderr", "--virtual-time-budget=3000", f"--user-data-dir={tmp_path / 'user'}"]
            options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
            address = f"http:{'//'}localhost:{server.server_address[1]}/{name}/"
            command = [BROWSER, *options, address]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
            said = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "Lunr" not in line]
            (answer,) = re.findall(r"<output>(.*?)</output>", done.stdout)
            seen = json.loads(answer)
            assert not said and not seen["wide"] and not seen["broken"], (name, seen, said)
            assert seen["worst"] > 4 and (seen["paper"] < 0.1) == dark, (name, seen)
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        """Says nothing."""


# What the README's words in capitals stand for, and what takes the place of the demo's model.
STAND_FOR = {"MODEL": "model", "DATA": "book.txt", "RUN": "run"}
DEMO = ["model.path=model", "model.gguf_file=null", "data.window_tokens=256", "sparsity.block_size=16"]


def test_the_commands_of_the_readme_work(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from lemo.cli.main import app

    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model", layers=3, max_position_embeddings=256)
    (tmp_path / "book.txt").write_text(words(1000))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    for split in ("train", "validation"):
        (tmp_path / "demo-output" / "text" / split).mkdir(parents=True)
        (tmp_path / "demo-output" / "text" / split / "topics.txt").write_text(words(600))
    lines = [line for block in blocks("../README.md", "sh") for line in block.splitlines()]
    ran = []
    for name, *arguments in (shlex.split(line, comments=True) for line in lines):
        if name in ("make", "pip"):  # what they do is tried in a fresh clone, benchmarks/fresh_clone.py
            continue
        assert name == "lemo", name
        arguments = [STAND_FOR.get(argument, argument) for argument in arguments]
        more = DEMO if "recipes/demo.yaml" in arguments else []
        more = [*more, *SMALL] if arguments[0] in ("train", "calibrate") else more
        result = CliRunner().invoke(app, [*arguments, *more])
        # A recipe alone has no plan to look at; the run that it made has.
        refused = arguments[0] == "inspect" and arguments[1].endswith(".yaml")
        assert result.exit_code == (2 if refused else 0), f"lemo {' '.join(arguments)}\n{result.output}"
        ran.append(arguments[0])
    assert {"train", "inspect"} <= set(ran)
