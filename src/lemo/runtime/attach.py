"""attach: makes a model skip rows in training, and gives back the handle that says what it did and undoes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lemo.core.plan import Plan
from lemo.core.selection import Selection
from lemo.errors import ConfigError, UnsupportedModelError
from lemo.runtime.attention import NAME, register_mask
from lemo.runtime.batch import LOCAL_ROWS, BatchContext, RunDense, document_keys, read_layout
from lemo.runtime.calls import (
    FOREIGN_FORWARD,
    Turn,
    check_capturing,
    check_supervised,
    drop_hidden_labels,
    drop_unasked_cache,
    is_labelled,
    may_go_maskless,
    said_of_dense,
)
from lemo.runtime.context import check_local_rows
from lemo.runtime.draws import Draws
from lemo.runtime.fused.attachment import Engine, FusedEngine
from lemo.runtime.fused.call import Recompute
from lemo.runtime.fused.offload import Offload
from lemo.runtime.head import LemoModel, model_class, own_parameters, segmented_forward, why_not_segmented
from lemo.runtime.layer import LayerState, install, removable, remove
from lemo.runtime.model import (
    causal_model,
    check_adapters,
    check_no_noise,
    check_not_wrapped,
    check_plan,
    decoder_layers,
    mlp_names,
    reads_positions,
    why_dense,
)
from lemo.runtime.observed import Insides, held_layers, said_of_hooks

_LOG = logging.getLogger("lemo")
MASK_LIMIT_TOKENS = 8192  # longest sequence for which the model may still build a (T, T) mask of its own


class Handle:
    """An attached plan. A context manager: leaving it detaches.

    Attributes:
        plan: the plan in force.
        selections: per layer, the Selection of the last sparse forward.
        sparse_batches: training forwards that ran under selection.
        sparse_evaluations: evaluation forwards that did.
        dense_batches: training forwards that had to run, or gained nothing by not running, densely.
        notes: what lemo did that the user did not ask for, each said once.
        in_place: write rows into the residual stream itself; false copies it once a layer, with equal results.
    """

    def __init__(self, model: nn.Module, plan: Plan, options: dict[str, Any]) -> None:
        """Use `attach`."""
        self.model, self.plan = causal_model(model), plan
        self.selections: dict[int, Selection] = {}
        self.sparse_batches = self.dense_batches = self.sparse_evaluations = 0
        self.notes: list[str] = []
        self.context: BatchContext | None = None
        self.tap: Callable | None = None
        self.in_place = not getattr(self.model.config.get_text_config(), "hidden_size_per_layer_input", 0)
        self._options = options
        self._supervised: Tensor | None = None
        self._loss_only = False
        self._real_rows = 0
        self._attached, self._turn, self._draws, self._insides = False, Turn(), Draws(), Insides()
        self._fused = FusedEngine(self, options["engine"], options["recompute"], options["offload"])

    def __enter__(self) -> Handle:
        """The handle itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Detaches."""
        self.detach()

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the model is a plain model: the handle stays with the original."""
        return None

    def note(self, text: str) -> None:
        """Says something once, in the log and in `notes`."""
        if text not in self.notes:
            self.notes.append(text)
            _LOG.warning(text)

    @contextmanager
    def supervised(self, mask_BT: Tensor) -> Iterator[None]:
        """States which rows carry loss, for training forwards without labels (label smoothing, custom losses).

        Rows that carry loss by labels that a call has nevertheless are kept too.

        Args:
            mask_BT: (B, T) bool; row t is supervised when what it predicts, token t+1, counts in the loss.
        """
        before, self._supervised = self._supervised, mask_BT.bool()
        try:
            yield
        finally:
            self._supervised = before

    @contextmanager
    def loss_only(self) -> Iterator[None]:
        """Inside, evaluation forwards with labels compute the loss in segments and return `logits=None`."""
        before, self._loss_only = self._loss_only, True
        try:
            yield
        finally:
            self._loss_only = before

    @contextmanager
    def sparse_evaluation(self, on: bool = True) -> Iterator[None]:
        """Inside, evaluation forwards select rows as training does (`on`), or run dense."""
        before, self._options["sparse_eval"] = self._options["sparse_eval"], on
        try:
            yield
        finally:
            self._options["sparse_eval"] = before

    def fused_layers(self) -> frozenset[int]:
        """Layers that the fused engine would run in a training forward now; the others run in the generic executor.

        Raises:
            UnsupportedModelError: `engine="fused"` was asked for and a layer cannot.
        """
        return self._fused.layers()

    def ratios(self) -> dict[int, tuple[float, float]]:
        """Share of real rows per layer in the last sparse forward: {layer: (forward, backward)}; 0 without any.

        Under the `threshold` policy this asks the device for the counts.
        """
        found = {}
        for index, selection in self.selections.items():
            sets = (selection.forward, selection.backward)
            counts = [self._real_rows if s is None else int(s.count) for s in sets]
            found[index] = (counts[0] / max(self._real_rows, 1), counts[1] / max(self._real_rows, 1))
        return found

    def detach(self) -> None:
        """Gives the model and its layers their classes back, bit for bit as they were. Does nothing the second time.

        Raises:
            UnsupportedModelError: another library subclassed the model or a layer after `attach` (FSDP2 does); nothing
                is changed then.
        """
        if not self._attached:
            return
        layers = [x for x in decoder_layers(self.model) if "_lemo_layer" in x.__dict__]
        changed = [type(x).__name__ for x in layers if not removable(x)]
        if type(self.model).__mro__[1] is not LemoModel:
            changed.append(type(self.model).__name__)
        if changed:
            raise UnsupportedModelError(
                f"cannot detach: {changed[0]} was subclassed after attach (FSDP2's fully_shard does that)"
            )
        for layer in layers:
            remove(layer)
        self._fused.remove()
        del self.model.__dict__["_lemo_handle"]
        self.model.__class__ = type(self.model).__mro__[2]
        self._attached = False

    def check_generation(self) -> None:
        """Raises UnsupportedModelError when evaluation forwards select rows: generation must not look ahead."""
        if self._options["sparse_eval"]:
            raise UnsupportedModelError(
                "generation under selection is refused: selection looks at later tokens. Leave sparse_eval off"
            )

    def run_model(self, inner: Callable, own: bool, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of the model's forward: opens the batch for the layers, then runs `inner` or the segmented loss.

        Args:
            inner: the forward in force.
            own: whether it is the model's own, not one that a peer put in its place.
            args: positional arguments.
            kwargs: keywords.
        """
        # A peer may have kept the forward that it found while lemo was attached, and call it inside its own or later.
        if self._turn.is_own or not self._attached:
            return inner(*args, **kwargs)
        arguments = dict(zip(own_parameters(self.model), args, strict=False)) | kwargs
        training = self.model.training and torch.is_grad_enabled()
        with self._turn.taken(training or self._options["sparse_eval"]):
            return self._run_model(inner, own, training, arguments)

    def _run_model(self, inner: Callable, own: bool, training: bool, arguments: dict[str, Any]) -> Any:
        labelled = is_labelled(arguments)
        local_BT = arguments.pop(LOCAL_ROWS, None)
        context = self._open(arguments, training, torch.compiler.is_compiling(), local_BT)
        if self.model.training or labelled or context is not None:
            drop_unasked_cache(arguments, own_parameters(self.model))
        segmented = labelled and self._segmented(training, own, arguments)
        if arguments.get("loss_weights") is not None and not segmented:
            raise ConfigError("loss_weights need the segmented loss, which does not run here; see the handle's notes")
        with self._running(context):
            if segmented:
                final = self._fused.defer(context, labelled=self._supervised is None)
                output = segmented_forward(self.model, arguments, self._options["segment_rows"], final)
            else:
                output = inner(**arguments)
        if context is not None:
            self._close(context)
            if context.trains:
                self._draws.keep(arguments, context.step, output)
        return output

    def _segmented(self, training: bool, own: bool, arguments: dict[str, Any]) -> bool:
        wanted = self._options["loss"] == "segmented" and not self._options["logits"]
        if not wanted or not (training or self._loss_only):
            return False
        if not own:
            self.note(FOREIGN_FORWARD)
            return False
        reason = why_not_segmented(self.model, arguments)
        if reason is not None:
            self.note(f"the model's own loss runs instead of the segmented one: {reason}")
        return reason is None

    @torch.compiler.disable  # host arithmetic on sizes that follow from the data
    def _open(
        self, arguments: dict[str, Any], training: bool, compiling: bool, local_BT: Tensor | None = None
    ) -> BatchContext | None:
        """The batch for the layers, or None when this forward runs densely."""
        sparse_eval = self._options["sparse_eval"] and not training
        self._draws.announce(arguments, self.model.training and not training)
        if local_BT is not None and (training or sparse_eval):
            check_local_rows(self.plan)
        dense = all(x.is_dense for x in self.plan.layers) and self._options["engine"] != "fused"
        if not (training or sparse_eval) or dense:
            for text in said_of_dense(self.model, self.plan, is_labelled(arguments)):
                self.note(text)
            return None
        if training:
            check_not_wrapped(decoder_layers(self.model))
        try:
            check_capturing(self.model.config, arguments, self.check_generation if sparse_eval else None)
            check_adapters(self.model)
            if training:
                check_supervised(arguments, self._supervised)
            fused = self.fused_layers()
            if training and any(x.is_exact for x in self.plan.layers):
                check_no_noise(self.model, fused)
            # What else the host can do comes before: this waits for the device.
            sees = reads_positions(self.model)
            layout = read_layout(arguments, self._supervised, self.plan.block_size, local_BT, sees)
        except RunDense as reason:
            self.dense_batches += training
            self.note(f"a batch ran densely: {reason}")
            return None
        if compiling:
            self.note(
                "torch.compile of the whole model leaves its layers uncompiled where rows are selected; compile the "
                "layers one by one instead (layer.compile())"
            )
        layers = decoder_layers(self.model)
        for text in (*drop_hidden_labels(arguments, layout), *said_of_hooks(layers, fused)):
            self.note(text)
        inside = () if len(fused) == len(layers) else self._insides.observed(layers)
        draws, step, repeats = self.plan.scorer == "random" or self.plan.far_share < 1, self.sparse_evaluations, False
        if training:
            matters = draws or self.plan.mlp == "own"
            step, repeats = self._draws.number(arguments, self.sparse_batches, matters)
        return BatchContext(
            self.plan,
            layout,
            step=step,
            trains=training,
            repeats=repeats,
            in_place=self.in_place,
            held=held_layers(self.model, layers, arguments, inside),
            maskless=layout.tokens > MASK_LIMIT_TOKENS and may_go_maskless(self.model, layout),
            document_keys_D=document_keys(layout) if draws else None,
            fused=fused,
            recompute=self._fused.recompute(),
            offload=self._fused.offload(),
            adapters=self._fused.factors(fused),
        )

    @contextmanager
    def _running(self, context: BatchContext | None) -> Iterator[None]:
        config = self.model.config.get_text_config()
        implementation = config._attn_implementation
        maskless = context is not None and context.maskless
        self.context = context
        try:
            if maskless:
                register_mask()
                config._attn_implementation_internal = NAME
            yield
        finally:
            self.context = None
            if maskless:
                config._attn_implementation_internal = implementation

    def _close(self, context: BatchContext) -> None:
        self.selections, self._real_rows = context.selections, context.layout.real_rows
        if context.repeats:
            return
        if all(x.is_dense for x in self.plan.layers):
            self.dense_batches += 1
        elif all(s.is_dense for s in context.selections.values()):
            self.dense_batches += 1
            self.note("a batch had nothing to skip (short, or mostly supervised) and ran densely")
        elif context.trains:
            self.sparse_batches += 1
        else:
            self.sparse_evaluations += 1


def attach(
    model: nn.Module,
    plan: Plan,
    *,
    loss: str = "segmented",
    logits: bool = False,
    sparse_eval: bool = False,
    unsafe_no_bypass: bool = False,
    self_test: bool = True,
    segment_rows: int = 2048,
    engine: Engine = "auto",
    recompute: Recompute | None = None,
    offload: Offload = False,
) -> Handle:
    """Makes a model's decoder layers skip rows as `plan` says, in training forwards.

    Works before or after `get_peft_model`, under HF Trainer, TRL and Accelerate; changes nothing outside this model.

    Args:
        model: a Transformers causal language model, or a PEFT model around one.
        plan: what every layer does.
        loss: `segmented` computes the loss of training forwards without ever forming all logits, and returns
            `logits=None`; `model` keeps the model's own loss and logits.
        logits: keep logits although the loss is `segmented` (the same as `loss="model"`).
        sparse_eval: evaluation forwards select rows too (look-ahead: their loss is not that of a causal model).
        unsafe_no_bypass: accept a plan whose skipped rows have no bypass. It ruins models.
        self_test: compare one layer of each kind with masked references before anything is trained.
        segment_rows: rows of a loss segment.
        engine: `fused` runs every layer as one function that saves backward rows only, and refuses layers that it
            cannot run; `generic` runs Transformers' own layers on rows; `auto` takes the fused engine layer by layer
            where it can, on a GPU, and says why where it cannot.
        recompute: what the fused engine computes again in backward: `none`; `mlp`, the maps into the MLP; `lin`, all
            linear maps; `layer`, everything. None is `lin` under gradient checkpointing, else `none`.
        offload: what the fused engine saves for keys alone, the inputs of rows that offer keys but do not run or pass
            gradient, waits for backward in host memory. Costs no time where layers take longer than the copies.
            `keys`: keys and values wait there too, and levels `lin` and `layer` do not compute them again; `inputs` is
            the same as true.

    Returns:
        The handle; `with attach(...) as handle:` detaches at the end.

    Raises:
        PlanError: no plan, one for another model, or one that skips rows without bypass.
        UnsupportedModelError: a layer that cannot skip rows; the message says which and why.
        ConfigError: an unknown `loss`, `engine`, `recompute` or `offload`, or `offload` with the generic engine.
    """
    if loss not in ("segmented", "model"):
        raise ConfigError(f"loss must be 'segmented' or 'model', got {loss!r}")
    options = {"loss": loss, "logits": logits, "sparse_eval": sparse_eval, "segment_rows": segment_rows}
    options |= {"engine": engine, "recompute": recompute, "offload": offload}
    handle = Handle(model, plan, options)
    layers = decoder_layers(model)
    check_not_wrapped(layers)
    check_plan(handle.model, plan, layers, unsafe_no_bypass)
    if loss == "segmented" and "forward" in handle.model.__dict__:
        handle.note(FOREIGN_FORWARD)
    handle.model.__dict__["_lemo_handle"] = handle
    handle.model.__class__ = model_class(type(handle.model))
    handle._attached = True
    try:
        # Beside layers that skip, dense ones take part too, so that none needs a (T, T) mask on long packed batches.
        sparse = not all(x.is_dense for x in plan.layers)
        text = handle.model.config.get_text_config()
        for index, layer in enumerate(layers if sparse or engine == "fused" else ()):
            if not plan.layers[index].is_dense or why_dense(layer, index, text) is None:
                install(layer, LayerState(index, handle, mlp_names(model), handle._fused.names, text))
        handle._fused.install()
        if self_test:
            from lemo.runtime.selftest import check_layers

            check_layers(handle)
    except BaseException:
        handle.detach()
        raise
    return handle
