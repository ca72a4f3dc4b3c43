"""Explicit Runge-Kutta methods with equal steps (Hairer, Norsett & Wanner, section II.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsgm.arguments import check_choice, check_count, check_times
from lsgm.solvers.solution import Drift, Solution, check_finite

Step = Callable[[Drift, float, float, float, Tensor], Tensor]  # (f, t, t_new, h, y) -> y at t_new


def euler(f: Drift, t: float, t_new: float, h: float, y: Tensor) -> Tensor:
    """Euler's method, of order 1."""
    return torch.add(y, f(t, y), alpha=h)


def heun(f: Drift, t: float, t_new: float, h: float, y: Tensor) -> Tensor:
    """Heun's method, of order 2."""
    k1 = f(t, y)
    k2 = f(t_new, torch.add(y, k1, alpha=h))
    return torch.add(y, k1 + k2, alpha=h / 2)


def rk4(f: Drift, t: float, t_new: float, h: float, y: Tensor) -> Tensor:
    """The classical Runge-Kutta method, of order 4."""
    k1 = f(t, y)
    k2 = f(t + h / 2, torch.add(y, k1, alpha=h / 2))
    k3 = f(t + h / 2, torch.add(y, k2, alpha=h / 2))
    k4 = f(t_new, torch.add(y, k3, alpha=h))
    return torch.add(y, k1 + 2 * (k2 + k3) + k4, alpha=h / 6)


FIXED: dict[str, tuple[Step, int]] = {"euler": (euler, 1), "heun": (heun, 2), "rk4": (rk4, 4)}  # evaluations per step


def fixed_steps(f: Drift, y: Tensor, t0: float, t1: float, steps: int, method: str) -> Solution:
    """Integrate dy/dt = f(t, y) from t0 to t1 in ``steps`` equal steps by `euler`, `heun` or `rk4`.

    Raises:
        SolverError: the state at the end is not finite.
        LSGMError: t0 is t1, there is no step, or the method is another one.
    """
    (t0, t1), steps = check_times(t0, t1), check_count("steps", steps)
    check_choice("method", method, tuple(FIXED))
    step, evaluations = FIXED[method]
    h = (t1 - t0) / steps
    for i in range(steps):
        t, t_new = t0 + i * h, t1 if i + 1 == steps else t0 + (i + 1) * h
        y = step(f, t, t_new, h, y)
    return Solution(check_finite(y, method), steps * evaluations)
