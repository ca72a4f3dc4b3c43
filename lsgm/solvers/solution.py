"""What a solver asks of a model, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lsgm.errors import SolverError

Drift = Callable[[float, Tensor], Tensor]  # (t, y) -> dy/dt
NoisePrediction = Callable[[Tensor, float], Tensor]  # (z_t, t) -> eps(z_t, t), both [B, ...]


@dataclass
class Solution:
    """The state at the end, in the shape of the state at the start, and the number of evaluations it took."""

    y: Tensor
    nfe: float  # a mean over the images where they differ


def check_finite(y: Tensor, solver: str) -> Tensor:
    """``y``, the result of a solver with a fixed number of steps; raises :class:`SolverError` if it is not finite."""
    if not y.isfinite().all():
        raise SolverError(f"{solver}: the result is not finite; more steps may help, if the training did not diverge")
    return y
