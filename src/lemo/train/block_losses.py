"""BlockLosses: the loss of each block of a sample under the base model, for loss rows that look for what is hard."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lemo.core.predictor import pool_rows
from lemo.runtime.batch import read_layout, supervised_rows
from lemo.runtime.head import row_losses
from lemo.runtime.model import causal_model
from lemo.train.row_draw import sample_name


class BlockLosses:
    """Mean loss of the labelled rows of every block, by one dense pass of the base model; 0 where there are none.

    Each sample is looked at once: the first time that its losses are asked for. An adapter is switched off meanwhile,
    so that the losses do not depend on when that is. Runs in the process that holds the model, so not in workers of a
    data loader.

    *Cost*: one dense forward without gradient of each sample, one fp32 number a block.
    """

    def __init__(self, model: Any, collator: Callable[[list[Any]], Any], block_size: int = 64) -> None:
        """Looks at nothing yet.

        Args:
            model: a Transformers causal language model, PEFT-wrapped or not, with or without an attached plan.
            collator: makes a batch with all labels of one sample.
            block_size: rows per block.
        """
        self.model, self.collator, self.block_size = model, collator, block_size
        self.found: dict[str, Tensor] = {}

    def __call__(self, feature: Any) -> Tensor:
        """(blocks,) fp32 on the CPU, of the blocks of one sample in order."""
        name = sample_name(feature)
        if name not in self.found:
            self.found[name] = self._look(feature)
        return self.found[name]

    @torch.no_grad()
    def _look(self, feature: Any) -> Tensor:
        base = causal_model(self.model)
        device = base.get_input_embeddings().weight.device
        batch = {k: v.to(device) for k, v in self.collator([feature]).items() if isinstance(v, Tensor)}
        mask_BT = supervised_rows(batch)
        assert mask_BT is not None
        layout = read_layout(batch, mask_BT, self.block_size)
        labels_BT = batch.get("shift_labels")
        if labels_BT is None:
            labels_BT = torch.cat([batch["labels"][:, 1:], batch["labels"][:, :1]], 1)
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "shift_labels")}
        was_training = base.training
        base.eval()
        try:
            with ExitStack() as stack:
                if hasattr(self.model, "disable_adapter"):
                    stack.enter_context(self.model.disable_adapter())
                hidden_BTM = base.base_model(**inputs, use_cache=False).last_hidden_state
                losses_S = row_losses(base, hidden_BTM[mask_BT], labels_BT[mask_BT])
        finally:
            base.train(was_training)
        sums_N2 = torch.zeros(mask_BT.numel(), 2, device=device)
        sums_N2[mask_BT.flatten(), 0] = losses_S
        sums_N2[mask_BT.flatten(), 1] = 1.0
        means_K2 = pool_rows(sums_N2, layout, "mean")
        return (means_K2[:, 0] / means_K2[:, 1].clamp_min(1e-9)).cpu()
