"""Counts the bytes of every tensor that lives during a stretch of code, as a GPU's allocator would on a CPU.

Ops whose kernels allocate nothing but their results are run unseen; their results are then counted.
"""

from __future__ import annotations

import functools
import weakref
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What the engine calls, by the modules that call it.
KERNELS = {
    "lemo.runtime.fused.forward": ("bypass_rows_", "write_rows_"),
    "lemo.runtime.fused.backward": ("bypass_rows_backward_", "write_rows_"),
    "lemo.runtime.fused.attention": (
        "norm_rows",
        "norm_rows_backward",
        "rope_rows_",
        "write_rows_",
        "attend_forward",
        "attend_backward",
        "attend_local",
        "attend_local_backward",
    ),
    "lemo.runtime.context": ("attend_local", "write_rows_"),
    "lemo.runtime.fused.mlp": ("norm_rows", "norm_rows_backward", "gated_act", "gated_act_backward", "write_rows_"),
    "lemo.runtime.fused.final": ("norm_rows", "norm_rows_backward"),
}


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors made inside that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        found = function(*args, **(kwargs or {}))
        self.see(found, before)
        return found

    def see(self, found, before=frozenset()) -> None:
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage(), before)

    def count(self, storage, before) -> None:
        key = id(storage)
        if key in before or (key in self.known and self.known[key]() is not None):
            return
        size = storage.nbytes()

        def gone(_, key=key, size=size):
            self.live -= size
            self.known.pop(key, None)

        self.known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


@contextmanager
def counting(monkeypatch):
    """A LiveBytes in force, with kernels as on a GPU."""
    import importlib

    from torch.utils._python_dispatch import _disable_current_modes

    mode = LiveBytes()

    def unseen(kernel):
        @functools.wraps(kernel)
        def run(*args, **kwargs):
            before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            with _disable_current_modes():
                found = kernel(*args, **kwargs)
            mode.see(found, before)
            return found

        return run

    with monkeypatch.context() as patch:
        for module, names in KERNELS.items():
            loaded = importlib.import_module(module)
            for name in names:
                patch.setattr(loaded, name, unseen(getattr(loaded, name)))
        with mode:
            yield mode
