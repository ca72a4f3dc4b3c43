"""The probability-flow ODE (arXiv 2011.13456, section 4.3; LSGM, section 2):

    dz/dt = f(t) z + g(t)^2 / (2 sigma_t) eps(z, t)

From t = 1 to 0 it turns N(0, I) into a sample; from 0 to 1 it gives log p(z0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lsgm.arguments import check_choice, check_count, check_time_eps, check_times, check_tol
from lsgm.errors import LSGMError, SolverError
from lsgm.prior import ScorePrior

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


Drift = Callable[[float, Tensor], Tensor]  # (t, y) -> dy/dt


@dataclass
class Solution:
    """State at the end of an integration and the number of evaluations it took."""

    y: Tensor
    nfe: int


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


# Fixed-grid solvers: evaluations per step.
FIXED = {"euler": 1, "heun": 2, "rk4": 4}


def fixed_grid(f: Drift, y: Tensor, t0: float, t1: float, steps: int, method: str) -> Solution:
    """Integrate dy/dt = f(t, y) from t0 to t1 in ``steps`` equal steps by `euler`, `heun` or `rk4` (order 1, 2, 4).

    Raises:
        SolverError: the state at the end is not finite.
        LSGMError: t0 is t1, there is no step, or the method is another one.
    """
    (t0, t1), steps = check_times(t0, t1), check_count("steps", steps)
    check_choice("method", method, tuple(FIXED))
    h = (t1 - t0) / steps
    for i in range(steps):
        t, t_new = t0 + i * h, t1 if i + 1 == steps else t0 + (i + 1) * h
        k1 = f(t, y)
        if method == "euler":
            y = torch.add(y, k1, alpha=h)
        elif method == "heun":
            k2 = f(t_new, torch.add(y, k1, alpha=h))
            y = torch.add(y, k1 + k2, alpha=h / 2)
        else:
            k2 = f(t + h / 2, torch.add(y, k1, alpha=h / 2))
            k3 = f(t + h / 2, torch.add(y, k2, alpha=h / 2))
            k4 = f(t_new, torch.add(y, k3, alpha=h))
            y = torch.add(y, k1 + 2 * (k2 + k3) + k4, alpha=h / 6)
    return Solution(check_finite(y, method), steps * FIXED[method])


def check_finite(y: Tensor, solver: str) -> Tensor:
    """``y``, what a solver of equal steps came to; raises :class:`SolverError` if it is not finite."""
    if not y.isfinite().all():
        raise SolverError(f"{solver}: the result is not finite; more steps may help, if the training did not diverge")
    return y


def drift(prior: ScorePrior, t: float, z: Tensor) -> Tensor:
    """dz/dt of the probability flow at time t, [B, C, H, W]; one evaluation of the score network.

    Raises :class:`SolverError` at a time so near to 0 that sigma_t vanishes.
    """
    # The coefficients on the host, in float64: two numbers, not ten kernels.
    time = torch.tensor(t, dtype=torch.float64)
    f, g2 = prior.sde.drift(time).item(), prior.sde.diffusion_squared(time).item()
    sigma = math.sqrt(prior.sde.variance(time).item())
    if sigma == 0:
        raise SolverError(f"the ODE has no solution at t = {t:g}, where sigma_t is 0; choose a larger time_eps")
    return torch.add(f * z, prior(z, z.new_full((1,), t)), alpha=g2 / (2 * sigma))


@torch.no_grad()
def sample(
    prior: ScorePrior, noise: Tensor, tol: float = 1e-5, time_eps: float = 1e-5, solver: str = "rk45", steps: int = 50
) -> Solution:
    """Latents z0 [B, C, H, W] from ``noise`` ~ N(0, I) of that shape, by the ODE from t = 1 to ``time_eps``.

    Args:
        solver: `rk45`, adaptive with ``tol``, or one of :data:`FIXED` with ``steps`` steps.
    Raises:
        SolverError: the ODE cannot be solved.
        LSGMError: the solver is another one, ``time_eps`` not in (0, 1), or a setting of the solver out of its range.
    """
    check_choice("solver", solver, ("rk45", *FIXED))
    time_eps = check_time_eps(time_eps)
    start = noise * math.sqrt(prior.sde.base_variance)
    f = partial(drift, prior)
    if solver == "rk45":
        return rk45(f, start, 1.0, time_eps, tol)
    return fixed_grid(f, start, 1.0, time_eps, steps, solver)


def log_prob(
    prior: ScorePrior, z0: Tensor, probes: Tensor | None, tol: float = 1e-5, time_eps: float = 1e-5
) -> tuple[Tensor, int]:
    """log p(z0) in nats, [B], by the instantaneous change of variables, and the NFE.

    The trace of the drift's Jacobian is estimated with the same Hutchinson probes for the whole solve, which keeps the
    right-hand side smooth; the mean of several is taken. The cost of each is one backward pass per evaluation.

    Args:
        z0: latents [B, C, H, W]; the state at t = ``time_eps``.
        probes: like z0, or [P, B, C, H, W] for P probes; zero mean and unit covariance (Gaussian or Rademacher).
            None: the exact trace, from D = C H W backward passes, for small D.
    Raises:
        SolverError: the ODE cannot be solved.
        LSGMError: ``time_eps`` is not in (0, 1), ``tol`` not in (0, 1], or the probes are not like z0.
    """
    time_eps = check_time_eps(time_eps)
    batch, dimensions = z0.shape[0], z0.shape[1:].numel()
    scale = 1.0
    if probes is None:
        basis = torch.eye(dimensions, dtype=z0.dtype, device=z0.device)
        probes, scale = basis.view(-1, 1, *z0.shape[1:]).expand(-1, batch, -1, -1, -1), float(dimensions)
    elif probes.dim() == z0.dim():
        probes = probes[None]
    if probes.shape[1:] != z0.shape or len(probes) == 0:
        raise LSGMError(f"probes: expected [P, {', '.join(map(str, z0.shape))}], found {list(probes.shape)}")

    def f(t: float, state: Tensor) -> Tensor:
        z = state[:, :-1].view_as(z0).detach().requires_grad_()
        with torch.enable_grad():
            velocity = drift(prior, t, z)
        traces = []
        for i, probe in enumerate(probes):
            # the Jacobian's transpose times the probe
            (product,) = torch.autograd.grad(velocity, z, probe, retain_graph=i + 1 < len(probes))
            traces.append((product * probe).flatten(1).sum(dim=1, keepdim=True))
        trace = torch.stack(traces).mean(dim=0) * scale
        return torch.cat([velocity.detach().flatten(1), trace], dim=1)

    start = torch.cat([z0.flatten(1), z0.new_zeros(batch, 1)], dim=1)
    end = rk45(f, start, time_eps, 1.0, tol)
    return prior.sde.base_log_prob(end.y[:, :-1]) + end.y[:, -1], end.nfe
