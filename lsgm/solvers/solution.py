"""What a solver returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lsgm.errors import SolverError

Drift = Callable[[float, Tensor], Tensor]  # (t, y) -> dy/dt


@dataclass
class Solution:
    """The state at the end, in the shape of the state at the start, and the number of evaluations it took."""

    y: Tensor
    nfe: int


def check_finite(y: Tensor, solver: str) -> Tensor:
    """``y``, what a solver of equal steps came to; raises :class:`SolverError` if it is not finite."""
    if not y.isfinite().all():
        raise SolverError(f"{solver}: the result is not finite; more steps may help, if the training did not diverge")
    return y
