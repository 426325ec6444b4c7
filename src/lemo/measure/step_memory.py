"""Peak memory of a training step from sizes alone: the whole step walked through in a ledger."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from lemo.errors import ConfigError
from lemo.measure.attention_memory import INDEX, Workspace
from lemo.measure.fused_memory import FusedLayerMemory, index_bytes
from lemo.measure.layer_rows import LayerRows
from lemo.measure.ledger import Ledger, Scope
from lemo.measure.plain_memory import WIDE, PlainLayerMemory
from lemo.measure.sizes import ModelSizes

if TYPE_CHECKING:
    from lemo.runtime.fused.offload import Offload

Engine = Literal["fused", "generic", "plain"]
STREAM, TRANSIT = "residual stream and its gradient", "saved: on its way to the host"
LOGIT_BYTES = 12  # of Transformers' own loss, beside the logits: log-softmax, its gradient, and that of an fp32 copy
BOUND = 4  # bytes of a place among the keys
PREDICTOR_WIDTH, PREDICTOR_RANK, PREDICTOR_POOLS = 64, 32, 3


@dataclass(frozen=True)
class MemoryConstants:
    """What no reading of the code tells. Fitted to measured steps by benchmarks/estimate.py, on half of its points.

    Attributes:
        fixed_bytes: what libraries take through torch's allocator: workspaces of matrix products.
        attention: what the vendor's attention backward takes beside its results.
        share: of all that is counted, lost to the allocator's rounding.
        context_bytes: what the driver takes beside torch's allocator; counts only against the size of the card.
        reserve: of all that is counted, taken by the allocator for holes between tensors; likewise.
    """

    fixed_bytes: float = 80 * 2**20
    attention: Workspace = field(default_factory=Workspace)
    share: float = 0.0
    context_bytes: float = 700 * 2**20
    reserve: float = 0.03


CONSTANTS = MemoryConstants()


@dataclass(frozen=True)
class StepSetting:
    """One training step.

    Attributes:
        tokens: T of a sequence.
        loss_share: share of rows that carry loss and attend to all keys.
        batch: sequences.
        forward_ratio: share of rows that run a layer that skips.
        backward_ratio: share that passes gradient.
        kv: `kept` or `all`.
        gradient: `rows`, `pairs` or `keys`, of exact forward.
        dense_layers: how many layers never skip; the last is one of them unless it is 0.
        block_size: C.
        engine: `fused`; `generic`, Transformers' layers on rows; `plain`, without lemo.
        recompute: of the fused engine; for the others `none`, or `layer` for gradient checkpointing.
        segmented: the loss never forms all logits.
        segment_rows: rows of a loss segment.
        predictor: layers that skip have one.
        bypass_rank: R; 0 for none.
        pooled_features: width of the predictors' projection.
        forced_share: share of blocks that hold loss and attend to all keys; that of the rows when None.
        offload: what the fused engine saves for keys alone waits in host memory; `keys`: keys and values, too.
        context_window: of exact forward, rows of a chunk; None where all rows attend to all keys.
        far_share: of exact forward, share of the far keys that attention's backward reads.
        local_share: share of rows that carry loss besides, and attend within `context_window`.
        local_forward: what these rows attend to in forward, as `Plan.local_forward` has it.
        span: rows of a run of blocks that carry loss; None for single blocks.
    """

    tokens: int
    loss_share: float = 0.4
    batch: int = 1
    forward_ratio: float = 0.5
    backward_ratio: float = 0.5
    kv: Literal["kept", "all"] = "kept"
    gradient: Literal["rows", "pairs", "keys"] = "rows"
    dense_layers: int = 2
    block_size: int = 64
    engine: Engine = "fused"
    recompute: Literal["none", "mlp", "lin", "layer"] = "none"
    segmented: bool = True
    segment_rows: int = 2048
    predictor: bool = True
    bypass_rank: int = 64
    pooled_features: int = 128
    forced_share: float | None = None
    offload: Offload = False
    context_window: int | None = None
    far_share: float = 1.0
    local_share: float = 0.0
    local_forward: Literal["near", "all"] = "near"
    span: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for what no step can be."""
        if self.tokens < 2 or self.batch < 1:
            raise ConfigError(f"a step needs at least one sequence of 2 tokens, got {self.batch} of {self.tokens}")
        for name in ("loss_share", "forward_ratio", "backward_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        if self.backward_ratio > self.forward_ratio:
            raise ConfigError(f"backward_ratio {self.backward_ratio} exceeds forward_ratio {self.forward_ratio}")
        if self.local_share < 0 or self.loss_share + self.local_share > 1 + 1e-9:
            raise ConfigError(
                f"loss_share {self.loss_share} and local_share {self.local_share} must add up to 1 or less"
            )
        if self.local_share and (self.context_window is None or self.gradient != "keys"):
            raise ConfigError("local_share needs a context_window and gradient keys, of exact forward")
        if self.engine != "fused" and self.recompute in ("mlp", "lin"):
            raise ConfigError(f"recompute {self.recompute!r} is of the fused engine; the others know none and layer")
        if self.offload not in (False, True, "inputs", "keys"):
            raise ConfigError(f"offload must be false, true, inputs or keys, got {self.offload!r}")
        if self.engine != "fused" and self.offload:
            raise ConfigError(f"offload is of the fused engine; this step has {self.engine!r}")

    @property
    def rows(self) -> int:
        """B·T."""
        return self.batch * self.tokens

    @property
    def loss_rows(self) -> int:
        """Rows that carry loss."""
        return max(1, round((self.loss_share + self.local_share) * self.rows))

    @property
    def windows(self) -> bool:
        """Whether the window takes any key from any row: the second chunk still sees all."""
        return self.context_window is not None and self.tokens > 2 * self.context_window

    @property
    def skips(self) -> bool:
        """Whether some rows skip something."""
        return self.engine != "plain" and self.backward_ratio < 1 and self.kept_rows(self.backward_ratio) < self.rows

    def kept_rows(self, ratio: float) -> int:
        """Rows of a budget: whole blocks; blocks with loss and both ends of a sequence are always kept."""
        size = min(self.block_size, self.tokens)
        blocks = -(-self.tokens // size)
        share = self.loss_share if self.forced_share is None else self.forced_share
        forced = min(blocks, round((share + self.local_share) * blocks) + 2)
        kept = max(-(-int(ratio * blocks * 1e6) // 10**6), forced)
        return self.batch * min(self.tokens, min(blocks, kept) * size)


def layer_rows(sizes: ModelSizes, setting: StepSetting) -> list[LayerRows]:
    """Rows of every layer; the dense ones at the ends."""
    stream, layers = setting.rows, sizes.shape.layers
    dense = LayerRows(stream, stream, stream, bypass=False)
    if not setting.skips:
        found = [dense] * layers
    else:
        runs, passes = setting.kept_rows(setting.forward_ratio), setting.kept_rows(setting.backward_ratio)
        sparse = LayerRows(
            stream,
            runs,
            passes,
            kv_all=setting.kv == "all" and runs < stream,
            pairs=setting.gradient == "pairs",
            keys=setting.gradient == "keys",
            bypass=setting.bypass_rank > 0,
            samples=setting.far_share < 1 and passes < runs,
            local=_local_rows(setting, passes) if passes < runs else 0,
            window=setting.context_window if setting.windows else None,
            local_all=setting.local_forward == "all",
            run=_run_rows(setting, 2),
        )
        many = min(setting.dense_layers, layers)
        first, last = many - many // 2, many // 2
        found = [dense] * first + [sparse] * (layers - many) + [dense] * last
    if setting.engine == "fused" and sizes.defers_norm and setting.segmented:
        found[-1] = replace(last_rows(found[-1], setting.loss_rows), run=_run_rows(setting, 0))
    return found


def _run_rows(setting: StepSetting, ends: int) -> float:
    """Mean rows of a run of rows that carry loss and attend to all keys, with so many single blocks more."""
    if setting.span is None:
        return 0.0
    rows = setting.loss_share * setting.tokens
    runs = max(1, -(-round(rows) // setting.span))
    return (rows + ends * setting.block_size) / (runs + ends)


def _local_rows(setting: StepSetting, passes: int) -> int:
    """Rows of a layer that pass gradient within the window; in short sequences they are as all others."""
    size = min(setting.block_size, setting.tokens)
    blocks = round(setting.local_share * (setting.tokens // size))
    return min(setting.batch * blocks * size, passes - 1) if setting.windows else 0


def last_rows(rows: LayerRows, loss: int) -> LayerRows:
    """Rows of the last layer where nobody reads others than the loss behind it."""
    if rows.exact and not rows.keys:
        # Keys of rows that pass no gradient are constants: rows that do pass some run.
        return replace(rows, loss=rows.passes)
    return replace(rows, passes=rows.runs, loss=loss, local=min(rows.local, loss - 1))


def step_memory(sizes: ModelSizes, setting: StepSetting, constants: MemoryConstants = CONSTANTS) -> Ledger:
    """Walks through one step that is not the first: the optimizer has its state.

    Args:
        sizes: of model and adapter.
        setting: the step.
        constants: what was fitted.

    Returns:
        The ledger after the step, with the peak and what was held then.
    """
    return _Step(sizes, setting, constants).run()


class _Step:
    def __init__(self, sizes: ModelSizes, setting: StepSetting, constants: MemoryConstants) -> None:
        self.sizes, self.setting, self.constants = sizes, setting, constants
        self.ledger = Ledger()
        self.rows = layer_rows(sizes, setting)
        self.e = sizes.element_bytes
        self.stream_bytes = setting.rows * sizes.shape.width * self.e
        self.chosen: set[LayerRows] = set()

    def run(self) -> Ledger:
        from lemo.runtime.fused.offload import CHUNK_BYTES, SLOTS

        ledger, constants = self.ledger, self.constants
        self._standing()
        ledger.add(STREAM, self.stream_bytes)
        layers = [self._layer(rows) for rows in self.rows]
        for index, layer in enumerate(layers):
            ledger.moment = f"forward of layer {index}"
            self._between(layer)
            if layer.parked:
                ledger.held[TRANSIT] = min(ledger.held[TRANSIT] + layer.parked, SLOTS * layer.parked)
            self._choose(layer.rows)
            layer.forward()
        ledger.host_bytes = sum(-(-layer.parked // CHUNK_BYTES) * CHUNK_BYTES for layer in layers)
        ledger.moment = "loss"
        self._loss()
        for index, layer in reversed(list(enumerate(layers))):
            ledger.moment = f"backward of layer {index}"
            if index == len(layers) - 1 and self.setting.engine == "fused" and self.rows[-1].loss is None:
                # A gradient that autograd owns is copied by the first layer that would write into it, and held on to.
                ledger.add(STREAM, self.stream_bytes)
            self._between(layer)
            layer.backward()
            ledger.held[STREAM] = self.stream_bytes
            if not any(x.parked for x in layers[:index]):
                ledger.held[TRANSIT] = 0.0
        lost = constants.share * ledger.peak_bytes
        ledger.peak_bytes += lost
        ledger.peak_parts["libraries"] += lost
        return ledger

    def _layer(self, rows: LayerRows) -> FusedLayerMemory | PlainLayerMemory:
        setting, space = self.setting, self.constants.attention
        if setting.engine == "fused":
            return FusedLayerMemory(self.ledger, self.sizes, rows, setting.recompute, space, setting.offload)
        return PlainLayerMemory(
            self.ledger, self.sizes, rows, setting.recompute == "layer", space, setting.engine == "generic"
        )

    def _choose(self, rows: LayerRows) -> None:
        """Numbers of a layer's rows, until the step ends: layers without predictors have the same ones."""
        if self.setting.engine == "fused" and (self.setting.predictor or rows not in self.chosen):
            self.ledger.add("batch and positions", index_bytes(rows))
            self.chosen.add(rows)

    def _between(self, layer: FusedLayerMemory | PlainLayerMemory) -> None:
        """Autograd's layers return a new stream, and a new gradient of it, while the old one is held."""
        if isinstance(layer, PlainLayerMemory) and not layer.gathers:
            self.ledger.touch(STREAM, self.stream_bytes)

    def _standing(self) -> None:
        """What is held all the time."""
        ledger, sizes, setting = self.ledger, self.sizes, self.setting
        ledger.moment = "between steps"
        ledger.add("libraries", self.constants.fixed_bytes)
        ledger.add("weights", sizes.weight_bytes)
        # Weights and gradients; two moments, and beside weights of 16 bits a copy, in fp32 or wider.
        bytes_each, wide = sizes.adapter.element_bytes, max(WIDE, sizes.adapter.element_bytes)
        each = 2 * bytes_each + (2 if bytes_each == wide else 3) * wide
        ledger.add("adapter, gradients, optimizer", each * sizes.adapter.parameters)
        # Ids, labels and their shifted copy, positions, and the layout's three numbers of each row.
        ledger.add("batch and positions", (4 + (3 if setting.engine != "plain" else 0)) * INDEX * setting.rows)
        if setting.windows and setting.skips:
            # Where the keys of a row that attends locally begin and end: four bounds, two of its own chunk.
            ledger.add("batch and positions", 6 * BOUND * setting.rows)
        if sizes.rope:
            ledger.add("batch and positions", 2 * setting.tokens * sizes.shape.head_dim * self.e)
        if setting.skips:
            ledger.add("predictors and bypasses", self._helpers())

    def _helpers(self) -> float:
        """Predictors and bypasses of the layers that skip."""
        setting, width = self.setting, self.sizes.shape.width
        found = 0.0
        if setting.predictor:
            features = setting.pooled_features
            inputs = PREDICTOR_POOLS * (features + 1)
            nets = 2 * (inputs * PREDICTOR_WIDTH + PREDICTOR_WIDTH**2 + PREDICTOR_WIDTH * PREDICTOR_RANK)
            # The projection in fp32 and, for the kernel, in the dtype of the rows.
            found += width * features * (4 + self.e) + 4 * nets
        if setting.forward_ratio < 1:
            found += 2 * width * setting.bypass_rank * self.e
        return found * max(0, self.sizes.shape.layers - setting.dense_layers)

    def _loss(self) -> None:
        """From the last layer's stream to its gradient."""
        setting, ledger = self.setting, self.ledger
        with ledger.scope("loss") as work:
            if self.rows[-1].loss is not None:
                work.add(result=self._loss_rows_bytes(), kept=self._loss_rows_bytes() + setting.loss_rows * WIDE)
                self._segmented_loss(work)
                return
            numbers = setting.rows * self.sizes.shape.width
            wide = WIDE if self.sizes.wide_norm else 0
            work.add(norm=numbers * (2 * wide + self.e))
            work.drop("norm")
            work.add(kept=numbers * wide, result=numbers * self.e)
            if wide:
                # The wide copy stands for the stream, which nobody holds any more.
                ledger.drop(STREAM, self.stream_bytes)
            if setting.segmented:
                self._segmented_loss(work)
                work.add(spread=self.stream_bytes)
            else:
                self._plain_loss(work)
            work.touch(2 * numbers * wide)
            if wide:
                ledger.add(STREAM, self.stream_bytes)

    def _loss_rows_bytes(self) -> float:
        return self.setting.loss_rows * self.sizes.shape.width * self.e

    def _segmented_loss(self, work: Scope) -> None:
        """Gradients are made with the loss, a segment at a time; backward scales them."""
        setting, sizes = self.setting, self.sizes
        if self.rows[-1].loss is None:
            work.add(chosen=self._loss_rows_bytes())
        work.add(gradient=self._loss_rows_bytes())
        segment = min(setting.segment_rows, setting.loss_rows)
        work.touch(segment * sizes.shape.vocabulary * (self.e + (2 * WIDE if sizes.softcap else 0)))
        work.drop("chosen", "result")
        work.add(scaled=self._loss_rows_bytes())

    def _plain_loss(self, work: Scope) -> None:
        """Transformers' own: logits of all rows, an fp32 copy and log-softmax, and later gradients of both."""
        logits = self.setting.rows * self.sizes.shape.vocabulary
        work.add(logits=logits * self.e)
        work.touch(logits * 2 * WIDE)
        work.drop("result")
        work.touch(logits * LOGIT_BYTES)
        work.drop("logits")
        work.add(spread=self.stream_bytes)
