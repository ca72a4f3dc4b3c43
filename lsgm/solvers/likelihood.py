"""log p(z0) under the score prior: what `evaluate.estimator` chooses."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lsgm import nfe
from lsgm.config import EstimatorConfig
from lsgm.per_sample_noise import PerSampleNoise
from lsgm.prior import ScorePrior
from lsgm.solvers import ancestral
from lsgm.solvers.bound import variational_bound
from lsgm.solvers.probability_flow import fixed_steps_log_prob, log_prob


def evaluations(settings: EstimatorConfig) -> int:
    """The number of evaluations; for `rk45` it has no meaning."""
    return settings.steps if settings.steps is not None else nfe.ESTIMATOR[settings.estimator]


@torch.no_grad()
def estimate_log_prob(
    prior: ScorePrior, z0: Tensor, noise: PerSampleNoise, settings: EstimatorConfig, time_eps: float
) -> tuple[Tensor, int]:
    """An estimate of log p(z0), or a lower bound of it, in nats, [B], and the NFE.

    Args:
        z0: latents [B, C, H, W]; the state at t = ``time_eps``.
        noise: the draws for these images: Hutchinson probes, or the noise of the bounds.
    Raises:
        SolverError: the ODE cannot be solved.
        LSGMError: a setting is out of its range.
    """
    steps, draw = evaluations(settings), partial(noise.normal, z0.shape[1:])
    if settings.estimator == "discretized":
        return ancestral.elbo(prior, z0, steps, draw)
    if settings.estimator == "bound":
        return variational_bound(prior, z0, steps, draw, time_eps)
    probes = None
    if settings.probe != "exact":
        draw = draw if settings.probe == "gaussian" else partial(noise.rademacher, z0.shape[1:])
        probes = torch.stack([draw() for _ in range(settings.probes)])
    if settings.solver == "rk45":
        return log_prob(prior, z0, probes, settings.tol, time_eps)
    return fixed_steps_log_prob(prior, z0, probes, settings.solver, steps, time_eps)
