"""Samples from the prior, by each family of solvers: what `sample.solver` chooses.

Each function takes (prior, noise [B, ...] ~ N(0, I), draw, settings) and returns a :class:`Solution` with the latents
at t = `time_eps`. ``draw`` gives N(0, I) like ``noise``; solvers of the ODE do not call it. They raise
:class:`SolverError` if the result is not finite or the ODE cannot be solved, and :class:`LSGMError` for a setting that
is out of its range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lsgm.arguments import check_count, check_tol
from lsgm.config import SamplerConfig
from lsgm.errors import LSGMError
from lsgm.nfe import PER_STEP
from lsgm.noise_schedule import NoiseSchedule, check_end
from lsgm.prior import ScorePrior
from lsgm.solvers.adams_bashforth import adams_bashforth
from lsgm.solvers.adaptive_sde import adaptive_sde
from lsgm.solvers.ancestral import sample as ancestral
from lsgm.solvers.cuda_graph import recorded
from lsgm.solvers.exponential import exponential_multistep
from lsgm.solvers.forms import Form, ode
from lsgm.solvers.probability_flow import drift
from lsgm.solvers.rk45 import rk45
from lsgm.solvers.runge_kutta import MIDPOINTS, runge_kutta
from lsgm.solvers.schedule import time_grid
from lsgm.solvers.solution import NoisePrediction, Solution, check_finite

Draw = Callable[[], Tensor]


def noise_prediction(prior: ScorePrior, z: Tensor) -> NoisePrediction:
    """eps(z, t) for latents like ``z`` at one time for all; on a GPU as a CUDA graph."""
    network = recorded(prior, z, z.new_ones(1)) if z.is_cuda else prior
    return lambda z, t: network(z, z.new_full((1,), t))


@torch.no_grad()
def rk45_sample(prior: ScorePrior, noise: Tensor, draw: Draw, settings: SamplerConfig) -> Solution:
    """By the probability-flow ODE with adaptive steps to the tolerance `tol` (arXiv 2011.13456, appendix D.4)."""
    found = rk45(partial(drift, prior), _start(prior, noise), 1.0, _end(prior, settings), check_tol(settings.tol))
    return _denoised(prior, found, settings)


@torch.no_grad()
def runge_kutta_sample(prior: ScorePrior, noise: Tensor, draw: Draw, settings: SamplerConfig) -> Solution:
    """By the ODE in a `form`, with `euler`, `heun` or `rk4` on a `grid`, in `steps` evaluations.

    EDM's sampler (arXiv 2206.00364, algorithm 1) is `heun` in the noise form on the grid `edm` with `denoise`.
    """
    method: str = settings.solver
    form: Form = "drift" if settings.form is None or settings.form == "data" else settings.form
    steps = (_evaluations(settings) - bool(settings.denoise)) // PER_STEP[method]
    schedule = time_grid(prior.sde, settings.grid or "t", steps, _end(prior, settings))
    equations = ode(prior.sde, form, schedule, midpoints=method in MIDPOINTS)
    z = _start(prior, noise)
    slope = partial(equations.slope, noise_prediction(prior, z))
    y = runge_kutta(slope, z / equations.scale[0], equations.x, method)
    found = Solution(check_finite(equations.scale[-1] * y, method), steps * PER_STEP[method])
    return _denoised(prior, found, settings)


@torch.no_grad()
def multistep_sample(prior: ScorePrior, noise: Tensor, draw: Draw, settings: SamplerConfig) -> Solution:
    """By a multistep method of an `order` in the velocity, noise or data `form` on a `grid`, in `steps` evaluations."""
    form, order = settings.form or "velocity", settings.order or 2
    steps = _evaluations(settings) - bool(settings.denoise)
    schedule = time_grid(prior.sde, settings.grid or "t", steps, _end(prior, settings))
    z = _start(prior, noise)
    predict = noise_prediction(prior, z)
    if form != "data":
        equations = ode(prior.sde, form, schedule)
        y = adams_bashforth(partial(equations.slope, predict), z / equations.scale[0], equations.x, order)
        z = equations.scale[-1] * y
    else:
        z = exponential_multistep(predict, z, schedule, order, settings.corrector, settings.tau, draw)
    return _denoised(prior, Solution(check_finite(z, settings.solver), steps), settings)


@torch.no_grad()
def adaptive_sde_sample(prior: ScorePrior, noise: Tensor, draw: Draw, settings: SamplerConfig) -> Solution:
    """By the reverse SDE with steps of each image's own, to the tolerances `tol` and `atol`."""
    end = _end(prior, settings)
    found = adaptive_sde(prior, _start(prior, noise), draw, end, check_tol(settings.tol), settings.atol)
    return _denoised(prior, found, settings)


@torch.no_grad()
def ancestral_sample(prior: ScorePrior, noise: Tensor, draw: Draw, settings: SamplerConfig) -> Solution:
    """By the discretized diffusion, in `steps` evaluations with the `variance`."""
    return ancestral(prior, noise, _evaluations(settings), draw, settings.variance)


def _start(prior: ScorePrior, noise: Tensor) -> Tensor:
    """A sample of the base distribution p(z_1)."""
    return noise * math.sqrt(prior.sde.base_variance)


def _end(prior: ScorePrior, settings: SamplerConfig) -> float:
    if settings.time_eps is None:
        raise LSGMError("time_eps: expected a number here; only a model knows what null stands for")
    return check_end(prior.sde, settings.time_eps)


def _evaluations(settings: SamplerConfig) -> int:
    return check_count("steps", settings.steps)


def _denoised(prior: ScorePrior, found: Solution, settings: SamplerConfig) -> Solution:
    """With `denoise`, the prediction (z - sigma eps) / m of z0 at the end; one evaluation more."""
    if not settings.denoise:
        return found
    end = NoiseSchedule.of(prior.sde, torch.tensor([_end(prior, settings)], dtype=torch.float64))
    noise = prior(found.y, found.y.new_full((1,), end.t.item()))
    z0 = torch.add(found.y, noise, alpha=-end.sigma.item()) / end.mean.item()
    return Solution(check_finite(z0, settings.solver), found.nfe + 1)
