"""RunConfig: all that a run is told, as frozen dataclasses. Works without pydantic; the recipe reader validates it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

# What recipes mean that say neither: rows of a chunk that context rows attend within, and the share of local loss rows.
CONTEXT_WINDOW, ANSWER_CONTEXT_WINDOW, LOCAL_SHARE = 1024, 2048, 0.25
IN_RUNS = ("random", "spread")  # placements of loss rows that a span applies to


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how its context is extended.

    Attributes:
        path: folder of a Hugging Face model, a hub name, or `package:NAME` for the folder of an installed package.
        gguf_file: name of a GGUF file inside `path`, for weights in that format.
        dtype: parameters' dtype.
        load_in_4bit: keep the linear maps of the frozen base in 4 bits (QLoRA: NF4, scales quantised again), unpacked
            where they are used; needs bitsandbytes. The adapter has `dtype`.
        context_length: longest sequence in tokens that the tuned model is meant for; None keeps the model's own.
        rope_scaling: how RoPE reaches `context_length` when it exceeds the model's own.
        attention: Transformers attention implementation.
    """

    path: str = ""
    gguf_file: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    load_in_4bit: bool = False
    context_length: int | None = None
    rope_scaling: Literal["none", "linear", "yarn"] = "none"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"


@dataclass(frozen=True)
class DataConfig:
    """What is read and how it is cut.

    Attributes:
        train: files or folders (.txt, .jsonl, .jsonl.gz, .json, .parquet, .npz, datasets folders).
        validation: the same, for evaluation.
        held_out_share: without `validation`, this share of the training data is held out for it: documents evenly
            spread, or the end of each where there are too few for that. 0 holds out nothing.
        window_tokens: tokens of one training sample.
        long_rows: what happens to a sample of `qas` or messages that is longer than the window: refuse it, shorten it
            so that first questions and answers stay, or leave it out. Plain text is cut into windows instead.
        remainder: what happens to the end of a document that fills no window, and to documents shorter than one:
            `drop` counts its tokens as lost, `keep` makes it a short window. With `packing` nothing is lost.
        packing: put several short documents into one window (documents never see each other).
        text_field: JSON key of the text.
        messages_field: JSON key of a conversation, a list of messages with `role` and `content`, or with `from` and
            `value`; rows without it may have one in `conversations`.
        answer_only: supervise only the answers of `qas` rows, completions of prompts, outputs of instructions, and the
            assistant's words in conversations.
        max_windows: at most this many training windows, spread evenly over the data; None for all.
        validation_windows: at most this many validation windows, spread evenly over the data.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    held_out_share: float = 0.0
    window_tokens: int = 4096
    long_rows: Literal["error", "truncate", "drop"] = "error"
    remainder: Literal["drop", "keep"] = "drop"
    packing: bool = False
    text_field: str = "text"
    messages_field: str = "messages"
    answer_only: bool = False
    max_windows: int | None = None
    validation_windows: int = 8

    @property
    def validation_sources(self) -> tuple[str, ...]:
        """Files that validation reads: its own, or the training files when a share of them is held out."""
        return self.validation or (self.train if self.held_out_share > 0 else ())


@dataclass(frozen=True)
class LossRowsConfig:
    """Which rows carry loss: of plain text some, drawn anew in each epoch; of `data.answer_only` samples the answers.

    Attributes:
        share: share of blocks of plain text drawn as loss rows; 1.0 for all. `data.answer_only` samples are not
            drawn from: their answers always carry loss.
        local_share: share of blocks that carry loss besides, but attend and pass gradient only within
            `sparsity.context_window`, as rows without loss do; with placement `random` or `spread`. None for 0.25 where
            a recipe allows local loss rows, and 0 where it does not: see `RunConfig.local_share`.
        far: which of the drawn rows attend to all keys, where others are local: those that `repeats` call for, the
            runs with the most rows whose last tokens occurred before, but only beyond the local view; or `random` ones.
        placement: how blocks are drawn; `hardest` takes those of the highest loss under the base model.
        span: rows of a run of drawn blocks under placement `random` and `spread`; None draws single blocks, as `tail`
            and `hardest` always do.
        reweight: weigh drawn rows so that their loss estimates that of all; `hardest` then draws in proportion to loss.
        prompt_share: of `data.answer_only` samples, share of blocks, drawn among those without answers in runs of
            `span`, that carry loss beside the answers, so that reading prompts is learned, too; evaluation leaves them
            out. They are local loss rows where the run has a context window, under exact forward with gradient `keys`,
            and attend to all keys elsewhere: see `RunConfig.has_local_prompt_rows`.
        prompt_weight: of a sample's drawn rows of the prompt together in the loss, which is a weighted mean; its
            answers weigh 1 together, and no drawn row weighs more than an answer's.
    """

    share: float = 0.12
    local_share: float | None = None
    far: Literal["repeats", "random"] = "repeats"
    placement: Literal["random", "spread", "tail", "hardest"] = "random"
    span: int | None = 1024
    reweight: bool = False
    prompt_share: float = 0.0
    prompt_weight: float = 2.0


@dataclass(frozen=True)
class SparsityConfig:
    """How layers skip rows.

    Attributes:
        enabled: false trains densely.
        plan: folder of a calibrated plan; None calibrates first, or uses a uniform plan for exact forward.
        block_size: rows per block.
        forward_ratio: share of rows that run a layer.
        backward_ratio: share of rows that keep activations and pass gradient.
        ratio_of: shares are of `all` rows, guards and supervised ones included, or of `context`, rows without loss.
        gradient: gradient of exact forward: `rows` takes the keys of other rows as constants, `pairs` also their
            scores; `keys` passes gradient through the keys and values of all rows.
        kv: whether skipped rows still offer keys and values.
        mlp: whether the MLP has rows of its own.
        mlp_ratio: share of rows that run the MLP when it has rows of its own.
        policy: what turns scores into rows.
        scorer: what ranks blocks while training; `recent` prefers those that a block with loss follows closely, `words`
            those that share rare words with the question. None for `words` where answers alone are learned
            (`data.answer_only`) and every row runs forward, else for `recent`: see `RunConfig.scorer`.
        dense_layers: layers that never skip; negative numbers count from the end.
        context_window: rows that run forward but pass no gradient attend to their chunk of so many rows of the
            document, the chunk before and the document's first block; a multiple of block_size. 0 for all rows; None
            for 1,024 under exact forward with gradient `keys` (2,048 where answers alone are learned), else for all
            rows: see `RunConfig.context_window`.
        far_share: share of the far keys (two stripes of 1,024 rows back or more) that attention's backward reads,
            drawn anew in every step, weighed so that the gradient's expectation stays; for gradient rows and keys.
        local_forward: what local loss rows attend to in forward: the keys `near` them, or `all`, of which those that
            are not near pass no gradient. None for `near`; only where there are such rows.
    """

    enabled: bool = True
    plan: str | None = None
    block_size: int = 64
    forward_ratio: float = 1.0
    backward_ratio: float = 0.12
    ratio_of: Literal["all", "context"] = "all"
    gradient: Literal["rows", "pairs", "keys"] = "keys"
    kv: Literal["kept", "all"] = "all"
    mlp: Literal["shared", "own"] = "shared"
    mlp_ratio: float | None = None
    policy: Literal["topk", "threshold"] = "topk"
    scorer: Literal["predictor", "random", "recent", "words"] | None = None
    dense_layers: tuple[int, ...] = ()
    context_window: int | None = None
    far_share: float = 1.0
    local_forward: Literal["near", "all"] | None = None


@dataclass(frozen=True)
class CalibrationConfig:
    """How predictors, bypass and thresholds are fitted.

    Attributes:
        window_tokens: tokens of one calibration sample; None for the training window.
        windows: calibration samples.
        tune_windows: held-out samples for thresholds and the report.
        target: block score that predictors learn, see `core.target`; of `mass_loss_rows` they are told how far the next
            block with loss is. Where all rows carry loss that is `attention_mass`, and they learn this.
        query_stride: look at every n-th query row when attention mass is profiled; 1 for all.
        scorer: what ranks blocks in the calibrated plan, and while the stream for later layers is made; None for
            `predictor`. Others need no predictors, and none are fitted. A recipe names it in `sparsity.scorer`.
        compare_dense_fit: also fit on the dense stream, for the report; about half as much time again.
        pooled_features: most directions that rows are projected on before pooling; one per head if that is less.
        predictor_width: width of the nets' middle maps.
        predictor_rank: width of the nets' outputs.
        predictor_steps: optimiser steps per layer.
        prune_to: share of predictor neurons that elastic size transformation keeps; 1.0 prunes nothing.
        bypass_rank: R of the low-rank bypass; 0 for none.
        bypass_target: what the sequential fit teaches the bypass: the layer's own `update` of the row, or the way from
            the row to where the `dense_stream` is after the layer, which also undoes what earlier layers left out.
        bypass_ridge: ridge strength, relative to the mean diagonal of the input's second moments.
        tune_steps: steps of Algorithm 1 (threshold policy).
        allocate: `budget` chooses each layer's ratio, for the least held-out loss at the FLOPs of uniform ratios.
        memory_limit_gib: most host memory that collected statistics may take before they go to disk.
        seed: of everything drawn.
    """

    window_tokens: int | None = None
    windows: int = 16
    tune_windows: int = 4
    target: Literal[
        "attention_mass", "mass_loss_rows", "mass_detrended", "mass_times_value", "mass_peak", "interaction"
    ] = "mass_loss_rows"
    query_stride: int = 4
    scorer: Literal["predictor", "random", "recent", "words"] | None = None
    compare_dense_fit: bool = False
    pooled_features: int = 128
    predictor_width: int = 64
    predictor_rank: int = 32
    predictor_steps: int = 400
    prune_to: float = 1.0
    bypass_rank: int = 64
    bypass_target: Literal["update", "dense_stream"] = "dense_stream"
    bypass_ridge: float = 1e-3
    tune_steps: int = 0
    allocate: Literal["none", "budget"] = "none"
    memory_limit_gib: float = 4.0
    seed: int = 0


@dataclass(frozen=True)
class LoraConfig:
    """The adapter, with PEFT's names where PEFT has the key.

    Attributes:
        rank: rows of an adapter's first factor and columns of its second (PEFT's `r`).
        alpha: what an adapter adds is multiplied by alpha / rank (PEFT's `lora_alpha`).
        dropout: probability that an element of an adapter's input is dropped in training.
        targets: names of the maps with an adapter, or ends of them, or `all-linear` (PEFT's `target_modules`).
        modules_to_save: ends of names of modules that are trained whole and saved with the adapter.
        use_rslora: multiply by alpha / √rank instead, so that a larger rank does not make for smaller updates.
        use_dora: learn the length of each row of a map's weight beside its direction (DoRA). Such layers run in the
            generic engine, and a step takes more time and memory.
        init_lora_weights: how the first factor of a new adapter is drawn; the second is zero. `default` is PEFT's;
            `gaussian` is normal with standard deviation 1 / rank.
        adapter: folder of a saved LoRA adapter that training goes on from, with a new optimizer and schedule. Its
            rank, alpha, targets, modules_to_save, use_rslora and use_dora hold: a recipe leaves them out, or says the
            same. None begins a new adapter.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: Literal["default", "gaussian"] = "default"
    adapter: str | None = None


@dataclass(frozen=True)
class TrainingConfig:
    """Optimizer, schedule and loop, as users of Transformers' Trainer know them.

    Attributes:
        max_steps: optimizer steps; -1 for `epochs`.
        loss: `segmented` never forms the logits of the whole sequence; `model` is the model's own loss.
        segment_rows: rows of one loss segment.
        engine: `fused` runs each layer as one function that saves backward rows only and refuses layers that it cannot
            run; `generic` runs the model's own layers on rows; `auto` is fused on a GPU where it can be, and says why
            where it cannot.
        recompute: what the fused engine computes again in backward instead of saving it: `none`; `mlp`, the maps into
            the MLP; `lin`, all linear maps; `layer`, everything. None is `lin` under gradient checkpointing, else
            `none`.
        offload: what the fused engine saves for keys alone, the inputs of rows that offer keys but do not run or pass
            gradient, waits for backward in host memory. `keys`: keys and values wait there too, and levels `lin` and
            `layer` do not compute them again; `inputs` is the same as true.
        save_total_limit: checkpoints that are kept, the newest, and of `early_stopping_evals` the best one; older ones
            are deleted. None keeps all. With 1 there is none while the next is written.
        refit_steps: fit bypasses anew on the batch at hand every so many steps, as weights move; None for never.
        recall_steps: measure every so many steps how well predictors still find their blocks; None for never.
        early_stopping_evals: stop after this many evaluations without a lower validation loss, and keep the adapter of
            the lowest; None trains to the end and keeps the last.
    """

    learning_rate: float = 1e-4
    max_steps: int = -1
    epochs: float = 1.0
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    warmup_steps: int = 0
    lr_scheduler: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch"
    gradient_checkpointing: bool = True
    loss: Literal["segmented", "model"] = "segmented"
    segment_rows: int = 2048
    engine: Literal["auto", "fused", "generic"] = "auto"
    recompute: Literal["none", "mlp", "lin", "layer"] | None = None
    offload: bool | Literal["inputs", "keys"] = False
    logging_steps: int = 1
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int | None = 2
    refit_steps: int | None = None
    recall_steps: int | None = None
    early_stopping_evals: int | None = None
    seed: int = 0
    report_to: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunConfig:
    """One run. `output` is the folder that receives adapter, plan, metrics and the resolved recipe."""

    output: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss_rows: LossRowsConfig = field(default_factory=LossRowsConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @property
    def _gradient_through_all_keys(self) -> bool:
        """Whether rows run forward that pass no gradient but through their keys."""
        return self.sparsity.backward_ratio < self.sparsity.forward_ratio and self.sparsity.gradient == "keys"

    @property
    def context_window(self) -> int | None:
        """`sparsity.context_window` as it is in force; None for all rows."""
        sparsity = self.sparsity
        if sparsity.context_window is not None:
            return sparsity.context_window or None
        block = sparsity.block_size
        window = ANSWER_CONTEXT_WINDOW if self.data.answer_only else CONTEXT_WINDOW
        return window if self._gradient_through_all_keys and block > 0 and window % block == 0 else None

    @property
    def scorer(self) -> str:
        """`sparsity.scorer` as it is in force."""
        asks = self.data.answer_only and self.sparsity.forward_ratio == 1
        return self.sparsity.scorer or ("words" if asks else "recent")

    @property
    def local_share(self) -> float:
        """`loss_rows.local_share` as it is in force. A dense run draws such rows too, and tells them from no others."""
        rows = self.loss_rows
        if self.data.answer_only:
            return 0.0  # answers are far loss rows; rows of prompts have a share of their own
        if rows.local_share is not None:
            return rows.local_share
        drawn = rows.share < 1 and rows.placement in IN_RUNS and not rows.reweight
        known = self.sparsity.plan is None and self._gradient_through_all_keys and self.context_window is not None
        return min(LOCAL_SHARE, 1 - rows.share) if drawn and known else 0.0

    @property
    def has_local_prompt_rows(self) -> bool:
        """Whether rows that `loss_rows.prompt_share` draws attend and pass gradient only within the context window.

        A plan that `sparsity.plan` names says so by itself. A dense run draws such rows too, and tells them from no
        others.
        """
        drawn = self.data.answer_only and self.loss_rows.prompt_share > 0
        known = self.sparsity.plan is None and self._gradient_through_all_keys and self.context_window is not None
        return drawn and known

    @property
    def local_forward(self) -> str | None:
        """`sparsity.local_forward` as it is in force; None where no local loss rows are."""
        local = self.local_share or self.has_local_prompt_rows
        return (self.sparsity.local_forward or "near") if local else None


def resolved(run: RunConfig) -> dict[str, Any]:
    """The run as nested dictionaries of JSON types with every key that counts.

    A plan brings its own ratios and choices, so beside `sparsity.plan` the keys that it overrides are left out.
    """
    values = asdict(run)
    values["sparsity"]["context_window"] = run.context_window or 0
    values["sparsity"] |= {"local_forward": run.local_forward, "scorer": run.scorer}
    values["loss_rows"]["local_share"] = run.local_share
    if run.sparsity.plan:
        values["sparsity"] = {name: values["sparsity"][name] for name in ("enabled", "plan")}
    return json.loads(json.dumps(values))
