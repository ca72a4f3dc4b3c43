"""The probability-flow ODE (arXiv 2011.13456, section 4.3; LSGM, section 2), and log p(z0) by it.

    dz/dt = f(t) z + g(t)^2 / (2 sigma_t) eps(z, t)

From t = 1 to 0 it turns N(0, I) into a sample (:mod:`lsgm.solvers.sampling`); from 0 to 1 it gives log p(z0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lsgm.arguments import check_choice
from lsgm.errors import LSGMError, SolverError
from lsgm.nfe import PER_STEP
from lsgm.noise_schedule import check_end
from lsgm.prior import ScorePrior
from lsgm.solvers.adams_bashforth import adams_bashforth
from lsgm.solvers.forms import ode
from lsgm.solvers.rk45 import rk45
from lsgm.solvers.runge_kutta import MIDPOINTS, runge_kutta
from lsgm.solvers.schedule import time_grid
from lsgm.solvers.solution import check_finite

LIKELIHOOD_SOLVERS = ("rk4", "heun", "ab", "rk45")
AB_ORDER = 2


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


def log_prob(
    prior: ScorePrior, z0: Tensor, probes: Tensor | None, tol: float = 1e-5, time_eps: float = 1e-5
) -> tuple[Tensor, int]:
    """log p(z0) in nats, [B], by the instantaneous change of variables with adaptive steps (rk45), and the NFE.

    The trace of the drift's Jacobian is estimated with the same Hutchinson probes for the whole solve, which keeps the
    right-hand side smooth; the mean of several is taken. The cost of each is one backward pass per evaluation. The
    steps suit the batch as a whole, so the result depends on the batch, within the tolerance.

    Args:
        z0: latents [B, ...]; the state at t = ``time_eps``.
        probes: like z0, or [P, B, ...] for P probes; zero mean and unit covariance (Gaussian or Rademacher). None: the
            exact trace, from as many backward passes as there are latent dimensions.
    Raises:
        SolverError: the ODE cannot be solved.
        LSGMError: ``time_eps`` is not in [0, 1) or sigma is 0 there, ``tol`` is not in (0, 1], or the probes are not
            like z0.
    """
    time_eps = check_end(prior.sde, time_eps)
    divergence = _Divergence(z0, probes)

    def f(t: float, state: Tensor) -> Tensor:
        return divergence(partial(drift, prior, t), state)

    end = rk45(f, divergence.start(z0), time_eps, 1.0, tol)
    return prior.sde.base_log_prob(end.y[:, :-1]) + end.y[:, -1], int(end.nfe)


def fixed_steps_log_prob(
    prior: ScorePrior, z0: Tensor, probes: Tensor | None, solver: str, steps: int, time_eps: float
) -> tuple[Tensor, int]:
    """:func:`log_prob` in the velocity form, with a fixed number of equal steps in phi.

        log p(z0) = log p(z_1) + D log(R_1 / R_0) + integral of div_u v over phi from phi_0 to phi_1,   z = R u

    The linear part of the ODE has no divergence left, so the noise of the trace is that of the mismatch with N(0, I).
    An image's value does not depend on the others in its batch.

    Args:
        solver: `rk4`, `heun` or `ab` (Adams-Bashforth of order 2).
        steps: number of evaluations, divisible by the four of a step of `rk4` or the two of `heun`.
    Raises:
        SolverError: the result is not finite.
        LSGMError: the solver is another one, the number of evaluations does not fit it, sigma is 0 at ``time_eps``, or
            the probes are not like z0.
    """
    check_choice("solver", solver, LIKELIHOOD_SOLVERS[:-1])
    each = PER_STEP.get(solver, 1)
    if steps % each:
        raise LSGMError(f"steps: expected a multiple of {each}, the evaluations of a step of {solver}, found {steps}")
    schedule = time_grid(prior.sde, "phi", steps // each, time_eps)
    equations = ode(prior.sde, "velocity", schedule, midpoints=solver in MIDPOINTS).reversed()
    divergence = _Divergence(z0, probes)

    def predict(z: Tensor, t: float) -> Tensor:
        return prior(z, z.new_full((1,), t))

    def f(i: int, state: Tensor) -> Tensor:
        return divergence(partial(equations.slope, predict, i), state)

    start = divergence.start(z0 / equations.scale[0])
    if solver == "ab":
        end = adams_bashforth(f, start, equations.x, AB_ORDER)
    else:
        end = runge_kutta(f, start, equations.x, solver)
    end = check_finite(end, solver)
    stretch = z0.shape[1:].numel() * math.log(equations.scale[-1] / equations.scale[0])
    return prior.sde.base_log_prob(equations.scale[-1] * end[:, :-1]) + end[:, -1] + stretch, steps


class _Divergence:
    """The slope of a state [B, D + 1] of latents and of the log density that was collected along their path.

    Args:
        z0, probes: see :func:`log_prob`.
    """

    def __init__(self, z0: Tensor, probes: Tensor | None) -> None:
        self.shape, self.scale = z0.shape, 1.0
        if probes is None:
            dimensions = z0.shape[1:].numel()
            basis = torch.eye(dimensions, dtype=z0.dtype, device=z0.device)
            probes = basis.view(-1, 1, *z0.shape[1:]).expand(-1, *z0.shape)
            self.scale = float(dimensions)
        elif probes.dim() == z0.dim():
            probes = probes[None]
        if probes.shape[1:] != z0.shape or len(probes) == 0:
            raise LSGMError(f"probes: expected [P, {', '.join(map(str, z0.shape))}], found {list(probes.shape)}")
        self.probes = probes

    def start(self, y: Tensor) -> Tensor:
        """The state that begins with latents ``y``."""
        return torch.cat([y.flatten(1), y.new_zeros(len(y), 1)], dim=1)

    def __call__(self, slope: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
        """dy/dx and the trace of its Jacobian, [B, D + 1], where ``slope`` is dy/dx as a function of y."""
        y = state[:, :-1].view(self.shape).detach().requires_grad_()
        with torch.enable_grad():
            velocity = slope(y)
        traces = []
        for i, probe in enumerate(self.probes):
            # the Jacobian's transpose times the probe
            (product,) = torch.autograd.grad(velocity, y, probe, retain_graph=i + 1 < len(self.probes))
            traces.append((product * probe).flatten(1).sum(dim=1, keepdim=True))
        trace = torch.stack(traces).mean(dim=0) * self.scale
        return torch.cat([velocity.detach().flatten(1), trace], dim=1)
