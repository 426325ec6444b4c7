"""Around one call of an attached model: whose turn it is, what it may ask for, what to tell who calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lemo.core.layout import Layout
from lemo.core.plan import Plan
from lemo.errors import LabelsError, UnsupportedModelError
from lemo.ops.backend import send
from lemo.runtime.batch import RunDense
from lemo.runtime.model import decoder_layers

_IGNORED = -100
FOREIGN_FORWARD = "the model's forward was replaced by another library; its own loss stays in force"


class Turn:
    """One forward at a time where one has a batch: a handle holds what that one tells its layers.

    Forwards that run densely without one share.
    """

    def __init__(self) -> None:
        """Nobody's turn."""
        self._alone: dict[int, bool] = {}
        self._lock = threading.Lock()

    @property
    def is_own(self) -> bool:
        """Whether a forward of this thread is running."""
        return _this_thread() in self._alone

    @contextmanager
    def taken(self, alone: bool) -> Iterator[None]:
        """Inside, a forward of this thread runs.

        Args:
            alone: it is a training forward, or one under selection.

        Raises:
            UnsupportedModelError: another thread's is running, and one of the two is `alone`.
        """
        self._begin(alone)
        try:
            yield
        finally:
            self._end()

    @torch.compiler.disable
    def _begin(self, alone: bool) -> None:
        with self._lock:
            if self._alone and (alone or any(self._alone.values())):
                raise UnsupportedModelError(
                    "a forward began while another thread runs one of the same model; an attached plan serves one "
                    "training forward at a time and no other beside it, so give every thread a model of its own, or "
                    "put a lock around the calls"
                )
            self._alone[threading.get_ident()] = alone

    @torch.compiler.disable
    def _end(self) -> None:
        with self._lock:
            self._alone.pop(threading.get_ident(), None)


@torch.compiler.disable  # frames that are compiled and frames that are not must get the same answer
def _this_thread() -> int:
    return threading.get_ident()


def check_not_replica(model: nn.Module) -> None:
    """Raises UnsupportedModelError for the copies that nn.DataParallel makes: all of them have one handle."""
    if model.__dict__.get("_is_replica", False):
        raise UnsupportedModelError(
            "nn.DataParallel runs copies of the model that share one plan; start one process per GPU with torchrun"
        )


def check_capturing(config: Any, arguments: Mapping[str, Any], check_generation: Callable[[], None] | None) -> None:
    """Raises RunDense when the caller asks for what every row of every layer gives, or generates.

    Args:
        config: the model's configuration.
        arguments: keywords of the call.
        check_generation: called before where the call uses a cache; None for nothing.
    """
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if arguments.get(name) or (arguments.get(name) is None and getattr(config, name, False)):
            raise RunDense(f"{name} asks for every row of every layer")
    if arguments.get("use_cache") or arguments.get("past_key_values") is not None:
        if check_generation is not None:
            check_generation()
        raise RunDense("the call uses a key/value cache")


def is_labelled(arguments: Mapping[str, Any]) -> bool:
    """Whether a call brings labels."""
    return arguments.get("labels") is not None or arguments.get("shift_labels") is not None


def drop_unasked_cache(arguments: dict[str, Any], names: Sequence[str]) -> None:
    """Switches the cache off that Transformers makes unless told otherwise: with one, it does not part documents.

    Args:
        arguments: keywords of the call.
        names: of the parameters that the forward takes.
    """
    asked = arguments.get("use_cache") is not None or arguments.get("past_key_values") is not None
    if not asked and "use_cache" in names:
        arguments["use_cache"] = False


def check_supervised(arguments: Mapping[str, Any], supervised_BT: Tensor | None) -> None:
    """Raises LabelsError when nothing says which rows of a training forward carry loss."""
    if not is_labelled(arguments) and supervised_BT is None:
        raise LabelsError(
            "a training forward reached the model without labels, so lemo cannot tell which rows carry loss "
            "and must not be skipped; pass labels, or run it inside `with handle.supervised(mask):`"
        )


def drop_hidden_labels(arguments: dict[str, Any], layout: Layout) -> tuple[str, ...]:
    """Takes labels of rows that the attention mask hides out of a call, and out of its number of items.

    What such a row computes depends on the attention kernel, and lemo never runs it. The number of items of a step
    with several micro-batches still counts what the others drop.

    Returns:
        What to tell the user; nothing when there is no such label.
    """
    rows_S = layout.hidden_row_S
    if rows_S is None or not is_labelled(arguments):
        return ()
    shifted = arguments.get("shift_labels") is not None
    for name, offset in (("shift_labels", 0), ("labels", 1)):
        if arguments.get(name) is not None and shifted == (name == "shift_labels"):
            flat_N = arguments[name].flatten()
            dropped_N = flat_N.index_fill(0, send(rows_S + offset, flat_N.device), _IGNORED)
            arguments[name] = dropped_N.view(arguments[name].shape)
    items = arguments.get("num_items_in_batch")
    if items is not None:
        kept = items - len(rows_S)
        arguments["num_items_in_batch"] = kept.clamp_min(1) if isinstance(kept, Tensor) else max(kept, 1)
    return (
        "labels that rows hidden by the attention mask would predict (the first token after left padding, labels on "
        "padding) are left out of the loss and of its number of items; set them to -100",
    )


def may_go_maskless(model: Any, layout: Layout) -> bool:
    """Whether the model would build a (T, T) mask of its own, and every layer can run by rows instead."""
    implementation = model.config.get_text_config()._attn_implementation
    builds = implementation == "eager" or (implementation == "sdpa" and not layout.is_plain)
    return builds and all("_lemo_layer" in x.__dict__ for x in decoder_layers(model))


def said_of_dense(model: nn.Module, plan: Plan, labelled: bool) -> Iterator[str]:
    """What to tell who calls the model so that it runs densely, though the plan skips something."""
    gradients = torch.is_grad_enabled()
    skips = any(x.forward_ratio < 1 for x in plan.layers) or plan.context_window is not None
    if model.training and not gradients and skips:
        yield (
            "a forward without gradients ran densely, while training forwards skip rows or keys; where a loss "
            "compares the two, as DPO does with its reference, use a plan with forward_ratio 1 and without "
            "context_window"
        )
    if not model.training and gradients and labelled and not all(x.is_dense for x in plan.layers):
        yield (
            "a forward with labels and gradients ran densely because the model is in eval mode; call model.train() to "
            "train, or evaluate under torch.no_grad()"
        )
