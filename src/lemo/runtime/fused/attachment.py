"""Which layers of an attached model the fused engine runs, and the norm before the head that it may defer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from lemo.errors import ConfigError, UnsupportedModelError
from lemo.families import find_family
from lemo.runtime.batch import BatchContext
from lemo.runtime.context import loss_rows
from lemo.runtime.fused.call import LEVELS, Recompute
from lemo.runtime.fused.factors import AdapterFactors
from lemo.runtime.fused.final import Deferred, install_norm, may_defer, remove_norm
from lemo.runtime.fused.offload import Convoy, HostMemory, Offload, read_offload
from lemo.runtime.fused.parts import LayerParts, read_norm
from lemo.runtime.fused.watch import Watch
from lemo.runtime.model import decoder_layers

Engine = Literal["auto", "fused", "generic"]
ENGINES = ("auto", "fused", "generic")
NO_OFFLOAD = (
    "offload moves what the fused engine saves; for Transformers' own layers take the offloading of activations that "
    "Transformers and TRL have (`activation_offloading` in TRL's configurations)"
)


class FusedEngine:
    """The fused engine of one handle.

    Attributes:
        names: where the parts of the model's layers are; None when no family file says.
    """

    def __init__(self, handle: Any, engine: Engine, level: Recompute | None, offload: Offload = False) -> None:
        """Nothing is installed yet.

        Args:
            handle: has `model`, `plan`, `context` and `note`.
            engine: which engine was asked for.
            level: what backward computes again; None to follow gradient checkpointing.
            offload: what only keys need waits for backward in host memory; `keys`: keys and values, too.

        Raises:
            ConfigError: an unknown engine, level or offload, or an engine that cannot offload.
        """
        if engine not in ENGINES:
            raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
        if level is not None and level not in LEVELS:
            raise ConfigError(f"recompute must be one of {', '.join(LEVELS)} or None, got {level!r}")
        moved = read_offload(offload)
        if moved is not None and engine == "generic":
            raise ConfigError(NO_OFFLOAD)
        self._handle, self._engine, self._level = handle, engine, level
        self._host = None if moved is None else HostMemory(keys=moved == "keys")
        family = find_family(handle.model.config)
        self.names = None if family is None else family.names
        self._norm: nn.Module | None = None
        self._found: tuple[list[nn.Module], Watch, frozenset[int]] | None = None

    def install(self) -> None:
        """Makes the norm before the head deferrable, where the family names it and it is a plain norm."""
        if self._engine == "generic" or self.names is None or self.names.final_norm is None:
            return
        self._norm = self._handle.model.base_model.get_submodule(self.names.final_norm)
        install_norm(self._norm, self._handle)

    def remove(self) -> None:
        """Undoes `install`, and lets host memory go."""
        if self._host is not None:
            self._host.close()
        self._remove_norm()

    def _remove_norm(self) -> None:
        if self._norm is not None:
            remove_norm(self._norm)
            self._norm = None

    def layers(self) -> frozenset[int]:
        """Layers that the fused engine runs, as they are now.

        Raises:
            UnsupportedModelError: `engine="fused"` and a layer cannot.
        """
        model = self._handle.model
        if self._engine == "generic" or (self._engine == "auto" and not next(model.parameters()).is_cuda):
            if self._host is not None:
                self._handle.note(NO_OFFLOAD)
            return frozenset()
        layers = list(decoder_layers(model))
        if self._found is not None and self._found[0] == layers and self._found[1].holds():
            return self._found[2]
        self._found = None
        found = self._ask(layers)
        attached = [(layer, state) for layer in layers if (state := layer.__dict__.get("_lemo_layer")) is not None]
        if len(found) == len(attached):
            self._found = layers, Watch.of_all([state.watch(layer) for layer, state in attached]), found
        return found

    def _ask(self, layers: list[nn.Module]) -> frozenset[int]:
        """Every layer by itself."""
        found, first = set(), dict[str, int]()
        for index, layer in enumerate(layers):
            state = layer.__dict__.get("_lemo_layer")
            if state is None:
                continue
            reason = state.why_not_fused(layer)
            if reason is None:
                found.add(index)
            elif self._engine == "fused":
                raise UnsupportedModelError(f"engine 'fused' cannot run layer {index}: {reason}")
            else:
                first.setdefault(reason, index)
        for reason, index in first.items():
            self._handle.note(f"layers run in the generic engine (first: layer {index}): {reason}")
        if self._host is not None and len(found) < len(self._handle.plan.layers):
            self._handle.note(f"{len(self._handle.plan.layers) - len(found)} layers keep their inputs: {NO_OFFLOAD}")
        return frozenset(found)

    def factors(self, fused: frozenset[int]) -> AdapterFactors:
        """For one forward: makes the factors of several layers at a time, but for layers that keep shards of them."""

        def readable() -> Iterator[LayerParts]:
            layers = decoder_layers(self._handle.model)
            found = (layers[i].__dict__["_lemo_layer"].peek_parts(layers[i]) for i in sorted(fused))
            return (parts for parts in found if parts is not None)

        return AdapterFactors(readable)

    def recompute(self) -> Recompute:
        """What backward computes again."""
        if self._level is not None:
            return self._level
        checkpoints = any(getattr(x, "gradient_checkpointing", False) for x in decoder_layers(self._handle.model))
        return "lin" if checkpoints else "none"

    def offload(self) -> Convoy | None:
        """For one forward: takes what only keys need to the host; None where it stays, or nothing is saved."""
        return self._host.convoy() if self._host is not None and torch.is_grad_enabled() else None

    def defer(self, context: BatchContext | None, labelled: bool) -> Deferred | None:
        """Lets the last layer and the norm behind it work on loss rows only: the segmented loss reads no others.

        Args:
            context: the batch.
            labelled: its loss rows were read from the labels.

        Returns:
            That norm and those rows, or None where all rows must be normed.
        """
        if context is None or self._norm is None or len(self._handle.plan.layers) - 1 not in context.fused:
            return None
        assert self.names is not None and self.names.final_norm is not None
        if self._handle.model.base_model.get_submodule(self.names.final_norm) is not self._norm:
            # PEFT came after `attach` and wrapped the norm (`modules_to_save`).
            self._remove_norm()
            self.install()
            assert self._norm is not None
        if not may_defer(self._handle, self.names.final_norm):
            return None
        context.loss_rows_only = context.defers_norm = True
        return Deferred(read_norm(self._norm, self.names.norm), loss_rows(context.layout).rows_N, labelled)
