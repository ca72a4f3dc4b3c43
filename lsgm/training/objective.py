"""The training objective of each stage, from a batch of images to one scalar (LSGM, section 3; NVAE, section 3.2).

All values are in nats per image, averaged over the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lsgm.gaussian import kl_to_standard
from lsgm.model import LSGM
from lsgm.networks.posterior import Posterior
from lsgm.prior import ScorePrior
from lsgm.sde import SDE
from lsgm.training.algorithms import (
    Sample,
    algorithm_1,
    algorithm_2,
    algorithm_3,
    balancing,
    frozen_vae,
    per_group,
)
from lsgm.training.batch_noise import BatchNoise, all_of
from lsgm.training.control_variate import ControlVariate
from lsgm.training.diffusion import Start
from lsgm.weighting import TimeSampler

Algorithm = Literal[1, 2, 3]
CrossEntropy = Literal["marginal", "control_variate", "sampled"]


@dataclass
class Objective:
    """A loss and its terms for logging: scalars and vectors, averaged over the batch."""

    loss: Tensor
    terms: dict[str, Tensor]


class VAEObjective:
    """First stage: reconstruction + beta * sum over groups of gamma_g KL_g(q || N(0, I)), balanced while beta < 1."""

    def __call__(self, model: LSGM, x: Tensor, beta: float, random: BatchNoise | None = None) -> Objective:
        """The objective for images ``x`` [B, C, H, W] in [0, 1]."""
        posterior, parameters = model.vae.encode(2 * x - 1, _noise(model, random or all_of(x)))
        reconstruction = -model.likelihood.log_prob(x, parameters)
        kl = kl_to_normal(posterior)  # [B, G]
        gamma = balancing(kl, beta, len(posterior.groups))
        loss = (reconstruction + beta * (gamma * kl).sum(dim=1)).mean()
        kl_total = kl.detach().sum(dim=1).mean()
        terms = {"reconstruction": reconstruction.detach().mean(), "kl": kl_total}
        return Objective(loss, {"nelbo": terms["reconstruction"] + kl_total} | terms | _kl_vectors(posterior))


class LSGMObjective:
    """Second stage: the losses of VAE and prior, by one of the algorithms of appendix G.6.

    Args:
        p: draws t for the prior's loss.
        algorithm: 1, 2 or 3 (:mod:`lsgm.training.algorithms`).
        q: draws t for the VAE's loss; algorithm 2 only.
        joint: algorithm 2 evaluates both losses in one pass with twice the batch, otherwise one after the other.
        q_prior: prior for the VAE's loss (algorithm 2, not joint), such as one with averaged weights; None: the
            prior that is trained.
        time_samples: samples of (t, noise) per latent and step. More samples lower the variance of the gradients, the
            encoder's too, but need more passes through the score network.
        balance: balance the KLs of the groups (algorithm 1 only).
        train_vae: False: only the prior's loss, on samples from a frozen VAE.
        cross_entropy: its estimator: `marginal`, with a `control_variate`, or `sampled`, as in the paper.
        stratified_t: stratify the samples of t over the batch; False: independent samples, as in the paper.
    """

    def __init__(
        self,
        p: TimeSampler,
        algorithm: Algorithm = 1,
        *,
        q: TimeSampler | None = None,
        joint: bool = False,
        q_prior: ScorePrior | None = None,
        time_samples: int = 1,
        balance: bool = False,
        train_vae: bool = True,
        cross_entropy: CrossEntropy = "control_variate",
        stratified_t: bool = True,
    ) -> None:
        self.p, self.algorithm, self.joint, self.q_prior = p, algorithm, joint, q_prior
        self.time_samples, self.balance, self.train_vae = time_samples, balance, train_vae
        self.stratified_t = stratified_t
        self.q = q if algorithm == 2 and train_vae else None
        assert self.q is not None or algorithm != 2 or not train_vae
        self.control_variate = None if cross_entropy == "sampled" else ControlVariate(self.q or p)
        self.marginal = cross_entropy == "marginal"

    def __call__(self, model: LSGM, x: Tensor, beta: float, random: BatchNoise | None = None) -> Objective:
        """The objective for images ``x`` [B, C, H, W] in [0, 1]."""
        prior, random = model.prior, random or all_of(x)
        assert isinstance(prior, ScorePrior)
        s = self._sample(model, prior.sde, x, beta, random)
        if not self.train_vae:
            losses = frozen_vae(prior, s)
        elif self.algorithm == 1:
            losses = algorithm_1(prior, s, self.balance)
        elif self.algorithm == 3:
            losses = algorithm_3(prior, s)
        else:
            losses = algorithm_2(prior, s, self.q_prior or prior, self.joint)
        terms = {
            "reconstruction": s.reconstruction.detach(),
            "negative_entropy": s.negative_entropy.detach().sum(dim=1).mean(),
            "cross_entropy": losses.cross_entropy.detach() + s.constant,
        }
        if s.posterior.lower_scales:
            terms["lower_scales_kl"] = s.lower_scales_kl.detach().sum(dim=1).mean()
        terms = {"nelbo": torch.stack(list(terms.values())).sum()} | terms
        return Objective(losses.loss, terms | {"loss_prior": losses.loss_prior.detach()} | _kl_vectors(s.posterior))

    def _sample(self, model: LSGM, sde: SDE, x: Tensor, beta: float, random: BatchNoise) -> Sample:
        """Draw z0 ~ q(z0 | x), t and noise."""
        with torch.set_grad_enabled(self.train_vae):
            posterior, parameters = model.vae.encode(2 * x - 1, _noise(model, random))
            reconstruction = -model.likelihood.log_prob(x, parameters).mean()
        negative_entropy = per_group(posterior.log_q, posterior.groups)
        lower_scales_kl = posterior.lower_scales_kl()
        start = Start.of(posterior, self.time_samples, self.marginal)
        rho = random.stratified if self.stratified_t else random.uniform
        p_draw = self.p(rho(self.time_samples))
        noise = random.normal(model.latent_shape, self.time_samples)
        q_draw = self.q(rho(self.time_samples)) if self.q is not None else p_draw
        if self.control_variate is None:
            variate = noise.new_zeros(len(noise), len(posterior.groups))
        else:
            variate = per_group(self.control_variate(sde, start, noise, q_draw), posterior.groups)
        return Sample(
            posterior,
            reconstruction,
            negative_entropy,
            lower_scales_kl,
            start,
            noise,
            p_draw,
            q_draw,
            variate,
            constant=self.p.cross_entropy_constant() * noise[0].numel(),
            beta=beta,
        )


def kl_to_normal(posterior: Posterior) -> Tensor:
    """log q - log N(0, I) at the sample for each latent group, top first, [B, G]."""
    top = per_group(kl_to_standard(posterior.log_q, posterior.z), posterior.groups)
    return torch.cat([top, posterior.lower_scales_kl()], dim=1)


@torch.no_grad()
def _kl_vectors(posterior: Posterior) -> dict[str, Tensor]:
    """KL(q || N(0, I)) of the prior's channels and of the groups of lower scales, means over the batch."""
    vectors = {"kl_per_channel": posterior.kl_per_channel()}
    if posterior.lower_scales:
        vectors["lower_scales_kl_per_group"] = posterior.lower_scales_kl().mean(dim=0)
    return vectors


def _noise(model: LSGM, random: BatchNoise) -> list[Tensor]:
    """The normal noise of the encoder's samples."""
    return [random.normal(shape) for shape in (model.latent_shape, *model.vae.lower_scale_shapes)]
