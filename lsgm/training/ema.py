"""Exponential moving average of a module's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """Average w_ema <- decay w_ema + (1 - decay) w, starting from the weights after the first step."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._names = [name for name, _ in module.named_parameters()]
        self._parameters: list[Tensor] = list(module.parameters())
        self.average: list[Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        if not self.average:
            self.average = [p.detach().clone() for p in self._parameters]
        else:
            torch._foreach_lerp_(self.average, self._parameters, 1 - self.decay)

    def weights(self) -> dict[str, Tensor]:
        """The average by the parameters' names; the weights themselves before the first step."""
        return dict(zip(self._names, self.average or [p.detach() for p in self._parameters], strict=True))

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Overwrite the module's weights with the average."""
        torch._foreach_copy_(self._parameters, self.average)
