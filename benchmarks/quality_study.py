"""The protocol of the quality benchmark, and the state that its cells share: model, data, plans, scoring.

Fixed before any result. SmolLM2-135M, context extended from 8K to 16K by linear RoPE scaling. LoRA of rank 16 on all
linear maps, adapter in fp32 over a bf16 base, no autocast, no dropout. 200 steps of 2 x 16,384 tokens; the five domains
in equal numbers, in an order that depends on the seed only, so that methods are paired. AdamW without weight decay,
gradient norm clipped at 1; 5 % of the steps warm up, then a cosine to zero: it is the recipe's own schedule, and a rate
that ends at zero leaves less noise between runs than the gaps to be shown. The price is that a run cannot be read
half-way: comparisons at 50 and 100 steps are runs of their own. The learning rate comes from three runs of dense LoRA.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lemo
from benchmarks.quality_batches import Endless, far_copy, join
from benchmarks.quality_corpus import fingerprint
from benchmarks.quality_specs import Method, PlanSpec
from lemo.config import CalibrationConfig, DataConfig, LoraConfig, ModelConfig
from lemo.core.plan import Plan
from lemo.errors import DataError
from lemo.eval.perplexity import last_hidden, row_losses
from lemo.measure.flops import DecoderShape
from lemo.measure.record import config_hash
from lemo.runtime.attach import Handle
from lemo.runtime.batch import supervised_rows
from lemo.runtime.model import causal_model
from lemo.train.block_losses import BlockLosses
from lemo.train.costs import layer_cost
from lemo.train.data import LossRows, WindowCollator, WindowDataset, load_windows
from lemo.train.lora import add_adapter
from lemo.train.model import load_model
from lemo.train.prompt_rows import PromptRows

DOMAINS = ("books", "code", "math", "legal", "instruct")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
# The name that the first cells gave to a target; it is part of their hash.
MOST_KEPT = 0.99  # share of rows that a threshold may keep: below 1, or the layer would be dense
ORACLE_TARGETS = {"mass": "attention_mass"}
METRICS = ("dense", "last_quarter", "far_copy", "loss_rows", "sparse")


@dataclass(frozen=True)
class Protocol:
    """What every cell of a study shares. The defaults are the published protocol.

    Attributes:
        data: `text` for the five domains, `answers` for instruction samples with answers supervised.
        window: tokens of a sequence.
        batch: sequences of `window` tokens in a step.
        rank: of the adapter.
        validation_windows: per domain.
        calibration_windows: per domain, kept out of training.
        held_out_windows: for the report of a calibration, from the first domains, kept out of training.
        predictor_steps: of a calibration.
        dtype: of the base model; the adapter is fp32.
    """

    data: str = "text"
    domains: tuple[str, ...] = DOMAINS
    window: int = 16384
    batch: int = 2
    rank: int = 16
    validation_windows: int = 8
    calibration_windows: int = 2
    held_out_windows: int = 2
    predictor_steps: int = CalibrationConfig.predictor_steps
    dtype: str = "bfloat16"


@dataclass
class Score:
    """Losses of one model, by metric: one number per validation window, domain after domain."""

    windows: dict[str, list[float]]
    order: list[str]


class QualityStudy:
    """Model, data and plans of one command.

    Args:
        model: folder of the base model.
        data: folder of `<domain>-train.npz` and `<domain>-validation.npz`.
        plans: folder that keeps calibrated plans.
        protocol: what cells share.
        device: where everything runs.
    """

    def __init__(self, model: Path, data: Path, plans: Path, protocol: Protocol, device: str) -> None:
        """Loads nothing yet."""
        self.folder, self.data, self.plans, self.protocol = model, data, plans, protocol
        self.device = torch.device(device)
        self._model: Any = None
        self._originals: dict[str, Tensor] = {}
        self._windows: dict[tuple[str, str, int], WindowDataset] = {}
        self._fitted: dict[str, Plan] = {}
        self._block_losses: dict[int, BlockLosses] = {}
        self._validation: dict[tuple, list[tuple[str, dict[str, Tensor], Tensor]]] = {}

    @cached_property
    def corpus(self) -> str:
        """Fingerprint of the data."""
        return fingerprint(self.data, self.protocol.domains)

    @property
    def shape(self) -> DecoderShape:
        """Sizes of the model."""
        from transformers import AutoConfig

        return DecoderShape.from_config(AutoConfig.from_pretrained(self.folder))

    def model(self) -> Any:
        """The adapted model, loaded once. `fresh_adapter` makes it a new one."""
        if self._model is None:
            from transformers import AutoConfig

            window = self.protocol.window
            own = getattr(AutoConfig.from_pretrained(self.folder), "max_position_embeddings", None) or 0
            longer = {"context_length": window, "rope_scaling": "linear"} if own < window else {}
            config = ModelConfig(path=str(self.folder), dtype=self.protocol.dtype, **longer)
            base = load_model(config, window_tokens=window, device=self.device)
            rank = self.protocol.rank
            self._model = add_adapter(base, LoraConfig(rank=rank, alpha=2 * rank))
            for parameter in self._model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        return self._model

    def restore(self) -> Any:
        """The model with the base as it was loaded, frozen."""
        model = self.model()
        for name, parameter in model.named_parameters() if self._originals else ():
            if name in self._originals:
                parameter.requires_grad_(False).copy_(self._originals[name])
        return model

    def fresh_adapter(self, seed: int, trains: tuple[str, ...] = ()) -> Any:
        """The model with its adapter drawn anew, which depends on the seed only, and some modules trained whole."""
        from peft.tuners.lora import LoraLayer

        model = self.restore()
        for name, parameter in model.named_parameters() if trains else ():
            if "lora_" not in name and name.rpartition(".")[0].endswith(trains):
                self._originals.setdefault(name, parameter.detach().clone())
                parameter.requires_grad_(True)
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", True)
        return model

    def windows(self, domain: str, split: str, tokens: int, documents: bool = True) -> WindowDataset:
        """All windows of a domain."""
        name = domain if documents else f"{domain}-alone"
        key = (name, split, tokens)
        if key not in self._windows:
            if self.protocol.data == "answers":
                from benchmarks.quality_answers import read_answers

                self._windows[key] = read_answers(self.data / f"{name}-{split}.npz")
            else:
                files = DataConfig(**{split: (str(self.data / f"{name}-{split}.npz"),)}, window_tokens=tokens)
                self._windows[key], _ = load_windows(files, None, split, limit=1_000_000)
        return self._windows[key]

    def reserved(self, domain: str) -> list[int]:
        """Windows of a domain that calibration reads; training leaves them out."""
        protocol = self.protocol
        count = protocol.calibration_windows + protocol.held_out_windows
        drawn = torch.randperm(
            len(self.windows(domain, "train", protocol.window)), generator=torch.Generator().manual_seed(1234)
        )
        return drawn[:count].tolist()

    def training_batches(self, method: Method, seed: int, steps: int) -> Iterator[list[dict[str, Tensor]]]:
        """Batches of a run: domains in equal numbers, shuffled; a domain that is used up starts again, drawn anew.

        A batch is one forward, or one for each sample where lengths differ: padding would need (T, T) masks.
        """
        protocol, pieces = self.protocol, method.pieces
        tokens, count = protocol.window // pieces, (method.sequences or protocol.batch) * pieces
        generator = torch.Generator().manual_seed(seed)
        sources = [
            Endless(self._free(domain, tokens, method.documents), 1000 * seed + number)
            for number, domain in enumerate(protocol.domains)
        ]
        collator = self.collator(method, seed)
        turns: list[int] = []
        for step in range(steps):
            parts = []
            method.set_share(collator, step / max(1, steps - 1))
            for _ in range(count):
                turns = turns or torch.randperm(len(sources), generator=generator).tolist()
                sample, epoch = sources[turns.pop()].draw()
                if not isinstance(collator, WindowCollator):
                    collator.set_epoch(epoch)
                parts.append(collator([sample]))
            joined = join(parts, protocol.batch * pieces)
            yield [{k: v.to(self.device) for k, v in part.items()} for part in joined]

    def _free(self, domain: str, tokens: int, documents: bool) -> list[dict[str, Any]]:
        """Samples of a domain that calibration does not read; shorter windows of its windows neither."""
        dataset = self.windows(domain, "train", tokens, documents)
        taken = {
            self.windows(domain, "train", self.protocol.window).windows[i].sample_id for i in self.reserved(domain)
        }
        shares = self.protocol.window // tokens
        free = []
        for i, window in enumerate(dataset.windows):
            document, _, number = window.sample_id.rpartition("#")
            name = f"{document}#{int(number) // shares}" if self.protocol.data == "text" else window.sample_id
            if name not in taken:
                free.append(dataset[i])
        if free:
            return free
        raise DataError(f"{domain}: no window of {tokens} tokens is left beside those of calibration")

    def collator(self, method: Method, seed: int) -> Any:
        """Labels on the method's loss rows; answers keep the labels that they have."""
        plain = WindowCollator()
        if method.prompt_rows is not None:
            options = {"local": method.prompt_local, "weight_of": method.prompt_of}
            return PromptRows(plain, *method.prompt_rows, seed=seed, block_size=method.loss_block_size, **options)
        if self.protocol.data == "answers" or method.loss_share == 1:
            return plain
        size, losses = method.loss_block_size, None
        if method.placement == "hardest":
            losses = self._block_losses.setdefault(size, BlockLosses(self.model(), plain, size))
        further = {name: getattr(method, name) for name in ("span", "reweight", "local_share", "repeats_beyond")}
        drawn = LossRows(plain, method.loss_share, method.placement, seed, size, block_losses=losses, **further)
        drawn.marks_local = method.marks_local
        return drawn

    def plan(self, method: Method) -> Plan | None:
        """The plan that a method trains under: fitted where it must be, cached in the plans' folder."""
        spec = method.plan
        if spec is None:
            return None
        model = causal_model(self.model())
        names = ("forward_ratio", "backward_ratio", "dense_layers", "block_size", "kv", "gradient", "scorer")
        names += ("ratio_of", "context_window", "far_share", "local_forward")
        plan = Plan.uniform(model, **{n: getattr(spec, n) for n in names})
        if spec.needs_fit:
            fitted = self._fit(spec, method)
            for i, layer in enumerate(plan.layers):
                if not layer.is_dense:
                    bypass = None if spec.strip_bypass else fitted.layers[i].bypass
                    plan = plan.replace_layer(i, predictor=fitted.layers[i].predictor, bypass=bypass)
                    if spec.allocate:
                        names = ("forward_ratio", "backward_ratio")
                        plan = plan.replace_layer(i, **{n: getattr(fitted.layers[i], n) for n in names})
                    if spec.threshold is not None:
                        ratios = dict.fromkeys(("forward_ratio", "backward_ratio"), MOST_KEPT)
                        plan = plan.replace_layer(i, threshold=spec.threshold, **ratios)
            if spec.threshold is not None:
                plan = replace(plan, policy="threshold")
        if spec.oracle is None:
            return plan
        from benchmarks.rivals.oracle import with_oracle

        return with_oracle(plan, model, ORACLE_TARGETS.get(spec.oracle, spec.oracle))

    def plan_folder(self, spec: PlanSpec, method: Method) -> Path:
        """Where the fitted plan of a method lies."""
        return self.plans / f"plan-{config_hash(self._fit_setting(spec, method))}"

    def _fit_setting(self, spec: PlanSpec, method: Method) -> dict[str, Any]:
        protocol = {k: v for k, v in asdict(self.protocol).items() if k not in ("batch", "rank", "validation_windows")}
        # An exact forward skips nothing: its loss rows weigh nothing in the fit.
        loss = [method.loss_share, method.placement, method.span, *filter(None, [method.local_share])]
        return {**protocol, **spec.fit, "model": self.folder.name, "loss": loss}

    def _fit(self, spec: PlanSpec, method: Method) -> Plan:
        folder = self.plan_folder(spec, method)
        if folder.name not in self._fitted:
            if not (folder / "plan" / "plan.json").exists():
                start = time.perf_counter()
                self._calibrate(spec, method, folder)
                print(f"calibrated in {time.perf_counter() - start:.0f} s: {folder.name}", flush=True)
            self._fitted[folder.name] = Plan.load(folder / "plan")
        return self._fitted[folder.name]

    def _calibrate(self, spec: PlanSpec, method: Method, folder: Path) -> None:
        protocol = self.protocol
        backward = spec.forward_ratio if spec.forward_ratio < 1 else spec.backward_ratio if spec.allocate else 0.5
        skeleton = Plan.uniform(
            causal_model(self.model()),
            forward_ratio=spec.forward_ratio,
            backward_ratio=backward,
            dense_layers=spec.dense_layers,
            block_size=spec.block_size,
            kv=spec.kv,
            scorer="predictor",
            ratio_of=spec.ratio_of,
            context_window=spec.context_window,
        )
        config = CalibrationConfig(
            predictor_steps=protocol.predictor_steps,
            target=spec.target,  # type: ignore[arg-type]
            scorer=spec.fitted_scorer,  # type: ignore[arg-type]
            bypass_rank=spec.bypass_rank,
            bypass_target=spec.bypass_target,  # type: ignore[arg-type]
            allocate="budget" if spec.allocate else "none",
            memory_limit_gib=16.0,
        )
        cost = layer_cost(causal_model(self.model()), skeleton, protocol.window, protocol.rank)
        collator = self.collator(method, 0)
        fitted, held = [], []
        for number, domain in enumerate(protocol.domains):
            samples = [self.windows(domain, "train", protocol.window)[i] for i in self.reserved(domain)]
            found = [_calibration_batch(collator, s, domain) for s in samples]
            fitted += found[: protocol.calibration_windows]
            if number < protocol.held_out_windows:
                held += found[protocol.calibration_windows :][:1]
        with _without_adapter(self.restore()) as model:
            options = {"held_out": held, "output_dir": folder, "progress": False, "cost": cost}
            lemo.calibrate(model, fitted, config, plan=skeleton, **options)

    def validation(self, method: Method) -> list[tuple[str, dict[str, Tensor], Tensor]]:
        """(domain, batch with all labels, (1, T) rows that the method's draw supervises) of every validation window.

        Local rows are among these, but nothing says so: scored under the plan they attend to all keys.
        """
        rows = (method.loss_share, method.local_share, method.placement, method.span)
        key = (*rows, method.loss_block_size, method.documents)
        if key not in self._validation:
            everything, drawn = WindowCollator(), self.collator(replace(method, prompt_rows=None), 0)
            made = []
            for domain in self.protocol.domains:
                dataset = self.windows(domain, "validation", self.protocol.window, method.documents)
                count = min(self.protocol.validation_windows, len(dataset))
                for place in range(count):
                    sample = dataset[int((place + 0.5) * len(dataset) / count)]
                    made.append((domain, everything([sample]), supervised_rows(drawn([sample]))))
            self._validation[key] = made
        return self._validation[key]

    @torch.no_grad()
    def score(self, model: Any, method: Method, handle: Handle) -> Score:
        """Validation losses of a trained model, dense and, where the method skips, under its plan (look-ahead)."""
        found: dict[str, list[float]] = {name: [] for name in METRICS}
        order: list[str] = []
        model.eval()
        handle.sparse_evaluations = 0  # random draws are the same in every evaluation
        sparse = method.plan is not None and method.rival is None
        for domain, batch, drawn_1T in self.validation(method):
            inputs = {k: v.to(self.device) for k, v in batch.items()}
            labelled_1T, drawn_1T = supervised_rows(inputs), drawn_1T.to(self.device)
            labels_T = torch.cat([inputs["labels"][0, 1:], inputs["labels"][0, :1]])
            losses_T = _losses(model, inputs, labelled_1T, labels_T)
            found["dense"].append(float(losses_T[labelled_1T[0]].mean()))
            late_T = labelled_1T[0].clone()
            late_T[: 3 * len(late_T) // 4] = False
            found["last_quarter"].append(float(losses_T[late_T].mean()))
            found["loss_rows"].append(float(losses_T[drawn_1T[0]].mean()))
            if self.protocol.data == "text":
                copied_1T, rows_1T = far_copy(inputs["input_ids"])
                losses_T = _losses(model, inputs | {"input_ids": copied_1T}, rows_1T, copied_1T[0].roll(-1))
                found["far_copy"].append(float(losses_T[rows_1T[0]].mean()))
            if sparse:
                forced_1T = drawn_1T if method.forced else torch.zeros_like(drawn_1T)
                hidden_TM = last_hidden(model, inputs, forced_1T, handle=handle, sparse=True)[0]
                rows = row_losses(causal_model(model), hidden_TM[drawn_1T[0]], labels_T[drawn_1T[0]])
                found["sparse"].append(float(rows.double().mean()))
            order.append(domain)
        return Score({name: values for name, values in found.items() if values}, order)


def _losses(model: Any, inputs: Mapping[str, Tensor], mask_1T: Tensor, labels_T: Tensor) -> Tensor:
    """(T,) fp64 dense losses of the labelled rows, 0 elsewhere."""
    hidden_TM = last_hidden(model, inputs, mask_1T)[0]
    losses_T = torch.zeros(len(labels_T), dtype=torch.float64, device=labels_T.device)
    rows = mask_1T[0]
    losses_T[rows] = row_losses(causal_model(model), hidden_TM[rows], labels_T[rows]).double()
    return losses_T


def _calibration_batch(collator: Any, sample: dict[str, Any], domain: str) -> dict[str, Any]:
    batch = collator([sample])
    return {"input_ids": batch["input_ids"], "supervised": supervised_rows(batch), "domain": domain}


@contextmanager
def _without_adapter(model: Any) -> Iterator[Any]:
    """The model as it was before any adapter: calibration sees the base."""
    with model.disable_adapter():
        yield model
