"""MLP rows of their own: hooks that live for one forward of one layer, so that adapters added later are seen too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lemo.core.bypass import Bypass
from lemo.runtime.rows import MlpRows, hidden_of


@contextmanager
def mlp_rows(modules: tuple[nn.Module, nn.Module], rows: MlpRows) -> Iterator[None]:
    """Inside, the MLP between the first and the last module runs on `rows.rows_n` only.

    The other rows of its output are their bypass of the MLP's input, or zero without one (the residual stream of these
    rows then passes the MLP unchanged).
    """
    first, last = modules
    inputs: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs.append(args[0])
        flat_NM = args[0].reshape(-1, args[0].shape[-1])
        chosen = flat_NM.index_select(0, rows.rows_n)
        return (chosen.reshape(*(1,) * (args[0].dim() - 2), *chosen.shape), *args[1:])

    def spread(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = hidden_of(output)
        full = _spread(inputs.pop(), hidden, rows)
        return (full, *output[1:]) if isinstance(output, tuple) else full

    with ExitStack() as stack:
        stack.callback(first.register_forward_pre_hook(take).remove)
        stack.callback(last.register_forward_hook(spread).remove)
        yield


def _spread(given: Tensor, output: Tensor, rows: MlpRows) -> Tensor:
    """Output of every row from the output of those that ran."""
    flat_NM = given.reshape(-1, given.shape[-1])
    output_nM = output.reshape(-1, output.shape[-1])
    full_NM = output_nM.new_zeros(len(flat_NM), output_nM.shape[-1]).index_copy(0, rows.rows_n, output_nM)
    if rows.down_MR is not None and len(rows.skipped_s):
        update = Bypass(rows.down_MR, rows.up_RM).update(flat_NM.index_select(0, rows.skipped_s))
        full_NM = full_NM.index_copy(0, rows.skipped_s, update.to(full_NM.dtype))
    return full_NM.reshape(*given.shape[:-1], full_NM.shape[-1])


class MlpTrace:
    """What one forward of a layer's MLP saw: input, intermediate activation's norm, and output."""

    def __init__(self) -> None:
        """Empty until a forward ran inside `watch`."""
        self.input_NM: Tensor | None = None
        self.norm_N: Tensor | None = None
        self.output_NM: Tensor | None = None

    @contextmanager
    def watch(self, modules: tuple[nn.Module, nn.Module], down: nn.Module) -> Iterator[None]:
        """Inside, the MLP from the first to the last module is recorded; `down` maps its intermediate activation."""

        def see_input(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.input_NM = args[0].detach().reshape(-1, args[0].shape[-1])

        def see_norm(module: nn.Module, args: tuple[Any, ...]) -> None:
            flat = args[0].detach().reshape(-1, args[0].shape[-1])
            self.norm_N = torch.linalg.vector_norm(flat, dim=-1, dtype=torch.promote_types(flat.dtype, torch.float32))

        def see_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden = hidden_of(output)
            self.output_NM = hidden.detach().reshape(-1, hidden.shape[-1])

        with ExitStack() as stack:
            stack.callback(modules[0].register_forward_pre_hook(see_input).remove)
            stack.callback(down.register_forward_pre_hook(see_norm).remove)
            stack.callback(modules[1].register_forward_hook(see_output).remove)
            yield
