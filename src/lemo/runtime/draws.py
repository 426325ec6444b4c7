"""Which draw a training forward makes: a new one, or that of the forward which a checkpoint repeats."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lemo.errors import UnsupportedModelError

_SOURCES = ("input_ids", "inputs_embeds")
_OUTSIDE = -1  # torch's number of the running backward, where none runs


@dataclass(eq=False)
class _Draw:
    """The number of one forward's draw. The graph of its output holds it, and says which backward came to it.

    Attributes:
        number: of the draw.
        reached: the last backward that came to the forward's output.
        repeated: the last backward that repeated the forward.
    """

    number: int
    reached: int = _OUTSIDE
    repeated: int = _OUTSIDE

    def __call__(self, grads: Any) -> None:
        """Before backward goes through the output; changes no gradient."""
        self.reached = _backward()


@dataclass
class Draws:
    """Numbers of the draws that training forwards made, so that a checkpoint around the model repeats its own.

    torch.utils.checkpoint calls the model a second time in backward. One that is not reentrant does so with the very
    tensors of the first call, and after backward has gone through what the first call returned: by both the first is
    found. A reentrant one runs first without gradients, therefore densely, and its repetition makes a new draw.
    """

    _made: dict[int, tuple[weakref.ref, list[weakref.ref]]] = field(default_factory=dict)
    _announced: dict[tuple, weakref.ref] = field(default_factory=dict)

    def announce(self, arguments: Mapping[str, Any], repeatable: bool) -> None:
        """Before a forward; `repeatable` is one in training mode without gradients.

        A reentrant checkpoint may repeat that one with gradients.
        """
        source = _source(arguments) if repeatable else None
        if source is not None:
            self._forget_dead()
            self._announced[_memory(source)] = weakref.ref(source)

    def number(self, arguments: Mapping[str, Any], following: int, matters: bool) -> tuple[int, bool]:
        """The number of this training forward's draw, and whether it repeats an earlier one.

        Args:
            arguments: keywords of the call.
            following: the next number, for a forward that repeats none.
            matters: rows are drawn at random.

        Raises:
            UnsupportedModelError: backward repeats a forward whose draw cannot be told from others'.
        """
        backward, source = _backward(), _source(arguments)
        if backward == _OUTSIDE or source is None:
            return following, False
        draws = [x for x in self._of(source) if x.reached == backward != x.repeated]
        if len(draws) == 1:
            draws[0].repeated = backward
            return draws[0].number, True
        announced = self._announced.get(_memory(source))
        if not draws and announced is not None and announced() is not None:
            return following, False
        if matters:
            raise UnsupportedModelError(
                "backward repeats a forward of the whole model (torch.utils.checkpoint around it), and lemo cannot "
                "tell which rows were drawn for it; pass the same input tensors under the same attached plan, or "
                "checkpoint the layers with gradient_checkpointing_enable() instead"
            )
        return following, True

    @torch.compiler.disable
    def keep(self, arguments: Mapping[str, Any], number: int, output: Any) -> None:
        """Ties the number of a training forward's draw to the graph of what it returned; with the graph it goes."""
        source, draw = _source(arguments), _Draw(number)
        nodes = [x.grad_fn for x in _tensors(output) if x.grad_fn is not None]
        if source is None or not nodes or _backward() != _OUTSIDE:
            return
        for node in nodes:
            node.register_prehook(draw)
        self._forget_dead()
        _, draws = self._made.setdefault(id(source), (weakref.ref(source), []))
        draws.append(weakref.ref(draw))

    def _of(self, source: Tensor) -> list[_Draw]:
        """Draws of forwards with these tensors whose graphs are there."""
        known, draws = self._made.get(id(source), (None, []))
        if known is None or known() is not source:
            return []
        return [draw for ref in draws if (draw := ref()) is not None]

    def _forget_dead(self) -> None:
        for key, (source, draws) in list(self._made.items()):
            draws[:] = [ref for ref in draws if ref() is not None]
            if source() is None or not draws:
                del self._made[key]
        for memory in [memory for memory, source in self._announced.items() if source() is None]:
            del self._announced[memory]


def _backward() -> int:
    """Torch's number of the backward that this thread is inside of."""
    return torch._C._current_graph_task_id()


def _source(arguments: Mapping[str, Any]) -> Tensor | None:
    return next((x for name in _SOURCES if (x := arguments.get(name)) is not None), None)


def _memory(source: Tensor) -> tuple:
    """A reentrant checkpoint repeats the call with other tensors of the same memory."""
    plain = type(source) in (Tensor, nn.Parameter)  # others may have no memory to ask for
    return source.data_ptr() if plain else id(source), tuple(source.shape), source.device


def _tensors(output: Any) -> Iterator[Tensor]:
    """Tensors that a model returned: its output's fields, items of a tuple, or the one tensor."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
    return (x for x in values if isinstance(x, Tensor))
