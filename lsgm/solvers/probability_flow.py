"""The probability-flow ODE (arXiv 2011.13456, section 4.3; LSGM, section 2):

    dz/dt = f(t) z + g(t)^2 / (2 sigma_t) eps(z, t)

From t = 1 to 0 it turns N(0, I) into a sample; from 0 to 1 it gives log p(z0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lsgm.arguments import check_time_eps
from lsgm.errors import LSGMError, SolverError
from lsgm.prior import ScorePrior
from lsgm.solvers.fixed_steps import fixed_steps
from lsgm.solvers.rk45 import rk45
from lsgm.solvers.solution import Solution


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
def rk45_sample(prior: ScorePrior, noise: Tensor, draw: Callable[[], Tensor], settings: Any) -> Solution:
    """Latents z0 [B, C, H, W] from ``noise`` ~ N(0, I), by the ODE from t = 1 to `time_eps` with tolerance `tol`.

    Args:
        draw: not used, the ODE is deterministic.
        settings: has `tol` and `time_eps`.
    Raises:
        SolverError: the ODE cannot be solved.
        LSGMError: `time_eps` is not in (0, 1), or `tol` not in (0, 1].
    """
    time_eps = check_time_eps(settings.time_eps)
    return rk45(partial(drift, prior), _start(prior, noise), 1.0, time_eps, settings.tol)


@torch.no_grad()
def fixed_steps_sample(prior: ScorePrior, noise: Tensor, draw: Callable[[], Tensor], settings: Any) -> Solution:
    """:func:`rk45_sample` in `steps` equal steps by the method `solver`: euler, heun or rk4; raises as it does."""
    time_eps = check_time_eps(settings.time_eps)
    return fixed_steps(partial(drift, prior), _start(prior, noise), 1.0, time_eps, settings.steps, settings.solver)


def _start(prior: ScorePrior, noise: Tensor) -> Tensor:
    """A sample of the base distribution p(z_1)."""
    return noise * math.sqrt(prior.sde.base_variance)


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
