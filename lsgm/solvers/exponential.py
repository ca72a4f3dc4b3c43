"""Exponential multistep methods for the prediction x = (z - sigma eps) / m of z0, the data form.

    z_b = (sigma_b / sigma_a) z_a + m_b * integral of exp(lambda - lambda_b) x over lambda from lambda_a to lambda_b

is exact for every SDE (Lu et al., DPM-Solver++, arXiv 2211.01095, proposition 4.1). x is replaced by the polynomial
through its last values: with one that is DDIM (arXiv 2010.02502), with two DPM-Solver++(2M). The corrector is that of
UniPC (Zhao et al., arXiv 2302.04867): it adds x at the end of the step, which the next step needs anyway. With noise
it is SA-Solver (Xue et al., arXiv 2309.05019) with a constant tau.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from lsgm.noise_schedule import NoiseSchedule
from lsgm.solvers.adams_bashforth import weights
from lsgm.solvers.solution import NoisePrediction

SERIES = 0.5  # below, the recursion of the moments cancels


def moments(h: float, count: int) -> list[float]:
    """J_k = h * integral of e^(h (s - 1)) s^k over s from 0 to 1, for k = 0 .. count - 1.

    J_0 = 1 - e^-h, J_k = 1 - (k / h) J_{k-1}; for small h by its series sum_n (-1)^n h^(n+1) k! / (k + n + 1)!.
    """
    if abs(h) < SERIES:
        return [
            sum((-1) ** n * h ** (n + 1) * math.factorial(k) / math.factorial(k + n + 1) for n in range(16))
            for k in range(count)
        ]
    found = [-math.expm1(-h)]
    for k in range(1, count):
        found.append(1 - k / h * found[-1])
    return found


def exponential_multistep(
    predict: NoisePrediction,
    z: Tensor,
    schedule: NoiseSchedule,
    order: int,
    corrector: bool = False,
    tau: float = 0.0,
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Latents at the last time of the schedule from ``z`` at the first; one evaluation per step.

    Args:
        order: 1 to 3; the first steps have a lower one.
        corrector: correct each step but the last, which raises the order by one.
        tau: amount of noise; 0 is the ODE, 1 the reverse SDE.
        draw: gives N(0, I) like ``z``, once for each step, if ``tau`` is above 0.
    """
    t, m, sigma = (values.tolist() for values in (schedule.t, schedule.mean, schedule.sigma))
    lam: list[float] = schedule.half_log_snr.tolist()

    def data(z: Tensor, i: int) -> Tensor:
        return torch.add(z / m[i], predict(z, t[i]), alpha=-sigma[i] / m[i])

    known: deque[Tensor] = deque([data(z, 0)], maxlen=order)
    steps, rate = len(t) - 1, 1 + tau**2
    for i in range(steps):
        h = lam[i + 1] - lam[i]
        nodes = [(lam[i - k] - lam[i]) / h for k in range(len(known))]
        start = sigma[i + 1] / sigma[i] * math.exp(-(tau**2) * h) * z
        if tau > 0 and draw is not None:
            start = torch.add(start, draw(), alpha=sigma[i + 1] * math.sqrt(-math.expm1(-2 * tau**2 * h)))

        def step(nodes: list[float], values: list[Tensor], start: Tensor = start, i: int = i, h: float = h) -> Tensor:
            z = start
            for w, x in zip(weights(nodes, moments(rate * h, len(nodes))), values, strict=True):
                z = torch.add(z, x, alpha=m[i + 1] * w)
            return z

        z = step(nodes, [*known])
        if i + 1 < steps:
            x = data(z, i + 1)
            if corrector:
                z = step([1.0, *nodes], [x, *known])
            known.appendleft(x)
    return z
