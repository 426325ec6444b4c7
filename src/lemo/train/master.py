"""fp32 master weights: what an optimizer steps where a model trains parameters of 16 bits.

In bf16 a number keeps eight significant bits. A step of less than 0.4 % of a weight is lost in it, and so is the decay
of Adam's second moment, 0.1 % a step: once large, it stays. So weights and moments are kept in fp32, as in mixed
precision training; forward and backward see 16 bits as before, and what they save is no larger.

*Source*: Mixed Precision Training (arXiv 1710.03740), section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MASTER = "master"


class MasterWeights:
    """fp32 copies of an optimizer's 16-bit parameters, which it steps in their place.

    Gradients are taken from the parameters before a step, and the parameters rounded from the copies after it. The
    copies are in the optimizer's state (`master`), so a resumed run goes on from them bit for bit; a state without
    them, of an earlier version, starts from the parameters as they are.

    Attributes:
        optimizer: whose groups have the copies.
        pairs: (parameter, its copy).
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Puts copies into the optimizer's groups. Parameters of 32 bits and more stay as they are.

        Args:
            optimizer: one that has not stepped.
        """
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group["params"] = [self._copied(parameter) for parameter in group["params"]]
        for parameter, copy in self.pairs:
            if parameter in optimizer.state:  # made with the optimizer, as Adagrad does
                state = optimizer.state.pop(parameter)
                optimizer.state[copy] = {name: _widened(value, parameter) for name, value in state.items()}
        if self.pairs:
            optimizer.register_step_pre_hook(self._take_gradients)
            optimizer.register_step_post_hook(self._round)
            optimizer.register_load_state_dict_post_hook(lambda optimizer: self.restore())

    def _copied(self, parameter: Tensor) -> Tensor:
        if not parameter.is_floating_point() or parameter.element_size() > 2:
            return parameter
        copy = nn.Parameter(parameter.detach().float())
        self.pairs.append((parameter, copy))
        return copy

    def _take_gradients(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, copy in self.pairs:
            copy.grad = None if parameter.grad is None else parameter.grad.float()

    def _round(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, copy in self.pairs:
            # Without a gradient it was not stepped, and may have no state yet: optimizers make it where there is none.
            if copy.grad is not None:
                copy.grad = None
                optimizer.state[copy][MASTER] = copy.data
                parameter.data.copy_(copy.data)

    def restore(self) -> None:
        """Takes the copies from the optimizer's state, after that was loaded; twice does no harm."""
        for parameter, copy in self.pairs:
            state = self.optimizer.state.get(copy, {})
            copy.data.copy_(state.get(MASTER, parameter.data))
            if MASTER in state:
                state[MASTER] = copy.data


def _widened(value: Any, parameter: Tensor) -> Any:
    """A value of an optimizer's state in fp32, where it is of 16 bits and as large as the parameter."""
    narrow = isinstance(value, Tensor) and value.shape == parameter.shape and value.dtype == parameter.dtype
    return value.float() if narrow else value
