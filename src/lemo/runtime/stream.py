"""Running a decoder layer by layer on one batch, outside autograd: what calibration and the self-test stand on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lemo.core.layout import Layout
from lemo.core.plan import Plan
from lemo.errors import UnsupportedModelError
from lemo.families import find_family
from lemo.runtime.attention import attention_module
from lemo.runtime.batch import BatchContext, document_keys, read_layout
from lemo.runtime.layer import LayerState, install, remove
from lemo.runtime.mlp import MlpTrace
from lemo.runtime.model import causal_model, decoder_layers, mlp_names
from lemo.runtime.rows import ACTIVE, CALL, LayerCall, Recorder, hidden_of


@dataclass
class LayerTrace:
    """What one dense run of one layer produced. Fields that were not recorded are None.

    Attributes:
        output_BTM: residual stream after the layer.
        query_HND: (H, B·T, D) queries after RoPE.
        key_GND: (G, B·T, D) keys after RoPE.
        scaling: factor of the scores.
        mlp_norm_N: (B·T,) norm of the MLP's intermediate activation.
        mlp_input_NM: (B·T, M) input of the MLP, normed.
        mlp_output_NM: (B·T, M) what the MLP returned.
        value_GND: (G, B·T, D) values.
    """

    output_BTM: Tensor
    query_HND: Tensor | None = None
    key_GND: Tensor | None = None
    scaling: float | None = None
    mlp_norm_N: Tensor | None = None
    mlp_input_NM: Tensor | None = None
    mlp_output_NM: Tensor | None = None
    value_GND: Tensor | None = None


@dataclass
class LayerStream:
    """One batch on its way through the layers, under whatever plan a call names; changes nothing in the model.

    Layers run in the generic executor, an adapter takes part. Put the model in eval mode first: dropout would be drawn
    otherwise.

    Attributes:
        model: the Transformers model inside.
        layout: documents, blocks and forced blocks of the batch.
        hidden_BTM: input of layer 0.
        keywords: keywords that the model passes to each layer.
    """

    model: Any
    layout: Layout
    hidden_BTM: Tensor
    keywords: list[dict[str, Any]] = field(repr=False)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.keywords)

    @classmethod
    @torch.no_grad()
    def open(
        cls,
        model: nn.Module,
        input_ids_BT: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        supervised_BT: Tensor | None = None,
        block_size: int = 64,
        attached: bool = False,
    ) -> LayerStream:
        """Embeds a batch and learns what each layer would be called with; no layer runs.

        Args:
            model: a Transformers causal language model, or a PEFT model around one.
            input_ids_BT: (B, T) int64, moved to the model's device.
            attention_mask: (B, T), zero for padding.
            position_ids: (B, T), restarting where packed documents start.
            supervised_BT: (B, T) bool rows that carry loss.
            block_size: C.
            attached: take a model that a plan is attached to, between its forwards. The attached plan stays out of it.

        Raises:
            UnsupportedModelError: a plan is attached to the model, and `attached` does not say so.
        """
        base = causal_model(model)
        if not attached and base.__dict__.get("_lemo_handle") is not None:
            raise UnsupportedModelError("a plan is attached to the model; detach it before calibrating")
        device = base.get_input_embeddings().weight.device
        inputs = {"input_ids": input_ids_BT, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs = {k: v.to(device) for k, v in inputs.items() if v is not None}
        layout = read_layout(inputs, supervised_BT, block_size)
        calls: dict[int, dict[str, Any]] = {}
        hidden: list[Tensor] = []

        def tap(index: int, x_BTM: Tensor, kwargs: dict[str, Any]) -> Tensor:
            calls[index] = kwargs
            hidden.append(x_BTM)
            return x_BTM

        with ExitStack() as stack:
            stack.enter_context(_installed(base, SimpleNamespace(context=None, tap=tap)))
            for index, layer in enumerate(decoder_layers(base)):
                if "_lemo_layer" not in layer.__dict__:
                    # A layer without softmax attention runs, to no effect: the next one's input is not looked at.
                    hook = _tapped(index, tap)
                    stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            base.base_model(**inputs, use_cache=False)
        keywords = [calls[i] for i in range(len(calls))]
        return cls(base, layout, hidden[0].detach().clone(), keywords)

    @torch.no_grad()
    def dense(self, layer: int, x_BTM: Tensor, record: tuple[str, ...] = ()) -> LayerTrace:
        """Runs all rows of a layer; `x_BTM` is not modified.

        Args:
            layer: number of the layer.
            x_BTM: its input.
            record: `attention` for queries, keys and values, `mlp` for what the MLP saw.
        """
        module = decoder_layers(self.model)[layer]
        trace, recorder = MlpTrace(), Recorder(want_query=True)
        extra = {CALL: LayerCall(record=recorder)} if "attention" in record else {}
        with _installed(self.model, SimpleNamespace(context=None, tap=None), only=layer):
            if "mlp" in record:
                with trace.watch(*self._mlp_modules(module)):
                    output = module(x_BTM, **self.keywords[layer], **extra)
            else:
                output = module(x_BTM, **self.keywords[layer], **extra)
        return LayerTrace(
            hidden_of(output),
            recorder.query_HND,
            recorder.key_GND,
            recorder.scaling,
            trace.norm_N,
            trace.input_NM,
            trace.output_NM,
            recorder.value_GND,
        )

    @torch.no_grad()
    def sparse(self, layer: int, x_BTM: Tensor, plan: Plan) -> Tensor:
        """Runs a layer as a training forward under `plan` would; returns a new tensor."""
        keys = document_keys(self.layout) if plan.scorer == "random" else None
        return self.under(BatchContext(plan, self.layout, in_place=False, document_keys_D=keys), layer, x_BTM)

    @torch.no_grad()
    def under(self, context: BatchContext, layer: int, x_BTM: Tensor) -> Tensor:
        """Runs a layer while `context` is the running batch."""
        with _installed(self.model, SimpleNamespace(context=context, tap=None), only=layer):
            return hidden_of(decoder_layers(self.model)[layer](x_BTM, **self.keywords[layer]))

    @torch.no_grad()
    def masked(self, layer: int, x_BTM: Tensor, seen_TT: Tensor) -> Tensor:
        """Reference: all rows run the layer, by eager attention under an explicit (T, T) mask of the kept keys.

        Args:
            layer: number of the layer.
            x_BTM: its input.
            seen_TT: (T, T) bool, which keys (columns) each row may see, causality included.
        """
        mask = torch.zeros(seen_TT.shape, dtype=x_BTM.dtype, device=x_BTM.device)
        mask = mask.masked_fill(~seen_TT, torch.finfo(x_BTM.dtype).min)[None, None]
        keywords = self.keywords[layer] | {"attention_mask": mask}
        with _installed(self.model, SimpleNamespace(context=None, tap=None), only=layer):
            ACTIVE.base_implementation = "eager"
            try:
                output = decoder_layers(self.model)[layer](x_BTM, **keywords)
            finally:
                ACTIVE.base_implementation = None
        return hidden_of(output)

    def _mlp_modules(self, layer: nn.Module) -> tuple[tuple[nn.Module, nn.Module], nn.Module]:
        family = find_family(self.model.config)
        if family is None or not family.mlp or family.mlp_down is None:
            raise UnsupportedModelError(
                f"no family file names the MLP of {self.model.config.get_text_config().model_type!r}"
            )
        first, last = getattr(layer, family.mlp[0]), getattr(layer, family.mlp[-1])
        return (first, last), layer.get_submodule(family.mlp_down)


def _tapped(index: int, tap: Callable[[int, Tensor, dict[str, Any]], Tensor]) -> Callable[..., None]:
    """A forward pre-hook that shows a layer's call to `tap`."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = inspect.signature(layer.forward).parameters
        given = dict(zip(names, args, strict=False)) | kwargs
        tap(index, given.pop(next(iter(names))), given)

    return hook


@contextmanager
def _installed(model: Any, handle: Any, only: int | None = None) -> Iterator[None]:
    """Inside, layers (or one of them) answer to `handle`; those without softmax attention run as they are."""
    names, layers = mlp_names(model), decoder_layers(model)
    chosen = [(i, x) for i, x in enumerate(layers) if only in (None, i)]
    done: list[tuple[nn.Module, Any]] = []
    try:
        for index, layer in chosen:
            if "_lemo_layer" in layer.__dict__:
                layer.__dict__["_lemo_layer"].handle, before = handle, layer.__dict__["_lemo_layer"].handle
                done.append((layer, before))
            elif attention_module(layer) is not None:
                install(layer, LayerState(index, handle, names))
                done.append((layer, None))
        yield
    finally:
        for layer, before in done:
            if before is None:
                remove(layer)
            else:
                layer.__dict__["_lemo_layer"].handle = before
