"""The causal language model under lemo: every call of its forward passes here, with labels, before the layers run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lemo.families import head_transform
from lemo.ops import linear_ce, linear_ce_module
from lemo.runtime.batch import shifted_labels
from lemo.runtime.calls import check_not_replica
from lemo.runtime.fused.final import Deferred, final_rows
from lemo.runtime.fused.hooks import FORWARD, why_hooked
from lemo.runtime.model import in_force
from lemo.runtime.rows import without_class


class ForwardSlot:
    """`forward` of a model under lemo, as a data descriptor.

    Peers assign `model.forward = ...` on the instance (TRL and Liger their fused heads, accelerate its mixed
    precision), before or after lemo. A data descriptor sees the assignment, keeps it, and still gets every call.
    """

    def __init__(self, base: type) -> None:
        """Args: base: the model's own class."""
        self.base = base

    def __get__(self, model: Any, owner: type | None = None) -> Callable:
        """The forward that is in force now, bound at this moment, behind the handle."""
        if model is None:
            return self.base.forward
        replaced = model.__dict__.get("forward")
        inner = MethodType(self.base.forward, model) if replaced is None else replaced
        handle = model.__dict__.get("_lemo_handle")
        if handle is None or _is_around_own(replaced, model, handle):
            return inner

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            check_not_replica(model)
            return handle.run_model(inner, replaced is None, args, kwargs)

        forward.__dict__[_OWN] = handle if replaced is None else None
        return forward

    def __set__(self, model: Any, value: Callable) -> None:
        """A peer replaces the forward of this model."""
        model.__dict__["forward"] = value

    def __delete__(self, model: Any) -> None:
        """A peer takes its forward back."""
        try:
            del model.__dict__["forward"]
        except KeyError:
            raise AttributeError("forward") from None


_OWN = "_lemo_own"  # attribute of forwards of the model's own class behind a handle: that handle


def _is_around_own(replaced: Callable | None, model: Any, handle: Any) -> bool:
    """Whether a forward on the instance is accelerate's mixed precision around the model's own behind this handle.

    It changes nothing but autocast and the dtype of what comes back, and calls the handle by itself.
    """
    kept = model.__dict__.get("_original_forward")
    if replaced is None or getattr(kept, _OWN, None) is not handle or model.__dict__.get("_is_replica", False):
        return False
    by_accelerate = str(getattr(replaced, "__globals__", {}).get("__name__")).startswith("accelerate.")
    # functools.wraps copies attributes.
    return by_accelerate and getattr(getattr(replaced, "__wrapped__", None), _OWN, None) is handle


class LemoModel:
    """Mixed in before a causal language model's class; marks what `attach` made."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are the model without lemo: a handle belongs to one model."""
        return without_class(super().__reduce_ex__(protocol), LemoModel, ("_lemo_handle",))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generation, which runs densely."""
        handle = self.__dict__.get("_lemo_handle")
        if handle is not None:
            handle.check_generation()
        return super().generate(*args, **kwargs)  # type: ignore[misc]


@cache
def model_class(base: type) -> type:
    """The subclass of a causal language model's class whose calls a handle sees; same `__name__`, one per class."""
    body = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (LemoModel, base), body | {"forward": ForwardSlot(base)})


def own_parameters(model: Any) -> tuple[str, ...]:
    """`forward_parameters` of an attached model's class below what `attach` put on top."""
    mro = type(model).__mro__
    return forward_parameters(mro[mro.index(LemoModel) + 1])


@cache
def forward_parameters(base: type) -> tuple[str, ...]:
    """Names of the model's forward parameters after self, in order; `use_cache` too where it goes through keywords."""
    names = tuple(inspect.signature(base.forward).parameters)[1:]
    return (*names, "use_cache") if "kwargs" in names and "use_cache" not in names else names


def why_not_segmented(model: Any, arguments: Mapping[str, Any]) -> str | None:
    """Why the model's own loss must run in a call with these keywords; None when a segmented one can stand for it."""
    routers = arguments.get("output_router_logits")
    if routers if routers is not None else getattr(model.config.get_text_config(), "output_router_logits", False):
        return "output_router_logits adds a loss of the routers"
    reason = _why_other_loss(model)
    if reason is not None:
        return reason
    head = model.get_output_embeddings()
    if head is None:
        return "the model names no output embedding"
    if model.base_model is model:
        return "the model does not name its decoder"
    if hasattr(getattr(head, "weight", None), "full_tensor"):
        # Inside the root's forward its own weights are whole. Ranks have different numbers of segments, and each call
        # of the head would gather its weight.
        return "the LM head is sharded by itself; leave it to the root to have its loss in segments"
    return None


def _why_other_loss(model: Any) -> str | None:
    """Why the model's loss is not the plain one of next tokens, as far as its attributes tell."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    if getattr(model, "_loss_function", ForCausalLMLoss) is not ForCausalLMLoss:
        return "model.loss_function was set to another loss"
    kind = getattr(model, "loss_type", None)
    if LOSS_MAPPING.get(kind, ForCausalLMLoss) is not ForCausalLMLoss:
        return f"its loss_type is {kind!r}"
    return None


def segmented_forward(model: Any, arguments: dict[str, Any], segment_rows: int, final: Deferred | None = None) -> Any:
    """The model's forward with a loss whose logits exist for one segment of rows at a time.

    Args:
        model: a Transformers causal language model.
        arguments: keywords of its forward; `labels` or `shift_labels` among them, and `loss_weights` (B, T) where rows
            weigh differently.
        segment_rows: rows of a segment.
        final: the norm before the head and the rows that carry loss, where the decoder leaves that norm out.

    Returns:
        CausalLMOutputWithPast with `loss` (sum / num_items_in_batch, else the mean), `logits=None`, and whatever else
        the decoder was asked for; the tuple of it where `return_dict` is false.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    arguments = dict(arguments)
    shift_labels = shifted_labels(arguments)
    for name in ("labels", "shift_labels"):
        arguments.pop(name, None)
    num_items, weights = arguments.pop("num_items_in_batch", None), arguments.pop("loss_weights", None)
    arguments.pop("logits_to_keep", None)
    returns, asked = getattr(model.config, "return_dict", True), arguments.pop("return_dict", None)
    if not returns:
        arguments["return_dict"] = True
    decoded = model.base_model(**arguments)
    hidden_BTM = decoded.last_hidden_state
    shift_labels = shift_labels.to(hidden_BTM.device)
    if final is not None:
        hidden_BTM = final_rows(hidden_BTM, final.norm, final.rows_S)
        shift_labels = shift_labels.flatten()[final.rows_S]
        weights = None if weights is None else weights.flatten()[final.rows_S]
    labelled = final is not None and final.labelled
    loss = head_loss(model, hidden_BTM, shift_labels, num_items, segment_rows, weights, labelled)
    kept = {name: getattr(decoded, name, None) for name in ("past_key_values", "hidden_states", "attentions")}
    output = CausalLMOutputWithPast(loss=loss, logits=None, **kept)
    return output if (returns if asked is None else asked) else output.to_tuple()


def head_loss(
    model: Any,
    hidden_BTM: Tensor,
    shift_labels_BT: Tensor,
    num_items: int | Tensor | None,
    segment_rows: int = 2048,
    weights_BT: Tensor | None = None,
    labelled: bool = False,
) -> Tensor:
    """Cross-entropy of hidden states through the model's head, in segments: 0-d fp32.

    A plain linear head takes the op whose gradient is computed in the forward; any other head (an adapter on it, a
    sharded weight) is called as the module it is, under checkpointing per segment; so is any head whose rows weigh
    differently (`weights_BT`, fp32: factors of the rows' losses). Where the caller knows that every row is `labelled`,
    nobody waits for the device to count those that are.
    """
    head = in_force(model.get_output_embeddings())
    scale, softcap = head_transform(model.config)
    hidden_NM, labels_N = hidden_BTM.flatten(0, -2), shift_labels_BT.flatten()
    if isinstance(num_items, Tensor):
        num_items = num_items.to(hidden_NM.device)
    options = {"softcap": softcap, "logit_scale": scale, "num_items": num_items, "segment_rows": segment_rows}
    options["ignore_index"] = None if labelled else -100
    if weights_BT is not None:
        weights_N = weights_BT.flatten().to(hidden_NM.device)
        if not labelled:
            rows = (labels_N != -100).nonzero().squeeze(1)
            hidden_NM, labels_N, weights_N = hidden_NM[rows], labels_N[rows], weights_N[rows]
        return _weighted_loss(model, hidden_NM, labels_N.long(), weights_N, num_items, segment_rows)
    plain = type(head) is nn.Linear and not hasattr(head.weight, "full_tensor")
    if plain and why_hooked(head, kinds=FORWARD) is None:
        return linear_ce(hidden_NM, head.weight, labels_N, bias_V=head.bias, **options)
    return linear_ce_module(head, hidden_NM, labels_N, **options)


def _weighted_loss(
    model: Any,
    hidden_NM: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    num_items: int | Tensor | None,
    segment_rows: int,
) -> Tensor:
    """Sum of labelled rows' losses times their weights, over the number of items (of these rows when None)."""

    def loss_of(segment_NM: Tensor, segment_labels_N: Tensor, segment_weights_N: Tensor) -> Tensor:
        return (row_losses(model, segment_NM, segment_labels_N, segment_rows) * segment_weights_N).sum()

    pieces = zip(
        hidden_NM.split(segment_rows), labels_N.split(segment_rows), weights_N.split(segment_rows), strict=True
    )
    total = torch.stack([checkpoint(loss_of, *piece, use_reentrant=False) for piece in pieces]).sum()
    return total / (max(len(labels_N), 1) if num_items is None else num_items)


def row_losses(base: Any, hidden_NM: Tensor, labels_N: Tensor, segment_rows: int = 2048) -> Tensor:
    """Cross-entropy of each row, (N,) fp32, through the model's head with its scale and softcap."""
    head = base.get_output_embeddings()
    scale, softcap = head_transform(base.config)
    losses = []
    for segment_NM, segment_labels_N in zip(hidden_NM.split(segment_rows), labels_N.split(segment_rows), strict=True):
        logits_NV = head(segment_NM).float()
        if scale != 1.0:
            logits_NV = logits_NV * scale
        if softcap is not None:
            logits_NV = torch.tanh(logits_NV / softcap) * softcap
        losses.append(F.cross_entropy(logits_NV, segment_labels_N, reduction="none"))
    return torch.cat(losses) if losses else hidden_NM.new_zeros(0, dtype=torch.float32)
