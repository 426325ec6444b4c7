"""Plans and text for the integration tests: small numbers, every mechanism present."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lemo.core.bypass import Bypass
from lemo.core.plan import Plan
from lemo.core.predictor import PatternPredictor

BLOCK = 4


def keep_all(model, ratio: float = 0.999) -> Plan:
    """Every row kept. Below 1 the generated layers are in place and find nothing to skip; at 1 no layer is touched."""
    return Plan.uniform(model, backward_ratio=ratio, block_size=BLOCK)


def exact(model, ratio: float = 0.5, **choices) -> Plan:
    """All rows forward, some backward."""
    return predicted(Plan.uniform(model, backward_ratio=ratio, block_size=BLOCK, **choices), model)


def skipping(model, ratio: float = 0.4, **choices) -> Plan:
    """Some rows forward and backward, the others by a random bypass."""
    plan = Plan.uniform(model, forward_ratio=ratio, backward_ratio=ratio, block_size=BLOCK, **choices)
    width = model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(5)
    bypass = Bypass(0.2 * torch.randn(width, 4, generator=generator), 0.2 * torch.randn(4, width, generator=generator))
    return predicted(replace(plan, layers=tuple(replace(x, bypass=bypass) for x in plan.layers)), model)


def predicted(plan: Plan, model) -> Plan:
    """The plan with an untrained predictor in every layer: its choice follows from the document alone."""
    if plan.scorer != "random":
        return plan
    width = model.config.get_text_config().hidden_size
    layers = []
    with torch.random.fork_rng(devices=[]):
        for index, layer in enumerate(plan.layers):
            torch.manual_seed(100 + index)
            layers.append(replace(layer, predictor=PatternPredictor(width, pooled_features=8, rank=4)))
    return replace(plan, layers=tuple(layers), scorer="predictor")


def documents(count: int, *, tokens: tuple[int, int] = (40, 64), answer: tuple[int, int] = (2, 20), seed: int = 3):
    """Token documents of different lengths, each with a differently long supervised tail."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    found = []
    for _ in range(count):
        length, supervised = draw(*tokens), draw(*answer)
        ids = torch.randint(3, 128, (length,), generator=generator).tolist()
        labels = [-100] * (length - supervised) + ids[length - supervised :]
        found.append({"input_ids": ids, "labels": labels})
    return found


def padded(samples: list[dict[str, list[int]]], side: str = "right") -> dict[str, Tensor]:
    """A batch with an attention mask."""
    longest = max(len(x["input_ids"]) for x in samples)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for sample in samples:
        ids, missing = sample["input_ids"], longest - len(sample["input_ids"])
        rows = {"input_ids": (ids, 0), "labels": (sample["labels"], -100), "attention_mask": ([1] * len(ids), 0)}
        for name, (row, fill) in rows.items():
            pad = [fill] * missing
            batch[name].append(pad + list(row) if side == "left" else list(row) + pad)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def supervised_are_kept(selections, labels: Tensor) -> None:
    """Asserts that every row whose next token is supervised is in both sets of every layer."""
    wanted_BT = torch.zeros_like(labels, dtype=torch.bool)
    wanted_BT[:, :-1] = labels[:, 1:] != -100
    wanted = set(wanted_BT.flatten().nonzero().flatten().tolist())
    assert wanted
    assert selections
    for index, selection in selections.items():
        for rows in (selection.forward, selection.backward):
            if rows is not None:
                assert wanted <= set(rows.chosen().tolist()), f"layer {index} skips supervised rows"
