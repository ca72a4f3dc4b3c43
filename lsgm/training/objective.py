"""What is minimised (LSGM, sections 3.1 to 3.4; NVAE, section 3.2). All in nats per image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsgm.model import LSGM
from lsgm.networks.nvae import HALF_LOG_2PI
from lsgm.prior import ScorePrior
from lsgm.weighting import TimeSampler


@dataclass
class Objective:
    """A loss and the terms that it is made of, to be looked at; scalars, means over the batch."""

    loss: Tensor
    terms: dict[str, Tensor]


def linear_anneal(step: int, total: int, const_portion: float, portion: float, start: float, end: float) -> float:
    """The KL coefficient at ``step`` of ``total``: ``start``, then linearly up to ``end`` over ``portion``."""
    if portion == 0:
        return end
    progress = (step - const_portion * total) / (portion * total)
    return min(max(start + (end - start) * progress, start), end)


class VAEObjective:
    """First stage: reconstruction + beta * sum over groups of balanced KL(q || N(0, I)).

    While beta is below 1 the groups' KLs are balanced: group g counts with gamma_g proportional to
    (mean |KL_g| + 0.01) / a_g, normalised to mean 1 and treated as constant. a_g is proportional to the size of the
    group's scale over the number of its groups; with one scale it is 1.
    """

    def __call__(self, model: LSGM, x: Tensor, beta: float) -> Objective:
        posterior, parameters = model.vae.encode(2 * x - 1)
        reconstruction = -model.likelihood.log_prob(x, parameters)
        kl = posterior.log_q + 0.5 * posterior.z.square() + HALF_LOG_2PI  # [B, C, H, W]
        kl_groups = torch.stack([g.sum(dim=(1, 2, 3)) for g in kl.split(posterior.groups, dim=1)], dim=1)  # [B, G]
        balanced = kl_groups
        if beta < 1 and len(posterior.groups) > 1:
            gamma = kl_groups.detach().abs().mean(dim=0) + 0.01
            balanced = kl_groups * (gamma / gamma.mean())
        loss = (reconstruction + beta * balanced.sum(dim=1)).mean()
        kl_total = kl_groups.detach().sum(dim=1).mean()
        terms = {"reconstruction": reconstruction.detach().mean(), "kl": kl_total}
        return Objective(loss, {"nelbo": terms["reconstruction"] + kl_total} | terms)


class LSGMObjective:
    """Second stage, algorithm 1: one likelihood-weighted loss trains the VAE and the prior.

    L(x) = E_q[-log p(x|z0)] + beta (E_q[log q(z0|x)] + CE(q(z0|x) || p(z0))), the cross entropy being
    E_t[c(t)/r(t) ||noise - eps_theta(z_t, t)||^2] + constant (theorem 1).

    ``draws`` is the number of (t, noise) that each latent is diffused with. More cost only passes of the score network
    and lower the variance of the gradient, of the encoder's too.
    """

    def __init__(self, time_sampler: TimeSampler, draws: int = 1) -> None:
        self.time_sampler = time_sampler
        self.draws = draws

    def __call__(self, model: LSGM, x: Tensor, beta: float) -> Objective:
        posterior, parameters = model.vae.encode(2 * x - 1)
        reconstruction = -model.likelihood.log_prob(x, parameters)
        negative_entropy = posterior.log_q.sum(dim=(1, 2, 3))
        prior = model.prior
        assert isinstance(prior, ScorePrior)
        z0 = posterior.z.repeat(self.draws, 1, 1, 1)
        rho = torch.rand(z0.shape[0], device=x.device)
        cross_entropy = self.cross_entropy(prior, z0, rho, torch.randn_like(z0)).view(self.draws, -1).mean(dim=0)
        loss = (reconstruction + beta * (negative_entropy + cross_entropy)).mean()
        terms = {
            "reconstruction": reconstruction.detach().mean(),
            "negative_entropy": negative_entropy.detach().mean(),
            "cross_entropy": cross_entropy.detach().mean(),
        }
        return Objective(loss, {"nelbo": torch.stack(list(terms.values())).sum()} | terms)

    def cross_entropy(self, prior: ScorePrior, z0: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
        """One-sample estimate of CE(q(z0|x) || p(z0)), [B], for rho ~ U[0, 1] [B] and noise ~ N(0, I) like z0."""
        draw = self.time_sampler(rho)
        z_t = prior.sde.diffuse(z0, noise, draw.t[:, None, None, None])
        squared_error = (noise - prior.predict_noise(z_t, draw.t)).square().sum(dim=(1, 2, 3))
        return draw.weight * squared_error + z0[0].numel() * self.time_sampler.cross_entropy_constant()
