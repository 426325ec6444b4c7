"""docs/families.md from the newest Record of benchmarks/families.py."""

from __future__ import annotations

from typing import Any

HEAD = """# Families

Which of Transformers' causal language models can skip rows. Written by `benchmarks/families.py`, which makes a tiny
random model of each type of Transformers {transformers} and holds it to the laws: keep-all is the dense model bit for
bit, half of the rows is a masked dense run (loss and all gradients, {bound:g} in fp32), exact forward has the dense
loss. Of {tried} types that could be tried, {accepted} pass. `lemo.attach` repeats such a test on the layers of the
model that it is given, and refuses with the reason.

- **engine**: `fused` runs a layer as one function that keeps backward rows only; `generic` runs Transformers' own layer
  on rows. Both compute the same.
- **layers**: `all` may skip; of a hybrid only those with softmax attention do, and recurrent, convolutional and
  linear-attention layers run all rows. Recipes leave these dense by themselves; for `lemo.attach` name them in the
  plan.
- **pairs**: the cheaper gradient of exact forward, for plain causal attention. Sliding windows, soft caps and sinks
  rule it out.
- **own MLP rows**: `sparsity.mlp: own`, where a family file names the MLP. Keys and values of skipped rows (`kv: all`)
  work in every family of the table.
- **loss**: `model` where more than a linear head lies between decoder and loss, or the model does not name its decoder;
  logits of the whole sequence then exist.

"""

EXPERTS = """
## Mixtures of experts

Each row is routed by itself, so rows that run are routed as in a dense run, and rows that skip a layer reach no expert
of it. Counts of tokens per expert are therefore those of the rows that ran. An auxiliary loss over the router's logits
(`output_router_logits`) counts all rows: a batch that asks for it runs densely, and lemo says so once. Under LoRA
routers are usually frozen, and the auxiliary loss has nothing to train. Jitter of the router draws other numbers when
fewer rows run. The MLP of these families runs on the attention's rows.

"""


def render(record: dict[str, Any]) -> str:
    """The page as Markdown."""
    rows = record["setting"]["rows"]
    tried = [row for row in rows if row["tried"]]
    accepted = [row for row in tried if "refused" not in row]
    head = HEAD.format(
        transformers=record["versions"]["transformers"],
        bound=record["setting"]["bound"],
        tried=len(tried),
        accepted=len(accepted),
    )
    lines = ["| model type | engine | layers | pairs | own MLP rows | loss |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [_line(row) for row in accepted]
    return head + "\n".join(lines) + "\n" + EXPERTS.rstrip("\n") + "\n\n" + _refused(tried) + _untried(rows)


def _line(row: dict[str, Any]) -> str:
    layers = "all" if not row["dense"] else f"{row['layers'] - row['dense']} of {row['layers']}"
    cells = (
        f"`{row['type']}`",
        "fused" if row["fused"] else "generic",
        layers,
        "yes" if row["pairs"] else "no",
        "yes" if row["mlp"] else "no",
        row["loss"],
    )
    return "| " + " | ".join(cells) + " |"


def _refused(tried: list[dict[str, Any]]) -> str:
    by_reason: dict[str, list[str]] = {}
    for row in tried:
        if "refused" in row:
            by_reason.setdefault(_reason(row["refused"]), []).append(row["type"])
    lines = ["## Refused", "", "| reason | model types |", "| --- | --- |"]
    for reason, types in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"| {reason} | {', '.join(f'`{t}`' for t in types)} |")
    return "\n".join(lines) + "\n\n"


def _reason(text: str) -> str:
    """A reason without the names of one model's classes."""
    if "ALiBi" in text:
        return "weighs attention by the distance between rows (ALiBi), which rows that are left out would change"
    if "no single softmax attention" in text:
        return "no layer has a single softmax attention module that uses Transformers' attention interface"
    if "differ by" in text:
        return "rows depend on each other outside of attention, or attention is not softmax under a causal mask"
    if "fails on some of its rows" in text:
        return "a layer fails on some of its rows: its attention does not go through Transformers' interface alone"
    if "expects more of a layer" in text:
        return "the decoder expects more of a layer than hidden states"
    return text.replace("|", "\\|")


def _untried(rows: list[dict[str, Any]]) -> str:
    texts = [f"`{row['type']}` (`{row['text']}`)" for row in rows if "text" in row]
    others = [f"`{row['type']}`" for row in rows if not row["tried"] and "text" not in row]
    return (
        "## Not tried\n\n"
        f"Models of several kinds of input, whose text model is a type of its own: {', '.join(texts)}.\n\n"
        f"No tiny random model of these could be made or run by rule: {', '.join(others)}. `lemo.attach` tells whether "
        "one of them can skip rows.\n"
    )
