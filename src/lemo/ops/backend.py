"""Which implementation of an op runs: asked for by name, or chosen and logged once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from lemo.errors import BackendError

Backend = Literal["auto", "triton", "reference"]

_log = logging.getLogger("lemo")
_logged: set[tuple[str, str, str]] = set()


def choose_backend(op: str, backend: Backend, why_not_triton: Callable[[], str | None]) -> Backend:
    """Resolves `backend` for one call of an op.

    Args:
        op: name of the op, for messages.
        backend: `triton` and `reference` are obeyed; `auto` takes triton where it can run and logs its choice once.
        why_not_triton: returns the reason why the Triton kernel cannot run on this input, or None if it can.

    Returns:
        `triton` or `reference`.

    Raises:
        BackendError: `triton` was asked for and cannot run, or the name is unknown.
    """
    if backend not in ("auto", "triton", "reference"):
        raise BackendError(f"backend of {op} must be auto, triton or reference, got {backend!r}")
    if backend == "reference":
        return backend
    reason = why_not_triton()
    if backend == "triton":
        if reason is not None:
            raise BackendError(f"{op}: backend 'triton' cannot run here: {reason}")
        return backend
    chosen, because = ("triton", "it can run") if reason is None else ("reference", f"triton cannot run: {reason}")
    if (op, chosen, because) not in _logged:
        _logged.add((op, chosen, because))
        _log.info("%s uses backend %s (%s)", op, chosen, because)
    return chosen
