"""Scorers: what ranks the blocks of a layer. Some run in training, the others in calibration and studies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from lemo.core.layout import Layout
from lemo.core.predictor import PatternPredictor, block_positions, pool_rows, to_device
from lemo.core.questions import Questions
from lemo.errors import ConfigError
from lemo.ops import block_score, key_block_scores

T = TypeVar("T")


@dataclass(frozen=True)
class ScoreInputs:
    """What a scorer may look at. A scorer names what it misses in a ConfigError.

    Attributes:
        layout: documents and blocks of the batch.
        x_NM: (N, M) layer input.
        query_HND, key_GND: (H, N, D) and (G, N, D) after RoPE; H is a multiple of G.
        scaling: factor on q·k.
        output_NM: (N, M) layer output.
        layer: index of the layer.
        step: counter of the training forward.
        document_keys_D: (D,) int64 on the CPU, what tells documents apart for `random`; their lengths when None.
        value_GND: (G, N, D) values.
    """

    layout: Layout
    x_NM: Tensor | None = None
    query_HND: Tensor | None = None
    key_GND: Tensor | None = None
    scaling: float | None = None
    output_NM: Tensor | None = None
    layer: int = 0
    step: int = 0
    document_keys_D: Tensor | None = None
    value_GND: Tensor | None = None


class Scorer(Protocol):
    """Ranks blocks: higher is kept first.

    A scorer whose scores are the same in all layers of a batch says so by an attribute `by_layer`, False: layers with
    equal budgets then share one selection. See `scores_by_layer`.
    """

    def scores(self, inputs: ScoreInputs) -> Tensor:
        """(K,) fp32 scores on the batch's device, or on the host where they are known without asking the device."""
        ...


@dataclass(frozen=True)
class Predicted:
    """Scores of a layer's pattern predictor."""

    predictor: PatternPredictor

    def scores(self, inputs: ScoreInputs) -> Tensor:
        """(K,) fp32. Needs `x_NM`."""
        return self.predictor.scores(given(inputs.x_NM, "x_NM", "predictor"), inputs.layout)


@dataclass(frozen=True)
class Random:
    """Uniform draws in [0, 1) that depend on (seed, layer, step, document key, place of the block in its document).

    The place of a document in the batch does not matter, so a packed document is drawn like the same document alone.
    Two documents with the same key draw alike; the default key is the length.
    """

    seed: int = 0

    def scores(self, inputs: ScoreInputs) -> Tensor:
        """(K,) fp32 on the host, where they are drawn and rows can be found: no device is asked."""
        layout = inputs.layout
        keys_D = layout.document_length_D if inputs.document_keys_D is None else inputs.document_keys_D
        blocks_D = torch.bincount(layout.block_document_K, minlength=len(keys_D))
        first_D = torch.cumsum(blocks_D, 0) - blocks_D
        place_K = torch.arange(len(layout.block_document_K)) - first_D[layout.block_document_K]
        state = _mix(torch.tensor([self.seed * 1_000_003 + inputs.layer * 8191 + inputs.step * 131_071]))
        state = _mix(state + keys_D.to("cpu", torch.int64))[layout.block_document_K]
        bits = _mix(_mix(state) + place_K) & ((1 << 24) - 1)
        return bits.float() / (1 << 24)


@dataclass(frozen=True)
class Interaction:
    """The paper's informativeness: s_ij = mean over heads of max(q_i·k_j·scaling, 0).

    Score of a block pair = max of s_ij inside it; of key block n = mean over the query blocks m >= n of its document.
    *Source*: LeMo, section 4.
    """

    def scores(self, inputs: ScoreInputs) -> Tensor:
        """(K,) fp32. Needs `query_HND`, `key_GND` and `scaling`."""
        layout = inputs.layout
        pairs_KK = block_score(
            given(inputs.query_HND, "query_HND", "interaction"),
            given(inputs.key_GND, "key_GND", "interaction"),
            to_device(layout.block_start_K, layout.device),
            to_device(layout.block_length_K, layout.device),
            to_device(layout.block_document_K, layout.device),
            scaling=given(inputs.scaling, "scaling", "interaction"),
        )
        return key_block_scores(pairs_KK.float(), to_device(layout.block_document_K, pairs_KK.device))


@dataclass(frozen=True)
class AttentionMass:
    """Attention probability that lands in a block: mean over heads and over the rows that may attend to it.

    Exact softmax attention per document (no window, no softcap), formed a slice of queries at a time.

    Attributes:
        query_stride: look at every n-th query row of a document only; 1 for all.
        limit_bytes: most memory that one slice of probabilities takes.
    """

    query_stride: int = 1
    limit_bytes: int = 1 << 28

    def scores(self, inputs: ScoreInputs) -> Tensor:
        """(K,) fp32. Needs `query_HND`, `key_GND` and `scaling`."""
        return self.of_rows(self.row_mass(inputs), inputs.layout)

    def of_rows(self, row_mass_HN: Tensor, layout: Layout) -> Tensor:
        """(K,) fp32 from the result of `row_mass`."""
        row_mass_N = row_mass_HN.mean(0)
        length_K = to_device(layout.block_length_K, row_mass_N.device)
        mass_K = pool_rows(row_mass_N[:, None], layout, "mean")[:, 0] * length_K
        # Query rows seen at or after the block's first row, counted as row_mass takes them: from the document's end.
        end_D = layout.document_start_D + layout.document_length_D
        rows_K = end_D[layout.block_document_K] - layout.block_start_K
        seen_K = (rows_K + self.query_stride - 1) // self.query_stride
        return mass_K / to_device(seen_K, mass_K.device)

    def row_mass(self, inputs: ScoreInputs) -> Tensor:
        """Probability that each row receives, summed over the query rows looked at: (H, N) fp32; 0 for padding."""
        query = given(inputs.query_HND, "query_HND", "attention_mass")
        key = given(inputs.key_GND, "key_GND", "attention_mass")
        scaling = given(inputs.scaling, "scaling", "attention_mass")
        layout = inputs.layout
        mass_HN = torch.zeros(query.shape[:2], device=query.device)
        for start, length in zip(layout.document_start_D.tolist(), layout.document_length_D.tolist(), strict=True):
            rows = slice(start, start + length)
            taken = strided(torch.arange(length, device=query.device), self.query_stride)
            for _, logits_HqT in logit_slices(query[:, rows], key[:, rows], scaling, taken, self.limit_bytes):
                mass_HN[:, rows] += logits_HqT.softmax(-1).sum(1)
        return mass_HN


@dataclass(frozen=True)
class UpdateNorm:
    """Size of the layer's update, mean over the rows of a block. For study: it ranks worse than attention does."""

    def scores(self, inputs: ScoreInputs) -> Tensor:
        """(K,) fp32. Needs `x_NM` and `output_NM`."""
        x_NM, output_NM = given(inputs.x_NM, "x_NM", "update"), given(inputs.output_NM, "output_NM", "update")
        return pool_rows((output_NM.float() - x_NM.float()).norm(dim=-1, keepdim=True), inputs.layout, "mean")[:, 0]


@dataclass(frozen=True)
class Position:
    """Place in the document alone, later blocks first. A floor that predictors have to beat."""

    by_layer: ClassVar[bool] = False

    def scores(self, inputs: ScoreInputs) -> Tensor:
        """(K,) fp32."""
        return block_positions(inputs.layout, inputs.layout.device)[:, 0]


@dataclass(frozen=True)
class Recent:
    """Minus the number of blocks to the next block with loss of the same document, itself 0.

    Rows with loss attend most to the rows shortly before them. Blocks after the last one with loss come last; where a
    document has no loss (as when only a forward is run), later blocks come first.
    """

    by_layer: ClassVar[bool] = False

    def scores(self, inputs: ScoreInputs) -> Tensor:
        """(K,) fp32, on the host, which knows them: rows are found there, and the device is not asked to rank blocks.

        Needs nothing of the layer, so it is made once per batch.
        """
        return inputs.layout.once("recent", lambda: _recent(inputs.layout))


def _recent(layout: Layout) -> Tensor:
    document_K, supervised_K = layout.block_document_K.tolist(), layout.supervised_K.tolist()
    blocks = len(document_K)
    found, distance = [0.0] * blocks, 0
    for k in reversed(range(blocks)):
        if k + 1 == blocks or document_K[k + 1] != document_K[k]:
            distance = blocks
        distance = 0 if supervised_K[k] else distance + 1
        found[k] = -float(distance)
    return torch.tensor(found)


@dataclass(frozen=True)
class Words(Questions):
    """Blocks that share rare words with what is asked first, those before blocks with loss next.

    What is asked, and what a block scores, is said by `Questions`. Token ids are copied to the host once a batch.
    """

    by_layer: ClassVar[bool] = False

    def scores(self, inputs: ScoreInputs) -> Tensor:
        """(K,) fp32, on the host, made once per batch from token ids alone.

        Raises:
            ConfigError: the batch has no token ids.
        """
        return inputs.layout.once(self, lambda: self._score(inputs.layout))

    def _score(self, layout: Layout) -> Tensor:
        ids_N = given(layout.ids_BT, "input_ids", "words").detach().cpu().reshape(-1)
        found_K = self.block_scores(ids_N, layout)
        # Most blocks score nothing: these fall as `Recent` has them.
        return found_K + _recent(layout) * (1e-4 / max(1, len(found_K)))


@dataclass(frozen=True)
class Fixed:
    """Scores given beforehand, for oracle runs."""

    scores_K: Tensor

    def scores(self, inputs: ScoreInputs) -> Tensor:
        """(K,), as given."""
        return self.scores_K


TRAINING_SCORERS = ("predictor", "random", "recent", "words")
SAME_IN_ALL_LAYERS = ("recent", "words")  # of these: scores that depend on the batch alone
STUDY_SCORERS: dict[str, Callable[[], Scorer]] = {
    "interaction": Interaction,
    "attention_mass": AttentionMass,
    "update": UpdateNorm,
    "position": Position,
}


def scorer_named(name: str, *, predictor: PatternPredictor | None = None, seed: int = 0) -> Scorer:
    """The scorer of a plan's or recipe's name.

    Raises:
        ConfigError: unknown name, or `predictor` without one.
    """
    if name == "predictor":
        if predictor is None:
            raise ConfigError("scorer 'predictor' needs a calibrated predictor for every layer that skips rows")
        return Predicted(predictor)
    if name == "random":
        return Random(seed)
    if name == "recent":
        return Recent()
    if name == "words":
        return Words()
    if name in STUDY_SCORERS:
        return STUDY_SCORERS[name]()
    raise ConfigError(f"scorer must be one of {', '.join((*TRAINING_SCORERS, *STUDY_SCORERS))}, got {name!r}")


def scores_by_layer(scorer: Scorer) -> bool:
    """Whether scores may depend on the layer, its input or its number; True of scorers that do not say."""
    return getattr(scorer, "by_layer", True)


def mlp_scores(norm_N: Tensor, layout: Layout, pool: str = "mean") -> Tensor:
    """Informativeness of blocks for the MLP: mean or max of the intermediate activation's norm. (K,) fp32."""
    return pool_rows(norm_N.float()[:, None], layout, pool)[:, 0]


def strided(rows_Q: Tensor, stride: int) -> Tensor:
    """Every n-th of some query rows, counted back from the last, which sees every key."""
    return rows_Q[(len(rows_Q) - 1) % stride :: stride] if len(rows_Q) else rows_Q


def logit_slices(
    query_HTD: Tensor, key_GTD: Tensor, scaling: float, rows_Q: Tensor, limit_bytes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Causal attention logits of some query rows of one document, a slice of them at a time.

    Args:
        query_HTD: (H, T, D), a document's rows.
        key_GTD: (G, T, D), H a multiple of G.
        scaling: factor on q·k.
        rows_Q: ascending query rows.
        limit_bytes: most memory that one slice takes.

    Yields:
        Query rows (q,) and their logits (H, q, T) in fp32, -inf where a key is later than the query.
    """
    heads, length, head_dim = query_HTD.shape
    groups, keys_GTD = key_GTD.shape[0], key_GTD.float()
    place_T = torch.arange(length, device=query_HTD.device)
    for place in rows_Q.split(max(1, limit_bytes // (4 * heads * length))):
        part = query_HTD[:, place].float().reshape(groups, -1, head_dim)
        logits = (part @ keys_GTD.transpose(1, 2)).reshape(heads, len(place), length) * scaling
        yield place, logits.masked_fill_(place_T > place[:, None], -torch.inf)


def given(value: T | None, name: str, scorer: str) -> T:
    """The value, or a ConfigError that names what the scorer misses."""
    if value is None:
        raise ConfigError(f"scorer '{scorer}' needs {name}, which this pass did not record")
    return value


def pair_numbers(count: int, *, seed: int, layer: int, step: int, key: int) -> Tensor:
    """(count, count) int64 numbers >= 0 for the pairs of a document's stripes, on the CPU.

    They depend on what `Random` depends on, a document's key in place of its place in the batch, and on the pair.
    """
    state = _mix(_mix(torch.tensor([seed * 1_000_003 + layer * 8191 + step * 131_071])) + key)
    first = _mix(_mix(state ^ 0x2545F4914F6CDD1D) + torch.arange(count))
    return _mix(_mix(first)[:, None] + torch.arange(count)) & ((1 << 62) - 1)


def _mix(state: Tensor) -> Tensor:
    """A bijective scrambling of int64 values (multiply and xor-shift; products wrap)."""
    state = (state ^ (state >> 31)) * 0x5851F42D4C957F2D
    state = (state ^ ((state >> 29) & 0x7FFFFFFFF)) * 0x14057B7EF767814F
    return state ^ ((state >> 32) & 0xFFFFFFFF)
