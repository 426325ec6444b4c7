"""Around one call of an attached model: whose turn it is, which draw it makes, who else holds its tensors."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lemo.core.layout import Layout
from lemo.core.plan import Plan
from lemo.errors import LabelsError, UnsupportedModelError
from lemo.ops.backend import send
from lemo.runtime.batch import RunDense
from lemo.runtime.fused.hooks import FORWARD, why_hooked
from lemo.runtime.model import in_force

_IGNORED = -100
# Libraries whose hooks hand tensors on and keep none.
_PASSING_ON = ("torch.distributed.", "transformers.", "accelerate.", "deepspeed.")


class Turn:
    """One forward at a time: a handle holds what the running one tells its layers."""

    def __init__(self) -> None:
        """Nobody's turn."""
        self._thread: dict[str, int] = {}

    @property
    def is_own(self) -> bool:
        """Whether a forward of this thread is running."""
        return self._thread.get("running") == _this_thread()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, a forward of this thread runs.

        Raises:
            UnsupportedModelError: another thread's is running.
        """
        if self._thread.setdefault("running", _this_thread()) != _this_thread():
            raise UnsupportedModelError(
                "a forward began while another thread runs one of the same model; an attached plan serves one at a "
                "time, so give every thread a model of its own, or put a lock around the calls"
            )
        try:
            yield
        finally:
            self._thread.clear()


@torch.compiler.disable  # frames that are compiled and frames that are not must get the same answer
def _this_thread() -> int:
    return threading.get_ident()


def check_not_replica(model: nn.Module) -> None:
    """Raises UnsupportedModelError for the copies that nn.DataParallel makes: all of them have one handle."""
    if model.__dict__.get("_is_replica", False):
        raise UnsupportedModelError(
            "nn.DataParallel runs copies of the model that share one plan; start one process per GPU with torchrun"
        )


@dataclass
class Draws:
    """Numbers of the draws that training forwards made, so that a checkpoint around the model repeats its own.

    torch.utils.checkpoint (not reentrant) calls the model a second time in backward, with the very tensors of the
    first: by these the first is found.
    """

    _first: dict[int, tuple[weakref.ref, list[int]]] = field(default_factory=dict)
    _any: bool = False

    def number(self, arguments: Mapping[str, Any], following: int, matters: bool) -> tuple[int, bool]:
        """The number of this training forward's draw, and whether it repeats an earlier one.

        Args:
            arguments: keywords of the call.
            following: the next number, for a forward that repeats none.
            matters: rows are drawn at random.

        Raises:
            UnsupportedModelError: backward repeats a forward whose draw cannot be told from others'.
        """
        source = next(x for name in _SOURCES if (x := arguments.get(name)) is not None)
        known = self._first.get(id(source))
        if known is not None and known[0]() is not source:
            known = None
        if torch._C._current_graph_task_id() == -1:  # not inside backward
            self._any = True
            if known is None:
                self._forget_dead()
                known = self._first[id(source)] = weakref.ref(source), []
            known[1].append(following)
            del known[1][2:]  # two are as bad as more
            return following, False
        if known is not None and len(known[1]) == 1:
            return known[1].pop(), True
        if not self._any:
            return following, False  # reentrant checkpointing: the first call had no gradients, and ran densely
        if matters:
            raise UnsupportedModelError(
                "backward repeats a forward of the whole model (torch.utils.checkpoint around it), and lemo cannot "
                "tell which rows were drawn for it; pass the same input tensors, once each, or checkpoint the layers "
                "with gradient_checkpointing_enable() instead"
            )
        return following, True

    def _forget_dead(self) -> None:
        for key in [key for key, (source, _) in self._first.items() if source() is None]:
            del self._first[key]


_SOURCES = ("input_ids", "inputs_embeds")


def held_layers(model: Any, layers: Iterable[nn.Module], arguments: Mapping[str, Any]) -> frozenset[int]:
    """Layers that must not write into the stream they get, because somebody else may still read it.

    The first one's is the caller's own where `inputs_embeds` came; a forward hook on the embedding or on the layer
    before may have kept it, and one on the layer itself may keep it.
    """
    embedding = model.get_input_embeddings()
    before = arguments.get("inputs_embeds") is not None or _observed(embedding) or _observed(in_force(embedding))
    held = set()
    for index, layer in enumerate(layers):
        own = _observed(layer)
        if before or own:
            held.add(index)
        before = own
    return frozenset(held)


def said_of_hooks(layers: Iterable[nn.Module], fused: frozenset[int]) -> Iterator[str]:
    """What to tell of forward hooks on layers that the generic engine runs on rows."""
    for index, layer in enumerate(layers):
        hook = None if index in fused else why_hooked(layer, _PASSING_ON, FORWARD)
        if hook is not None:
            yield (
                f"layer {index} has {hook} and runs in the generic engine: the hook is given the rows that run there, "
                "not the whole stream, and under exact forward a change that it makes has no effect on other layers"
            )


def _observed(module: nn.Module) -> bool:
    return why_hooked(module, _PASSING_ON, FORWARD) is not None


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
