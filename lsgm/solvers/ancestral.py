"""The discretized diffusion (DDPM, arXiv 2006.11239): ancestral sampling and the variational bound.

In K steps, with alpha_bar_i = 1 - sigma^2((i + 1) / K) for i = 0 .. K - 1; step i sees t = (i + 1) / K.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lsgm.arguments import check_choice, check_count
from lsgm.errors import LSGMError
from lsgm.prior import ScorePrior
from lsgm.sde import SDE
from lsgm.solvers.solution import Solution, check_finite

Variance = Literal["fixed_large", "fixed_small"]  # beta, or that of the true posterior
VARIANCES: tuple[Variance, ...] = get_args(Variance)
LATENT_LIMIT = 3.0  # what the published sampler clamps its result to


class Discretization:
    """Coefficients of ``steps`` steps, each a float64 tensor [K] on the host.

    Raises:
        LSGMError: there is no step, or the diffusion is not variance preserving; its ODE can be used instead.
    """

    def __init__(self, sde: SDE, steps: int) -> None:
        steps = check_count("steps", steps)
        if not sde.variance_preserving:
            raise LSGMError(
                f"ancestral sampling and the discretized bound need a variance-preserving diffusion, not the "
                f"{type(sde).__name__}: use the solver rk45 and the estimator ode, or sde.name vpsde or geometric_vpsde"
            )
        self.t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        self.alpha_bar = sde.alpha_bar(self.t)  # 1 - sigma^2
        self.variance = sde.variance(self.t)  # 1 - alpha_bar
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        self.alpha = self.alpha_bar / before
        self.beta = 1 - self.alpha
        if steps > 1:
            variance_before = torch.cat([torch.zeros(1, dtype=torch.float64), self.variance[:-1]])
            self.posterior_beta = self.beta * variance_before / self.variance
            self.posterior_beta[0] = self.posterior_beta[1]
        else:
            self.posterior_beta = self.beta

    def mean(self, i: int, z: Tensor, noise: Tensor) -> Tensor:
        """Mean of step i from z_i with predicted ``noise``: (z - beta / sqrt(1 - alpha_bar) noise) / sqrt(alpha)."""
        scale = 1 / math.sqrt(self.alpha[i])
        return torch.add(scale * z, noise, alpha=-scale * self.beta[i].item() / math.sqrt(self.variance[i]))


@torch.no_grad()
def sample(
    prior: ScorePrior, noise: Tensor, steps: int, draw: Callable[[], Tensor], variance: Variance = "fixed_large"
) -> Solution:
    """Latents z0 [B, C, H, W] from ``noise`` ~ N(0, I), in ``steps`` evaluations.

    Args:
        draw: gives N(0, I) like ``noise``, once for each step but the last, which returns the mean.
        variance: of a step: beta (`fixed_large`), or that of the true posterior (`fixed_small`).
    Raises:
        SolverError: the latents are not finite.
        LSGMError: as :class:`Discretization`, or the variance is another one.
    """
    check_choice("variance", variance, VARIANCES)
    process = Discretization(prior.sde, steps)
    spread = (process.beta if variance == "fixed_large" else process.posterior_beta).sqrt()
    z = noise
    for i in reversed(range(steps)):
        z = process.mean(i, z, prior(z, z.new_full((1,), process.t[i].item())))
        if i > 0:
            z = torch.add(z, draw(), alpha=spread[i].item())
    # before the clamp, which makes 3 of infinity
    return Solution(check_finite(z, "ancestral").clamp(-LATENT_LIMIT, LATENT_LIMIT), steps)


def ancestral_sample(prior: ScorePrior, noise: Tensor, draw: Callable[[], Tensor], settings: Any) -> Solution:
    """:func:`sample` with the `steps` and the `variance` of the ``settings``."""
    return sample(prior, noise, settings.steps, draw, settings.variance)


@torch.no_grad()
def elbo(prior: ScorePrior, z0: Tensor, steps: int, draw: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """A lower bound of log p(z0) in nats, [B], by ancestral sampling with the variance beta, and the NFE.

        sum_{i>0} KL(q(z_{i-1} | z_i, z0) || p(z_{i-1} | z_i)) - log p(z0 | z_1) + KL(q(z_K | z0) || N(0, I)),

    each z_i drawn from q(z_i | z0).

    Args:
        draw: gives N(0, I) like ``z0``, once for each step, from the last to the first.
    """
    process = Discretization(prior.sde, steps)
    batch, dimensions = z0.shape[0], z0.shape[1:].numel()
    bound = torch.zeros(batch, dtype=torch.float64, device=z0.device)
    for i in reversed(range(steps)):
        noise = draw()
        alpha_bar, beta = process.alpha_bar[i].item(), process.beta[i].item()
        z = math.sqrt(alpha_bar) * z0 + math.sqrt(process.variance[i]) * noise
        predicted = prior(z, z.new_full((1,), process.t[i].item()))
        if i > 0:
            # the means differ by beta / sqrt(alpha (1 - alpha_bar)) (noise - predicted)
            factor = beta / (2 * process.alpha[i].item() * process.variance[i].item())
            ratio = process.posterior_beta[i].item() / beta
            bound += factor * (noise - predicted).double().square().flatten(1).sum(dim=1)
            bound += 0.5 * dimensions * (ratio - 1 - math.log(ratio))
        else:
            error = (z0 - process.mean(0, z, predicted)).double().square().flatten(1).sum(dim=1)
            bound += 0.5 * (error / beta + dimensions * math.log(math.tau * beta))
    end, variance = process.alpha_bar[-1].item(), process.variance[-1].item()
    bound += 0.5 * (end * z0.double().square().flatten(1).sum(dim=1) + dimensions * (variance - 1 - math.log(variance)))
    return -bound, steps
