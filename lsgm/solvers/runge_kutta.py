"""Explicit Runge-Kutta methods on a given grid (Hairer, Norsett & Wanner, section II.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lsgm.arguments import check_choice

Slope = Callable[[int, Tensor], Tensor]  # (node, y) -> dy/dx at that node
Step = Callable[[Slope, int, float, Tensor], Tensor]  # (slope, node, h, y) -> y at the end of the step


def euler(f: Slope, i: int, h: float, y: Tensor) -> Tensor:
    """Euler's method, of order 1."""
    return torch.add(y, f(i, y), alpha=h)


def heun(f: Slope, i: int, h: float, y: Tensor) -> Tensor:
    """Heun's method, of order 2."""
    k1 = f(i, y)
    k2 = f(i + 1, torch.add(y, k1, alpha=h))
    return torch.add(y, k1 + k2, alpha=h / 2)


def rk4(f: Slope, i: int, h: float, y: Tensor) -> Tensor:
    """The classical Runge-Kutta method, of order 4; node i + 1 is halfway between i and i + 2."""
    k1 = f(i, y)
    k2 = f(i + 1, torch.add(y, k1, alpha=h / 2))
    k3 = f(i + 1, torch.add(y, k2, alpha=h / 2))
    k4 = f(i + 2, torch.add(y, k3, alpha=h))
    return torch.add(y, k1 + 2 * (k2 + k3) + k4, alpha=h / 6)


METHODS: dict[str, Step] = {"euler": euler, "heun": heun, "rk4": rk4}
MIDPOINTS = {"rk4"}  # methods whose nodes are the ends of the steps and what is halfway between them


def runge_kutta(f: Slope, y: Tensor, x: Sequence[float], method: str) -> Tensor:
    """Integrate dy/dx = f over the nodes ``x``, every other of which is a midpoint for :data:`MIDPOINTS`.

    Raises:
        LSGMError: the method is not `euler`, `heun` or `rk4`.
    """
    check_choice("method", method, tuple(METHODS))
    step, nodes = METHODS[method], 2 if method in MIDPOINTS else 1
    for i in range(0, len(x) - 1, nodes):
        y = step(f, i, x[i + nodes] - x[i], y)
    return y
