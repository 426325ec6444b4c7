"""What one forward of the model tells the layers: documents, supervised rows, and the selections made from them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lemo.core.layout import Layout
from lemo.core.plan import Plan
from lemo.core.policy import select
from lemo.core.score import Random, ScoreInputs, Scorer, scorer_named, scores_by_layer
from lemo.core.selection import RowSet, Selection
from lemo.errors import ConfigError
from lemo.ops.backend import HostCopy, on_device_of
from lemo.runtime.context import parts_rows
from lemo.runtime.fused.call import Recompute
from lemo.runtime.fused.factors import AdapterFactors
from lemo.runtime.fused.offload import Convoy
from lemo.runtime.rows import all_rows

T = TypeVar("T")

_IGNORED = -100
LOCAL_ROWS = "local_rows"  # keyword of a call of the model: (B, T) bool, loss rows that attend locally


class RunDense(Exception):
    """A batch that lemo runs densely; the message says why and is shown to the user once."""


@dataclass
class BatchContext:
    """One forward of the model under selection. Lives from its start to its end; backward never reads it.

    Attributes:
        plan: ratios, predictors and bypass of every layer.
        layout: documents and blocks of the batch.
        step: number of sparse forwards so far, for the `random` scorer.
        trains: whether it is a training forward.
        repeats: whether backward repeats an earlier forward, for a checkpoint around the model.
        in_place: whether rows are written into the residual stream itself.
        held: layers that copy the stream nevertheless, because somebody else may hold it as it comes.
        maskless: whether the model was kept from building its own attention masks.
        document_keys_D: (D,) what tells documents apart for the `random` scorer.
        fused: layers that the fused engine runs.
        recompute: what it computes again in backward.
        offload: takes what it saves for keys alone to the host; None leaves it on the device.
        loss_rows_only: nothing but the rows that carry loss is read behind the last layer.
        defers_norm: the norm before the head is left to the loss, which runs it on its rows.
        adapters: factors of the fused layers' adapters.
        selections: selection of every layer that has run; the same object for layers that choose alike.
        mlp_selections: rows of the MLP of every layer that has its own.
    """

    plan: Plan
    layout: Layout
    step: int = 0
    trains: bool = True
    repeats: bool = False
    in_place: bool = True
    held: frozenset[int] = frozenset()
    maskless: bool = False
    document_keys_D: Tensor | None = None
    fused: frozenset[int] = frozenset()
    recompute: Recompute = "none"
    offload: Convoy | None = None
    loss_rows_only: bool = False
    defers_norm: bool = False
    adapters: AdapterFactors = field(default_factory=AdapterFactors)
    selections: dict[int, Selection] = field(default_factory=dict)
    mlp_selections: dict[int, RowSet] = field(default_factory=dict)
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def by_rows(self) -> bool:
        """Whether every layer runs by rows: the model's own attention has no mask, or not the documents' borders."""
        return self.maskless or self.layout.unseen_borders

    def writes_into(self, index: int) -> bool:
        """Whether layer `index` may write into the stream that it gets."""
        return self.in_place and index not in self.held

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once per batch and plan. A selection in the key counts as the object that it is."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def select(self, index: int, x_NM: Tensor) -> Selection:
        """Selection of layer `index` for its input (B·T, M), without gradient and without host synchronisation."""
        layer = self.plan.layers[index]
        if layer.is_dense:
            selection = self.once("dense", lambda: Selection(None, None))
        else:
            scorer = scorer_named(self.plan.scorer, predictor=layer.predictor, seed=self.plan.seed)
            if scores_by_layer(scorer):
                selection = self._select(index, scorer, x_NM)
            else:
                threshold = layer.threshold if self.plan.policy == "threshold" else None
                key = ("selection", layer.forward_ratio, layer.backward_ratio, threshold)
                selection = self.once(key, lambda: self._select(index, scorer, x_NM))
        self.selections[index] = selection
        return selection

    def _select(self, index: int, scorer: Scorer, x_NM: Tensor) -> Selection:
        layer = self.plan.layers[index]
        with torch.no_grad():
            selection = select(
                self.layout,
                scorer.scores(self._score_inputs(index, x_NM)),
                forward_ratio=layer.forward_ratio,
                backward_ratio=layer.backward_ratio,
                policy=self.plan.policy,
                threshold=layer.threshold,
                ratio_of=self.plan.ratio_of,
            )
        if selection.backward is None and parts_rows(self.plan, self.layout, index):
            # Not the layer's dense call: all rows pass gradient, but some of them attend locally.
            everything = self.layout.once("all rows, with gradient", lambda: _once_more(all_rows(self.layout)))
            selection = Selection(selection.forward, everything)
        return selection

    def select_mlp(self, index: int, x_NM: Tensor, rows: RowSet) -> RowSet | None:
        """Rows of layer `index` that also run its MLP, a subset of `rows`; None when all of them do."""
        layer = self.plan.layers[index]
        if self.plan.mlp != "own" or layer.mlp_ratio is None or layer.mlp_ratio >= layer.forward_ratio:
            return None
        with torch.no_grad():
            if layer.mlp_predictor is None or self.plan.scorer != "predictor":
                scores_K = Random(self.plan.seed + 1).scores(self._score_inputs(index, x_NM)).to(self.layout.device)
            else:
                scores_K = layer.mlp_predictor.scores(x_NM, self.layout)
            kept_K = torch.zeros(len(scores_K), dtype=torch.bool, device=scores_K.device)
            kept_K[self.layout.block_of_row_N[rows.rows_N]] = True
            # Every block that the attention keeps outranks every block that it does not.
            scores_K = torch.where(kept_K, scores_K.float().sigmoid(), -1.0)
            ratios = {"forward_ratio": layer.mlp_ratio, "backward_ratio": layer.mlp_ratio}
            chosen = select(self.layout, scores_K, **ratios, ratio_of=self.plan.ratio_of)
        self.mlp_selections[index] = chosen.forward
        return chosen.forward

    def _score_inputs(self, index: int, x_NM: Tensor) -> ScoreInputs:
        keys_D = self.document_keys_D
        return ScoreInputs(self.layout, x_NM=x_NM, layer=index, step=self.step, document_keys_D=keys_D)


def _once_more(rows: RowSet) -> RowSet:
    """The same rows as another object, here and on the host: the set of those that pass gradient."""
    return replace(rows, twin=None if rows.twin is None else replace(rows.twin))


def document_keys(layout: Layout) -> Tensor | None:
    """(D,) int64 numbers made of the documents' own tokens, so that a document is drawn alike wherever it is packed."""
    if layout.ids_BT is None:
        return None
    tokens_N = layout.ids_BT.detach().reshape(-1).cpu()
    host = layout.on_host or layout
    document_N, position_N = host.document_of_row_N.cpu(), host.position_of_row_N.cpu()
    real = document_N >= 0
    mixed = (tokens_N[real] + 1) * (2 * position_N[real] + 1) * 2_654_435_761
    return torch.zeros(len(layout.document_start_D), dtype=torch.int64).index_add_(0, document_N[real], mixed)


def read_layout(
    inputs: Mapping[str, Any],
    supervised_BT: Tensor | None,
    block_size: int,
    local_BT: Tensor | None = None,
    reads_positions: bool = True,
) -> Layout:
    """Documents and supervised rows of a call of the model.

    Documents follow what Transformers' dense attention would see: `seq_idx` or cumulative lengths where the batch has
    them, restarts of `position_ids` where there is no attention mask, else one document per sequence; rows that the
    mask hides belong to none.

    Args:
        inputs: keywords of the model's forward: input_ids or inputs_embeds, attention_mask, position_ids, seq_idx,
            cu_seq_lens_q, labels, shift_labels.
        supervised_BT: (B, T) rows that carry loss, beside those that labels name.
        block_size: C.
        local_BT: (B, T) bool, rows that carry loss and attend locally; None for none.
        reads_positions: the model's own attention finds the borders of documents in `position_ids`.

    Raises:
        ConfigError: `local_BT` is not (B, T).
        RunDense: masks that are not (B, T), or that hide rows inside a sequence.
    """
    source = inputs.get("input_ids")
    source = inputs.get("inputs_embeds") if source is None else source
    if source is None:
        raise RunDense("the call has neither input_ids nor inputs_embeds")
    batch, tokens = source.shape[:2]
    labelled_BT = supervised_rows(inputs)
    if supervised_BT is None:
        supervised_BT, labelled_BT = labelled_BT, None
    elif labelled_BT is not None:
        supervised_BT = supervised_BT.to(labelled_BT.device) | labelled_BT
    # Documents may be read from the device: what it is to compute has been sent by then.
    document_BT, unseen = _documents(inputs, batch, tokens)
    unseen = unseen or not (reads_positions or _is_whole(document_BT))
    if local_BT is not None and tuple(local_BT.shape) != (batch, tokens):
        raise ConfigError(f"{LOCAL_ROWS} must be ({batch}, {tokens}) as the tokens are, got {tuple(local_BT.shape)}")
    sizes = {"block_size": block_size, "device": source.device}
    layout = Layout.build(document_BT, supervised_BT, local_BT=local_BT, labelled_BT=labelled_BT, **sizes)
    return replace(layout, ids_BT=inputs.get("input_ids"), unseen_borders=unseen)


def shifted_labels(inputs: Mapping[str, Any]) -> Tensor:
    """(B, T) labels by the rows that predict them: `shift_labels`, or `labels` moved by one; -100 in the last row."""
    shift_labels, labels = inputs.get("shift_labels"), inputs.get("labels")
    if shift_labels is not None:
        return shift_labels
    moved_BT = torch.full_like(labels, _IGNORED)
    moved_BT[:, :-1] = labels[:, 1:]
    return moved_BT


def supervised_rows(inputs: Mapping[str, Any]) -> Tensor | None:
    """(B, T) bool: row t predicts a token that counts in the loss (`shift_labels[t]` or `labels[t+1]` != -100)."""
    shift_labels, labels = inputs.get("shift_labels"), inputs.get("labels")
    if shift_labels is not None:
        return shift_labels != _IGNORED
    if labels is None:
        return None
    supervised_BT = torch.zeros_like(labels, dtype=torch.bool)
    supervised_BT[:, :-1] = labels[:, 1:] != _IGNORED
    return supervised_BT


def _documents(inputs: Mapping[str, Any], batch: int, tokens: int) -> tuple[Tensor, bool]:
    """(B, T) documents on the CPU, -1 for padding; and whether borders lie where `position_ids` have none."""
    mask, position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise RunDense("the attention mask is not one (B, T) tensor, so documents and padding cannot be read from it")
    if position_ids is not None and (mask is not None or position_ids.dim() != 2):
        position_ids = None  # dense attention finds no documents in it then
    named = inputs.get("seq_idx"), inputs.get("cu_seq_lens_q"), position_ids, mask
    # All on their way before the host waits for the first.
    copies = [None if x is None else _begin_copy(x.detach()) for x in named]
    seq_idx, cumulative, positions, mask = (None if x is None else x.read().cpu() for x in copies)
    unseen = False
    restarts_BT = None if positions is None else _restarts(positions, batch, tokens)
    if seq_idx is not None or cumulative is not None:
        if seq_idx is not None:
            document_BT = seq_idx.to(torch.int64).expand(batch, tokens).clone()
        else:
            ends = cumulative.to(torch.int64)[1:]
            document_BT = torch.searchsorted(ends, torch.arange(batch * tokens), right=True).view(batch, tokens)
        borders_BT = document_BT[:, 1:] != document_BT[:, :-1]
        if borders_BT.any():
            unseen = restarts_BT is None or not torch.equal(borders_BT, restarts_BT)
    else:
        document_BT = torch.zeros(batch, tokens, dtype=torch.int64)
        if restarts_BT is not None:
            document_BT[:, 1:] = restarts_BT.cumsum(1)
    if mask is None:
        return document_BT, unseen
    seen_BT = mask.bool()
    if ((seen_BT[:, 1:] != seen_BT[:, :-1]).sum(1) + seen_BT[:, 0] > 2).any():
        raise RunDense("the attention mask hides rows inside a sequence; only padding at its ends is supported")
    return document_BT.masked_fill(~seen_BT, -1), unseen


def _begin_copy(tensor: Tensor) -> HostCopy:
    with on_device_of(tensor):  # the copy waits for the stream of the current device
        return HostCopy(tensor)


def _restarts(position_ids: Tensor, batch: int, tokens: int) -> Tensor:
    """(B, T - 1) bool: positions that do not follow on the one before."""
    ids_BT = position_ids.expand(batch, tokens)
    return ids_BT[:, 1:] != ids_BT[:, :-1] + 1


def _is_whole(document_BT: Tensor) -> bool:
    """Whether no sequence has rows of two documents; padding is none."""
    before, after = document_BT[:, :-1], document_BT[:, 1:]
    return not bool(((before != after) & (before >= 0) & (after >= 0)).any())
