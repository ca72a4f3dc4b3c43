"""Exponential moving average of a module's weights."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """Average w_ema <- decay w_ema + (1 - decay) w, starting from the weights after the first step.

    ``module`` is a copy of the given module with the averaged weights; its buffers stay as they were when copied.
    """

    def __init__(self, module: M, decay: float) -> None:
        self.decay = decay
        self.module: M = copy.deepcopy(module).requires_grad_(False)
        self._parameters: list[Tensor] = list(module.parameters())
        self.average: list[Tensor] = list(self.module.parameters())
        self._started = False

    @torch.no_grad()
    def update(self) -> None:
        if self._started:
            torch._foreach_lerp_(self.average, self._parameters, 1 - self.decay)
        else:
            torch._foreach_copy_(self.average, self._parameters)
            self._started = True

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "started": self._started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self._started = bool(state["started"])

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Overwrite the weights of the given module with the average."""
        torch._foreach_copy_(self._parameters, self.average)
