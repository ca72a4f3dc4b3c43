"""The variational bound of log p(z0) in continuous time, without an ODE (LSGM, theorem 1; Kingma et al., 2107.00630).

With lambda = log(m / sigma), half of the log-SNR, the cross entropy of q(z_t | z0) at t = time_eps is at most

    integral over lambda of E||noise - eps(z_t, t)||^2  +  D/2 log(2 pi e sigma^2)  +  KL(q(z_1 | z0) || p(z_1)).

The integral is a sum over Gauss-Legendre nodes in lambda. At each node the error of the prediction for N(0, I), whose
expectation has a closed form, is a control variate: only the difference of the two errors is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lsgm.arguments import check_count
from lsgm.noise_schedule import NoiseSchedule
from lsgm.normal_error import gauss_legendre, integrated_normal_error
from lsgm.prior import ScorePrior


@torch.no_grad()
def variational_bound(
    prior: ScorePrior, z0: Tensor, nodes: int, draw: Callable[[], Tensor], time_eps: float
) -> tuple[Tensor, int]:
    """A lower bound of log p(z0) in nats, [B], with one draw at each of the ``nodes``, and the NFE.

    Its expectation over the draws is the bound, to the accuracy of the quadrature.

    Args:
        z0: latents [B, ...].
        draw: gives N(0, I) like ``z0``, once for each node.
    Raises:
        LSGMError: there is no node, or sigma is 0 at ``time_eps``.
    """
    sde, dimensions = prior.sde, z0.shape[1:].numel()
    norm = z0.double().square().flatten(1).sum(dim=1)
    a, b = integrated_normal_error(sde, time_eps)
    cross_entropy = a * dimensions + b * norm

    schedule, node_weights = gauss_legendre(sde, check_count("steps", nodes), time_eps)
    rows = zip(*(x.tolist() for x in (schedule.t, schedule.mean, schedule.sigma, node_weights)), strict=True)
    for t, m, sigma, weight in rows:
        noise = draw()
        z_t = torch.add(m * z0, noise, alpha=sigma)
        time = z_t.new_full((1,), t)
        error = (noise - prior(z_t, time)).double().square()
        normal = (noise - sde.normal_noise(z_t, time)).double().square()
        cross_entropy += weight * (error - normal).flatten(1).sum(dim=1)

    ends = NoiseSchedule.at_ends(sde, time_eps)
    (m1, _), (s1, s0) = ends.mean.tolist(), ends.sigma.tolist()
    ratio = s1**2 / sde.base_variance
    kl = 0.5 * (m1**2 / sde.base_variance * norm + dimensions * (ratio - 1 - math.log(ratio)))
    entropy = 0.5 * dimensions * (1 + math.log(math.tau * s0**2))
    return -(cross_entropy + entropy + kl), nodes
