"""Adams-Bashforth methods with variable steps (Hairer, Norsett & Wanner, section III.5): one evaluation per step.

In the noise form they are the rho-AB-DEIS of Zhang & Chen (arXiv 2204.13902), of order 1 in that form DDIM. In the
velocity form, which integrates the mismatch with N(0, I) alone, five evaluations are enough for LSGM.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from lsgm.solvers.runge_kutta import Slope

ORDERS = (1, 2, 3)


def weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """w with sum_m w_m nodes_m^k = moments_k for k = 0, 1 ...: exact for polynomials through the nodes."""
    r = torch.tensor(nodes, dtype=torch.float64)
    powers = torch.stack([r**k for k in range(len(r))])
    found: list[float] = torch.linalg.solve(powers, torch.tensor(moments[: len(r)], dtype=torch.float64)).tolist()
    return found


def adams_bashforth(f: Slope, y: Tensor, x: Sequence[float], order: int) -> Tensor:
    """Integrate dy/dx = f from the first to the last of the nodes ``x``: y_{i+1} = y_i + h sum_m w_m f_{i-m}.

    The weights are those of the polynomial through the last ``order`` slopes: sum_m w_m r_m^k = 1 / (k + 1) for
    r_m = (x_{i-m} - x_i) / h. The first steps have a lower order: with order 3, the first one leaves an error of
    order 2, which is too small to be seen where that step is short in x (not for equal steps in phi).
    """
    slopes: deque[Tensor] = deque(maxlen=order)
    moments = [1 / (k + 1) for k in range(order)]
    for i in range(len(x) - 1):
        h = x[i + 1] - x[i]
        slopes.appendleft(f(i, y))
        nodes = [(x[i - m] - x[i]) / h for m in range(len(slopes))]
        for w, slope in zip(weights(nodes, moments), slopes, strict=True):
            y = torch.add(y, slope, alpha=h * w)
    return y
