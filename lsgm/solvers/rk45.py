"""Dormand-Prince 5(4) with adaptive steps (Dormand & Prince 1980; Hairer, Norsett & Wanner, section II.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsgm.arguments import check_count, check_times, check_tol
from lsgm.errors import LSGMError, SolverError
from lsgm.solvers.solution import Drift, Solution

# Dormand-Prince 5(4): nodes, stages, and the difference of the two embedded solutions.
_C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
_A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_E = (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)


def rk45(f: Drift, y: Tensor, t0: float, t1: float, tol: float, max_nfe: int = 10_000) -> Solution:
    """Integrate dy/dt = f(t, y) from t0 to t1 by Dormand-Prince 5(4) with adaptive steps.

    The step control is that of scipy's RK45 with atol = rtol = ``tol`` on the flattened state: the root mean square of
    error / (tol + tol max(|y|, |y_new|)) is kept below 1, and the last step lands on t1. Everything stays on y's
    device; one number a step comes to the host.

    Args:
        f: the right-hand side; gets t as a float and y in y's shape.
        y: state at t0, any shape but an empty one.
    Raises:
        SolverError: the state is no longer finite, or more than ``max_nfe`` evaluations were made.
        LSGMError: t0 is t1, the tolerance is not in (0, 1], or the state is empty or no floating-point tensor.
    """
    (t0, t1), tol, max_nfe = check_times(t0, t1), check_tol(tol), check_count("max_nfe", max_nfe)
    if y.numel() == 0 or not y.is_floating_point():
        raise LSGMError(f"y: expected floating-point values, found {y.dtype} of the shape {list(y.shape)}")
    direction = 1.0 if t1 > t0 else -1.0
    k = y.new_empty((7, y.numel()))
    coefficients = [y.new_tensor(row) for row in (*_A, _B, _E)]

    def norm(x: Tensor) -> float:
        return x.square().mean().sqrt().item()

    # First step (Hairer, Norsett & Wanner, II.4)
    t = t0
    k[0] = f(t, y).reshape(-1)
    scale = tol + tol * y.abs().reshape(-1)
    d0, d1 = norm(y.reshape(-1) / scale), norm(k[0] / scale)
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    h0 = min(h0, abs(t1 - t0))
    probe = f(t + direction * h0, torch.add(y, k[0].view_as(y), alpha=direction * h0)).reshape(-1)
    d2 = norm((probe - k[0]) / scale) / h0
    h1 = max(1e-6, h0 * 1e-3) if d1 <= 1e-15 and d2 <= 1e-15 else (0.01 / max(d1, d2)) ** 0.2
    h = min(100 * h0, h1, abs(t1 - t0))
    nfe = 2

    while t != t1:
        rejected = False
        while True:
            h = max(h, 10 * abs(math.nextafter(t, direction * math.inf) - t))
            t_new = t1 if h >= abs(t1 - t) else t + direction * h
            step = t_new - t
            for s in range(1, 6):
                increment = torch.mv(k[:s].t(), coefficients[s]).view_as(y)
                k[s] = f(t + _C[s] * step, torch.add(y, increment, alpha=step)).reshape(-1)
            y_new = torch.add(y, torch.mv(k[:6].t(), coefficients[6]).view_as(y), alpha=step)
            k[6] = f(t_new, y_new).reshape(-1)
            nfe += 6
            scale = torch.maximum(y.abs(), y_new.abs()).reshape(-1).mul_(tol).add_(tol)
            error = norm(torch.mv(k.t(), coefficients[7]).mul_(step).div_(scale))
            if not math.isfinite(error) or nfe > max_nfe:
                raise SolverError(
                    f"the ODE solver failed at t = {t:.3g} after {nfe} evaluations (error {error:.3g}); a larger tol "
                    "or time_eps may help, if the training did not diverge"
                )
            if error < 1:
                factor = 10.0 if error == 0 else min(10.0, 0.9 * error**-0.2)
                h = abs(step) * (min(1.0, factor) if rejected else factor)
                break
            h = abs(step) * max(0.2, 0.9 * error**-0.2)
            rejected = True
        t, y = t_new, y_new
        k[0] = k[6]
    return Solution(y, nfe)
