"""Exponential moving averages of weights."""

from __future__ import annotations

import copy
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lsgm.prior import ScorePrior

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """Average w_ema <- decay w_ema + (1 - decay) w, starting from the weights after the first step.

    ``module`` is a copy of the given module with the averaged weights, and averaged statistics of batch norms.
    """

    def __init__(self, module: M, decay: float) -> None:
        self.decay = decay
        self.module: M = copy.deepcopy(module).requires_grad_(False)
        self._tensors: list[Tensor] = _averaged(module)
        self.average: list[Tensor] = _averaged(self.module)
        self._started = False

    @torch.no_grad()
    def update(self) -> None:
        if self._started:
            torch._foreach_lerp_(self.average, self._tensors, 1 - self.decay)
        else:
            torch._foreach_copy_(self.average, self._tensors)
            self._started = True

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "started": self._started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self._started = bool(state["started"])

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Overwrite the weights of the given module with the average."""
        torch._foreach_copy_(self._tensors, self.average)


def _averaged(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())]


class Averages(NamedTuple):
    """The averages of a training: of the prior, and of the VAE if it is averaged."""

    prior: EMA[ScorePrior]
    vae: EMA[Any] | None

    def update(self) -> None:
        """Take account of a step."""
        for ema in self._all():
            ema.update()

    def copy_to_module(self) -> None:
        """Overwrite the weights of prior and VAE with their averages."""
        for ema in self._all():
            ema.copy_to_module()

    def _all(self) -> list[EMA[Any]]:
        return [self.prior] if self.vae is None else [self.prior, self.vae]
