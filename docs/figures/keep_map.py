"""docs/figures/keep_map.png: which blocks of a real text run in which layer of SmolLM2, with the text beside them.

    python -m docs.figures.keep_map [--work build/keep-map]

Takes model and text of recipes/demo.yaml, Python's own documentation, with options by which half of the rows skip;
calibrates a plan for them (some minutes on a CPU; one that is there already is taken), and draws the selection of the
first validation window. Needs the packages of `make demo`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.demo import drawn_batch, write_text

ROOT = Path(__file__).resolve().parents[2]
FIGURE = Path(__file__).with_suffix(".png")
LETTERS = 74
SKIPPING = (
    "loss_rows.share=0.15", "loss_rows.local_share=0", "loss_rows.span=256", "sparsity.forward_ratio=0.5",
    "sparsity.backward_ratio=0.5", "sparsity.context_window=0", "sparsity.kv=kept", "sparsity.scorer=predictor",
    "sparsity.dense_layers=[0, -1]", "calibration.windows=4", "calibration.tune_windows=1",
    "calibration.predictor_steps=150", "calibration.compare_dense_fit=false",
)  # fmt: skip


def find_map(work: Path) -> dict[str, Any]:
    """Kept blocks, loss blocks and the text of each block."""
    import lemo
    from lemo.cli.recipe import load_recipe
    from lemo.eval.keep_map import keep_map
    from lemo.train.model import load_model, load_tokenizer
    from lemo.train.planning import make_plan

    run = load_recipe(ROOT / "recipes" / "demo.yaml", SKIPPING)
    write_text(work / "text")
    data = replace(run.data, train=(str(work / "text/train"),), validation=(str(work / "text/validation"),))
    run = replace(run, data=data)
    tokenizer = load_tokenizer(run.model)
    model = load_model(run.model, window_tokens=data.window_tokens)
    if not (work / "plan").is_dir():
        make_plan(model, run, tokenizer, None).save(work / "plan")
    batch = drawn_batch(run, tokenizer)
    with lemo.attach(model, lemo.Plan.load(work / "plan"), self_test=False) as handle:
        found = keep_map(model, batch, handle)
    ids = batch["input_ids"][0]
    spans = zip(found.starts_K, found.lengths_K, strict=True)
    texts = [" ".join(tokenizer.decode(ids[start : start + length]).split()) for start, length in spans]
    return {"kept": found.kept_LK, "supervised": found.supervised_K, "texts": texts}


def draw(found: dict[str, Any], path: Path) -> None:
    """A row per block with the text that begins it, a column per layer."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    kept_KL = np.array(found["kept"]).T
    blocks, layers = kept_KL.shape
    figure, axes = pyplot.subplots(figsize=(11, 0.235 * blocks + 1.2), layout="constrained")
    axes.imshow(kept_KL, aspect="auto", interpolation="nearest", cmap="Blues", vmin=-0.15, vmax=1.15)
    axes.set_xticks(range(0, layers, 3), range(0, layers, 3))
    axes.set_xlabel("layer", fontsize=9)
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8)
    axes.set_yticks(range(blocks), [_label(text) for text in found["texts"]], fontsize=6.5, family="monospace")
    for label, loss in zip(axes.get_yticklabels(), found["supervised"], strict=True):
        label.set_color("#b45309" if loss else "#374151")
    for place in range(1, blocks):
        axes.axhline(place - 0.5, color="white", linewidth=0.6)
    for place in range(1, layers):
        axes.axvline(place - 0.5, color="white", linewidth=0.6)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _label(text: str) -> str:
    cut = (text if len(text) <= LETTERS else text[: LETTERS - 1] + "…").ljust(LETTERS)
    # A dollar would begin a formula.
    return cut.replace("$", r"\$")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "keep-map")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    found = find_map(work)
    (work / "map.json").write_text(json.dumps(found))
    draw(found, FIGURE)


if __name__ == "__main__":
    main()
