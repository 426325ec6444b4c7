"""Loss of a model over text, dense or sparse, in all and by position. Logits exist for a segment of rows at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lemo.errors import ConfigError, DataError
from lemo.runtime.attach import Handle
from lemo.runtime.batch import read_layout, shifted_labels, supervised_rows
from lemo.runtime.head import forward_parameters, row_losses
from lemo.runtime.model import causal_model

_OF_THE_LOSS = ("labels", "shift_labels", "loss_weights")
Combine = Callable[[Tensor, Tensor, list[float]], tuple[Tensor, Tensor, list[float]]]


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss of the rows at positions [start, end) of their document; nats is NaN when there are none."""

    start: int
    end: int
    nats: float
    tokens: int


@dataclass(frozen=True)
class LossReport:
    """Loss over a data set.

    Attributes:
        mode: `dense`, or `sparse (look-ahead)`: selection sees later tokens, so the latter is no causal model's loss.
        nats: mean loss per predicted token.
        tokens: predicted tokens.
        by_position: the same by position in the document, in equal bins.
        by_sequence: mean loss of each sequence, in order, for paired comparisons; NaN where nothing is predicted.
        subset: the same over the labels of a subset, from the same forward; None where none was asked for.
    """

    mode: str
    nats: float
    tokens: int
    by_position: tuple[PositionLoss, ...]
    by_sequence: tuple[float, ...]
    subset: LossReport | None = None

    @property
    def perplexity(self) -> float:
        """exp(nats)."""
        return math.exp(self.nats)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the subset's."""
        values = asdict(self)
        del values["subset"]
        return {**values, "perplexity": self.perplexity}


class _Sums:
    """Losses added up by position, and by sequence."""

    def __init__(self) -> None:
        self.nats_T, self.counts_T = (torch.zeros(0, dtype=torch.float64) for _ in range(2))
        self.sequences: list[float] = []

    def add(self, loss_BT: Tensor, mask_BT: Tensor, position_BT: Tensor) -> None:
        """Adds the rows of a batch that count."""
        most = int(position_BT.max()) + 1
        if most > len(self.nats_T):
            self.nats_T, self.counts_T = (F.pad(x, (0, most - len(x))) for x in (self.nats_T, self.counts_T))
        self.nats_T.index_add_(0, position_BT[mask_BT], loss_BT[mask_BT])
        self.counts_T.index_add_(0, position_BT[mask_BT], torch.ones(int(mask_BT.sum()), dtype=torch.float64))
        pairs = zip((loss_BT * mask_BT).sum(1).tolist(), mask_BT.sum(1).tolist(), strict=True)
        self.sequences += [total / count if count else math.nan for total, count in pairs]

    def report(self, mode: str, bins: int, combine: Combine | None, subset: LossReport | None = None) -> LossReport:
        """The report over what was added, by all processes where several share it."""
        found = (self.nats_T, self.counts_T, self.sequences)
        nats_T, counts_T, sequences = found if combine is None else combine(*found)
        tokens = int(counts_T.sum())
        if tokens == 0:
            raise DataError("no token of the evaluation data carries a label")
        return LossReport(
            mode=mode,
            nats=float(nats_T.sum()) / tokens,
            tokens=tokens,
            by_position=_bin(nats_T, counts_T, bins),
            by_sequence=tuple(sequences),
            subset=subset,
        )


def evaluate_loss(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    handle: Handle | None = None,
    sparse: bool = False,
    bins: int = 8,
    segment_rows: int = 2048,
    combine: Combine | None = None,
    subset: Iterable[Mapping[str, Any]] | None = None,
) -> LossReport:
    """Loss of every labelled token.

    Args:
        model: a Transformers causal language model, PEFT-wrapped or not, with or without an attached plan.
        batches: batches with `labels`; tensors are moved to the model's device.
        handle: the attached plan, needed when `sparse`.
        sparse: select rows as training does, which needs labels that leave rows to skip (`LossRows`, answers only).
            Otherwise the forward is dense, attached or not.
        bins: number of position bins over the longest document.
        segment_rows: rows whose logits exist at a time.
        combine: takes sums and counts by position and the sequences' losses of these batches, and returns those of
            all, where several processes share an evaluation.
        subset: the same batches with some of their labels only; the report then has a second one, over these, that
            costs no forward of its own. Not for sparse evaluations, whose selection depends on the labels.

    Returns:
        LossReport.

    Raises:
        ConfigError: `sparse` without a handle, or with so many labels that no batch had a row to skip, or a
            `subset`.
        DataError: no token carries a label, or the subset has other batches or labels.

    Numerics:
        logits and loss in fp32, sums in fp64. The draws of a `random` scorer are the same in every evaluation, and
        training afterwards goes on as if there had been none.
    """
    if sparse and handle is None:
        raise ConfigError("a sparse evaluation needs the handle of an attached plan")
    if sparse and subset is not None:
        raise ConfigError("a sparse evaluation selects rows by their labels, so a subset of them needs its own")
    was_training = model.training
    model.eval()
    every, some = _Sums(), _Sums()
    parts = itertools.repeat(None) if subset is None else iter(subset)
    try:
        for batch in batches if handle is None else _uncounted(batches, handle, sparse):
            losses = _batch_losses(model, batch, handle, sparse, segment_rows)
            every.add(*losses)
            part = next(parts, None)
            if subset is not None:
                loss_BT, mask_BT, position_BT = losses
                some.add(loss_BT, _part_of(mask_BT, batch, part), position_BT)
    finally:
        model.train(was_training)
    within = None if subset is None else some.report("dense", bins, combine)
    return every.report("sparse (look-ahead)" if sparse else "dense", bins, combine, within)


def _part_of(mask_BT: Tensor, batch: Mapping[str, Any], part: Mapping[str, Any] | None) -> Tensor:
    """Rows of a batch that carry loss in its subset."""
    rows_BT = None if part is None else supervised_rows(part)
    if part is None or rows_BT is None or not torch.equal(part["input_ids"].cpu(), batch["input_ids"].cpu()):
        raise DataError("the subset of an evaluation needs the same batches, with labels")
    rows_BT = rows_BT.cpu()
    if bool((rows_BT & ~mask_BT).any()):
        raise DataError("the subset of an evaluation has labels that the evaluation itself lacks")
    return rows_BT


def _uncounted(batches: Iterable[Mapping[str, Any]], handle: Handle, sparse: bool) -> Iterator[Mapping[str, Any]]:
    """The batches, while the handle counts forwards from 0; its counts and selections of training come back after."""
    before = (handle.sparse_evaluations, handle.dense_batches, handle.selections, handle._real_rows)
    handle.sparse_evaluations, seen = 0, 0
    try:
        for batch in batches:
            seen += 1
            yield batch
        dense = all(layer.is_dense for layer in handle.plan.layers)
        if sparse and seen and handle.sparse_evaluations == 0 and not dense:
            raise ConfigError(
                "the sparse evaluation had nothing to skip: nearly every row carries a label. Mask labels as training "
                "does, with LossRows or answers only"
            )
    finally:
        handle.sparse_evaluations, handle.dense_batches, handle.selections, handle._real_rows = before


@torch.no_grad()
def _batch_losses(
    model: Any, batch: Mapping[str, Any], handle: Handle | None, sparse: bool, segment_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) fp64 losses of rows, which of them count, and rows' positions in their document; on the CPU."""
    base = causal_model(model)
    device = base.get_input_embeddings().weight.device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    mask_BT = supervised_rows(inputs)
    if mask_BT is None:
        raise DataError("evaluation needs batches with labels")
    labels_BT = shifted_labels(inputs)
    layout = read_layout(inputs, mask_BT, handle.plan.block_size if handle is not None else 64)
    hidden_BTM = last_hidden(model, inputs, mask_BT, handle=handle, sparse=sparse)
    loss_BT = torch.zeros(mask_BT.shape, dtype=torch.float64, device=device)
    loss_BT[mask_BT] = row_losses(base, hidden_BTM[mask_BT], labels_BT[mask_BT], segment_rows).double()
    return loss_BT.cpu(), mask_BT.cpu(), layout.position_of_row_N.reshape(mask_BT.shape).cpu()


@torch.no_grad()
def last_hidden(
    model: Any, inputs: Mapping[str, Any], mask_BT: Tensor, *, handle: Handle | None = None, sparse: bool = False
) -> Tensor:
    """Last hidden state of the model's own call, without logits: whatever wraps the model takes part.

    Args:
        model: in eval mode.
        inputs: a batch on the model's device; labels in it, and their weights, are not passed on.
        mask_BT: (B, T) bool, rows that carry loss.
        handle: the attached plan, if any.
        sparse: select rows; else the forward is dense.

    Returns:
        (B, T, M) in the model's dtype.
    """
    base = causal_model(model)
    arguments = {key: value for key, value in inputs.items() if key not in _OF_THE_LOSS}
    arguments["use_cache"] = False
    if "logits_to_keep" in forward_parameters(type(base)):
        arguments["logits_to_keep"] = 1
    caught: list[Tensor] = []
    # Most families call the base model, OPT its decoder directly; where both run, the outer one is last.
    backbones = {id(module): module for module in (base.get_decoder(), base.base_model)}
    hooks = [
        module.register_forward_hook(lambda module, args, output: caught.append(output.last_hidden_state))
        for module in backbones.values()
    ]
    try:
        with ExitStack() as stack:
            if handle is not None:
                stack.enter_context(handle.sparse_evaluation(sparse))
                stack.enter_context(handle.supervised(mask_BT))
            model(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return caught[-1]


def _bin(sums: Tensor, counts: Tensor, bins: int) -> tuple[PositionLoss, ...]:
    """Means over equal bins of positions."""
    total = len(sums)
    edges = [round(i * total / bins) for i in range(bins + 1)]
    found = []
    for start, end in itertools.pairwise(edges):
        if end > start:
            tokens = int(counts[start:end].sum())
            nats = float(sums[start:end].sum()) / tokens if tokens else math.nan
            found.append(PositionLoss(start, end, nats, tokens))
    return tuple(found)
